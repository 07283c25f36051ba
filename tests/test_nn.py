"""Networks, the normaliser and schedules against slow float64 references."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import slopes
from scipy import special, stats

from mbrl_jax.nn import normaliser
from mbrl_jax.nn.networks import MLP, BatchRenorm, Conv3x3, Torso, polyak
from mbrl_jax.nn.schedules import linear
from mbrl_jax.types import ArraySpec, EnvSpec, InputError


def draw(net, seed, x, *args):
    """Variables of a network; one program, where each initialiser would be compiled by itself."""
    return jax.jit(lambda key: net.init(key, x, *args))(jax.random.key(seed))


def apply(net, variables, *args, **kwargs):
    """`net.apply` as one program."""
    return jax.jit(lambda variables: net.apply(variables, *args, **kwargs))(variables)


def dense(params, x, number=0):
    layer = params["params"][f"Dense_{number}"]
    return x @ np.float64(layer["kernel"]) + np.float64(layer["bias"])


def test_mlp_has_its_layers_and_a_head_only_where_asked():
    x = np.linspace(-1.0, 1.0, 30, dtype=np.float32).reshape(2, 5, 3)
    net = MLP((7, 4), 2, "tanh")
    params = draw(net, 0, x)
    shapes = jax.tree.map(jnp.shape, params)["params"]
    assert [shapes[f"Dense_{i}"]["kernel"] for i in range(3)] == [(3, 7), (7, 4), (4, 2)]
    expected = np.float64(x)
    for number in range(2):
        expected = np.tanh(dense(params, expected, number))
    bare = apply(MLP((7, 4), None, "tanh"), params, x)
    np.testing.assert_allclose(bare, expected, rtol=1e-5, atol=1e-6)
    out, expected = apply(net, params, x), dense(params, expected, 2)
    assert (out.shape, out.dtype) == ((2, 5, 2), jnp.float32)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_activations_are_what_they_are_called():
    x = np.linspace(-3, 3, 13)
    expected = {
        "relu": np.maximum(x, 0),
        "tanh": np.tanh(x),
        "swish": x * special.expit(x),
        "elu": np.where(x > 0, x, np.expm1(x)),
        "gelu": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    }
    one = {"params": {"Dense_0": {"kernel": np.ones((1, 1)), "bias": np.zeros(1)}}}
    one, rows = jax.tree.map(np.float32, one), np.float32(x)[:, None]
    got = jax.jit(lambda: {name: MLP((1,), None, name).apply(one, rows) for name in expected})()
    for name, values in expected.items():
        np.testing.assert_allclose(got[name][:, 0], values, rtol=1e-5, atol=1e-6, err_msg=name)
    with pytest.raises(InputError, match="unknown activation 'rely'; did you mean 'relu'"):
        MLP((1,), None, "rely").init(jax.random.key(0), jnp.ones((1, 1)))


@pytest.mark.parametrize("name", ["orthogonal", "lecun", "truncated_normal"])
def test_initial_weights(name):
    net = MLP((400,), 50, "relu", name, 2.0, 0.1)
    params = draw(net, 0, jnp.zeros((1, 100)))["params"]
    for layer, scale, (fan_in, fan_out) in (
        (params["Dense_0"], 2.0, (100, 400)),
        (params["Dense_1"], 0.1, (400, 50)),
    ):
        kernel = np.float64(layer["kernel"])
        assert kernel.shape == (fan_in, fan_out)
        assert not np.any(layer["bias"])
        if name == "orthogonal":
            gram = kernel.T @ kernel if fan_in >= fan_out else kernel @ kernel.T
            np.testing.assert_allclose(gram, scale**2 * np.eye(len(gram)), atol=1e-5 * scale**2)
            continue
        cut = 0.87962566  # standard deviation of a normal that is cut at two
        std = scale / np.sqrt(fan_in) * (1.0 if name == "lecun" else cut / 2)
        assert kernel.std() == pytest.approx(std, rel=0.02)
        assert abs(kernel.mean()) < 5 * std / np.sqrt(kernel.size)
        assert 1.99 * std / cut < np.abs(kernel).max() <= 2.0001 * std / cut


def test_layer_norm_stands_before_the_activation():
    x = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    net = MLP((5,), None, layer_norm=True)
    params = draw(net, 0, x)
    z = dense(params, np.float64(x))
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(apply(net, params, x), np.maximum(z, 0), rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean_and_its_rate_is_traced():
    width = 20_000
    net = MLP((width,), None, dropout=True)
    layer = {"kernel": jnp.zeros((1, width)), "bias": jnp.ones(width)}
    traces = []

    @jax.jit
    def dropped(rate, key):
        traces.append(1)
        x = jnp.zeros((1, 1))
        return net.apply({"params": {"Dense_0": layer}}, x, rate, rngs={"dropout": key})[0]

    np.testing.assert_array_equal(dropped(0.0, jax.random.key(0)), np.ones(width))
    for seed, rate in enumerate((0.1, 0.5, 0.9), start=1):
        out = np.asarray(dropped(rate, jax.random.key(seed)))
        np.testing.assert_allclose(np.unique(out), [0.0, 1 / (1 - rate)], rtol=1e-6)
        assert stats.binomtest(int((out == 0).sum()), width, rate).pvalue > 1e-4
    assert len(traces) == 1


def test_dropout_comes_before_layer_norm():
    """The zeros of dropout take part in the normalisation, as DroQ has it."""
    net = MLP((6,), None, dropout=True, layer_norm=True)
    bias = np.arange(5.0, 11.0, dtype=np.float32)
    norm = {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
    params = {"Dense_0": {"kernel": jnp.zeros((2, 6)), "bias": bias}, "LayerNorm_0": norm}
    rngs = {"dropout": jax.random.key(2)}
    got = np.asarray(apply(net, {"params": params}, jnp.ones((1, 2)), 0.5, rngs=rngs))
    kept = np.array(list(itertools.product((0.0, 2.0), repeat=6)))[1:-1]
    z = np.float64(bias) * kept
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    assert np.abs(np.maximum(z, 0) - got).max(-1).min() < 1e-3


class SlowRenorm:
    """Ioffe (2017), Algorithm 1, as CrossQ uses it; float64."""

    def __init__(self, width, momentum, warmup):
        self.mean, self.var, self.steps = np.zeros(width), np.ones(width), 0
        self.momentum, self.warmup = momentum, warmup

    def corrections(self, x):
        std, running = np.sqrt(x.var(0) + 1e-3), np.sqrt(self.var + 1e-3)
        r = np.clip(std / running, 1 / 3, 3)
        d = np.clip((x.mean(0) - self.mean) / running, -5, 5)
        return (r, d) if self.steps >= self.warmup else (np.ones_like(r), np.zeros_like(d))

    def train(self, x):
        r, d = self.corrections(x)
        out = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) * r + d
        self.mean = self.momentum * self.mean + (1 - self.momentum) * x.mean(0)
        self.var = self.momentum * self.var + (1 - self.momentum) * x.var(0)
        self.steps += 1
        return out


def test_batch_renorm_equals_a_slow_one():
    net = BatchRenorm(momentum=0.9, warmup=3)
    slow, rng = SlowRenorm(4, 0.9, 3), np.random.default_rng(0)
    variables = draw(net, 0, jnp.ones((8, 4)), True)
    assert not variables["batch_stats"]["steps"], "the initialisation moves no statistics"
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(4))
    scale, bias = np.array([1.0, 2.0, -1.0, 0.5]), np.array([0.0, 1.0, 2.0, 3.0])
    params = {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}
    moving = variables["batch_stats"]

    @jax.jit
    def train(x, moving):
        variables = {"params": params, "batch_stats": moving}
        return net.apply(variables, x, True, mutable=["batch_stats"])

    clipped = set()
    for step in range(12):
        # the last columns leap, so that the corrections meet their bounds on either side
        late = step > 4
        size = np.array([1.0, 1.3, 100.0 if late and step % 2 else 0.01, 1.0])
        shift = np.array([0.0, 0.3, 0.0, 50.0 * (-1) ** step if late else 0.0])
        x = np.float32(rng.normal(size=(8, 4)) * size + shift)
        r, d = slow.corrections(np.float64(x))
        clipped |= {v for v in (*r, *d) if v in (3, 1 / 3, 5, -5)}
        out, moved = train(x, moving)
        moving = moved["batch_stats"]
        expected = slow.train(np.float64(x)) * scale + bias
        np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(moving["mean"], slow.mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moving["var"], slow.var, rtol=1e-4, atol=1e-5)
        assert moving["steps"] == step + 1
    assert clipped == {3, 1 / 3, 5, -5}
    x = np.float32(rng.normal(size=(3, 4)))
    out = apply(net, {"params": params, "batch_stats": moving}, x, False)
    expected = (x - slow.mean) / np.sqrt(slow.var + 1e-3) * scale + bias
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_the_corrections_of_batch_renorm_are_constants_to_the_gradient():
    net, rng = BatchRenorm(warmup=0), np.random.default_rng(1)
    x, weight = rng.normal(size=(5, 2)) * 1.5 + 0.4, rng.normal(size=(5, 2))
    moving = {"mean": jnp.array([0.1, -0.2]), "var": jnp.array([0.8, 1.5]), "steps": jnp.float32(1)}
    params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}

    def loss(x):
        variables = {"params": params, "batch_stats": moving}
        return jnp.sum(net.apply(variables, x, True, mutable=["batch_stats"])[0] * weight)

    slow = SlowRenorm(2, 0.99, 0)
    slow.mean, slow.var = np.float64(moving["mean"]), np.float64(moving["var"])
    r, d = slow.corrections(x)
    assert np.abs([r - 1, d]).min() > 0.05

    def slow_loss(x):
        return np.sum(((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3) * r + d) * weight)

    grad = jax.jit(jax.grad(loss))(np.float32(x))
    np.testing.assert_allclose(grad.ravel(), slopes(slow_loss, x), rtol=1e-3, atol=1e-4)


def test_conv3x3_is_a_convolution_without_padding():
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 3)).astype(np.float32)
    net = Conv3x3(5)
    params = draw(net, 1, x)
    kernel = np.reshape(params["params"]["Dense_0"]["kernel"], (3, 3, 3, 5))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(apply(net, params, x), expected, rtol=1e-4, atol=1e-5)


def observed(shape, num_obs=None):
    return EnvSpec("seen", shape, "float32", 9, num_obs=num_obs)


def test_torso_takes_every_kind_of_observation():
    def features(net, obs):
        def of(key):
            return net.apply(net.init(key, obs), obs)

        return np.asarray(jax.jit(of)(jax.random.key(0)))

    one_hot = features(Torso(observed((), 4)), np.array([2, 0], np.int32))
    np.testing.assert_array_equal(one_hot, [[0, 0, 1, 0], [1, 0, 0, 0]])
    assert one_hot.dtype == np.float32
    grid = np.arange(12).reshape(2, 2, 3)
    for obs in (grid.astype(np.uint8), grid > 4, grid.astype(np.float32)):
        flat = features(Torso(observed((2, 3))), obs)
        assert flat.dtype == np.float32
        np.testing.assert_array_equal(flat, np.asarray(obs, np.float32).reshape(2, 6))
    image = features(Torso(observed((5, 6, 2))), np.arange(120).reshape(2, 5, 6, 2) % 7 > 3)
    assert image.shape == (2, 3 * 4 * 16)
    assert image.min() == 0, "ReLU after the convolution"
    assert image.max() > 0


@pytest.mark.parametrize(
    ("shape", "image"),
    [((2, 5, 3), 0), ((3, 2, 5), 0), ((1, 1, 8), 0), ((10, 10, 4), 1), ((3, 3, 1), 1),
     ((64, 64, 3), 1), ((3, 4), 0), ((2, 3, 4, 5), 0)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["uint8", "float32", "bool"])
def test_only_what_a_convolution_fits_is_an_image(shape, image, dtype):
    """And brightnesses count from 0 to 1, while tables and flags keep their numbers."""
    net = Torso(EnvSpec("seen", shape, dtype, 9))
    obs = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(dtype)
    params = draw(net, 0, obs)
    got, x = apply(net, params, obs), np.asarray(obs, np.float32)
    if not image:
        assert not params
        np.testing.assert_array_equal(got, x.reshape(2, -1))
        return
    x = x / 255 if dtype == "uint8" else x
    conv = {"params": params["params"]["Conv3x3_0"]}
    expected = np.maximum(apply(Conv3x3(16), conv, x), 0).reshape(2, -1)
    assert expected.shape == (2, (shape[0] - 2) * (shape[1] - 2) * 16)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * x.max())
    if dtype == "uint8":
        assert 0.1 < np.abs(got).max() < 10


def test_a_normalised_image_is_not_divided_again():
    """PPO normalises observations before its networks see them."""
    net = Torso(EnvSpec("seen", (5, 5, 1), "uint8", 9))
    obs = np.random.default_rng(0).normal(size=(2, 5, 5, 1)).astype(np.float32)
    params = draw(net, 1, obs)
    conv = {"params": params["params"]["Conv3x3_0"]}
    expected = np.maximum(apply(Conv3x3(16), conv, obs), 0).reshape(2, -1)
    np.testing.assert_allclose(apply(net, params, obs), expected, rtol=1e-6)


def test_an_image_in_a_dict_is_an_image():
    parts = (("flag", ArraySpec((2,), "uint8")), ("view", ArraySpec((4, 4, 1), "uint8")))
    net = Torso(EnvSpec("seen", (), "dict", 9, obs_parts=parts))
    obs = {"flag": np.uint8([[1, 7]]), "view": np.full((1, 4, 4, 1), 255, np.uint8)}
    params = draw(net, 0, obs)
    kernel = np.asarray(params["params"]["Conv3x3_0"]["Dense_0"]["kernel"])
    expected = np.maximum(kernel.sum(0), 0)[None].repeat(4, 0).reshape(1, -1)
    expected = np.concatenate([[[1, 7]], expected], axis=1)
    np.testing.assert_allclose(apply(net, params, obs), expected, rtol=1e-5, atol=1e-6)


def test_polyak_is_the_moving_average():
    new, old = {"a": jnp.array([1.0, 2.0]), "b": jnp.float32(4)}, {"a": jnp.zeros(2), "b": 2.0}
    moved = polyak(new, old, 0.25)
    assert moved["a"].tolist() == [0.25, 0.5]
    assert moved["b"] == 2.5


def test_schedules_begin_and_end_where_they_should():
    schedule = jax.jit(lambda step: linear(2.0, -1.0, 16.0, step))
    got = [float(schedule(jnp.int32(step))) for step in (-3, 0, 4, 16, 17, 1000)]
    assert got == pytest.approx([2.0, 2.0, 1.25, -1.0, -1.0, -1.0])
    assert float(linear(2.0, -1.0, 0.0, jnp.int32(50))) == 2.0


UPDATE = jax.jit(normaliser.update)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    chunks=st.lists(st.sampled_from([1, 2, 7]), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, -3.0, 1000.0]),
)
def test_statistics_of_any_chunks_are_those_of_all_rows(seed, chunks, offset):
    rng = np.random.default_rng(seed)
    rows = np.float32(rng.normal(size=(sum(chunks), 3)) * [1.0, 10.0, 0.1] + offset)
    running = normaliser.init((3,))
    for chunk in np.split(rows, np.cumsum(chunks)[:-1]):
        running = UPDATE(running, chunk)
    rows = np.float64(rows)
    assert running.seen == len(rows)
    np.testing.assert_allclose(running.mean, rows.mean(0), rtol=1e-5, atol=1e-5)
    slack = 1e-5 + 3e-8 * abs(offset)  # a float32 mean near 1000 is off by 6e-5
    np.testing.assert_allclose(running.var, rows.var(0), rtol=1e-3, atol=slack)


def test_normalised_rows_are_clipped_and_constants_become_zero():
    fresh = normaliser.init((2,))
    normalise = jax.jit(normaliser.normalise)
    got = normalise(fresh, jnp.array([[3.0, -7.0], [12.0, -80.0]]))
    np.testing.assert_allclose(got, [[3.0, -7.0], [10.0, -10.0]], rtol=1e-6)
    rows = jnp.array([[[1.0, 5.0], [3.0, 5.0]], [[1.0, 5.0], [3.0, 5.0]]])
    running = UPDATE(fresh, rows)
    assert running.seen == 4
    got = normalise(running, rows, clip=0.5)
    np.testing.assert_array_equal(got, [[[-0.5, 0.0], [0.5, 0.0]]] * 2)


def test_the_count_stops_and_old_rows_fade():
    full = normaliser.Stats(jnp.zeros(()), jnp.ones(()), jnp.float32(2.0**24))
    moved = UPDATE(full, jnp.full(2**10, 100.0))
    assert moved.seen == 2.0**24
    np.testing.assert_allclose(moved.mean, 100 * 2**10 / (2**24 + 2**10), rtol=1e-5)
