"""The recurrent state-space model against its plain version, and what must hold of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rssm_reference as reference
from scipy import special

from mbrl_jax.models import (
    rssm,
    rssm_actions,
    rssm_cell,
    rssm_codec,
    rssm_heads,
    rssm_latents,
    rssm_params,
)
from mbrl_jax.types import ArraySpec, InputError

SIZES = rssm_params.Sizes(32, 8, 8, 3, 4, 4, 4)
OBS = rssm_codec.parts_of(ArraySpec((5,), "float32"))
ACTIONS = (rssm_actions.ActionPart("action", 3, False),)
B, T = 3, 6


def random(shape, seed, scale=1.0, dtype=np.float32):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


@functools.cache
def shapes(gaussian=False):
    init = functools.partial(rssm_params.init, gaussian=gaussian)
    return jax.eval_shape(lambda key: init(key, SIZES, OBS, ACTIONS), jax.random.key(0))


def parameters(seed=0, gaussian=False, dtype=np.float32):
    """Drawn wholly at random, so that no bias is 0 and no scale 1."""
    leaves, structure = jax.tree.flatten(shapes(gaussian))
    drawn = [random(x.shape, seed * 1000 + i, 0.5, dtype) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def sequence(seed=0, dtype=np.float32):
    """(tokens, actions, is_first, noise, start) of B sequences of T steps."""
    first = np.zeros((B, T), bool)
    first[0, 2] = first[0, 3] = first[1, 0] = first[2, T - 1] = True
    stoch = (SIZES.stoch, SIZES.classes)
    tokens = random((B, T, SIZES.units), seed + 1, dtype=dtype)
    actions = random((B, T, 3), seed + 2, 2.0, dtype)  # some of them beyond 1
    start = rssm.State(
        random((B, SIZES.deter), seed + 4, dtype=dtype), random((B, *stoch), seed + 5, dtype=dtype)
    )
    noise = random((B, T, *stoch), seed + 3, dtype=dtype)
    return tokens, actions, jnp.asarray(first), noise, start


def assert_equal_to_rounding(made, expected, tolerance):
    """Of each array, relative to its largest magnitude."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        a, b = np.float64(a), np.float64(b)
        scale = max(np.abs(b).max(), 1e-20)
        np.testing.assert_allclose(
            a / scale, b / scale, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )


LAYOUTS = {"cpu": ("cpu", 512), "accelerator": ("gpu", 512), "large": ("gpu", 16)}


@pytest.mark.parametrize(
    ("layout", "gaussian", "dtype", "tolerance"),
    [
        ("cpu", False, np.float64, 1e-12),
        ("accelerator", False, np.float64, 1e-12),
        ("large", True, np.float64, 1e-12),
        ("cpu", True, np.float32, 1e-5),
    ],
)
def test_the_posterior_pass_is_the_plain_one(monkeypatch, layout, gaussian, dtype, tolerance):
    """Values and all gradients; in the layout of each backend."""
    backend, joined = LAYOUTS[layout]
    weights = [random(shape, i + 20) for i, shape in enumerate([(B, T, 32), (B, T, 3, 4)])]
    weights.append(random((B, T, 3, 8 if gaussian else 4), 30))

    def gradient(observe):
        def loss(params, tokens, actions, start, rest, share):
            made = observe(params, tokens, actions, *rest, start, share)
            return sum(jnp.sum(a * b) for a, b in zip(weights, made, strict=True)), made

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))

    def ours(*args):
        return tuple(rssm.observe(*args[:-1], share=args[-1], gaussian=gaussian, dtype=dtype))

    plain = functools.partial(reference.observe, gaussian=gaussian)
    with jax.enable_x64(dtype == np.float64):
        params = parameters(0, gaussian, dtype)
        tokens, actions, *rest, start = sequence(0, dtype)
        args = (params, tokens, actions, start, rest, dtype(0.05))
        expected = gradient(plain)(*args)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(rssm_cell, "_JOINED", joined)
        made = gradient(ours)(*args)
    assert_equal_to_rounding(made, expected, tolerance)
    assert all(np.any(np.array(x)) for x in jax.tree.leaves(made[0][0]["core"])), "no gradient"


def stepped(params, tokens, actions, first, noise, start):
    """`observe` by steps, each called by itself."""
    step, made, state = jax.jit(functools.partial(rssm.step, dtype=jnp.float32)), [], start
    for t in range(tokens.shape[1]):
        now = step(params, state, tokens[:, t], actions[:, t], first[:, t], noise[:, t])
        state = rssm.State(now.deter, now.stoch)
        made.append(now)
    return jax.tree.map(lambda *x: jnp.stack(x, 1), *made)


@functools.cache
def observed():
    return jax.jit(functools.partial(rssm.observe, dtype=jnp.float32))


def test_a_sequence_is_step_after_step():
    params, inputs = parameters(), sequence()
    made = observed()(params, *inputs)
    assert_equal_to_rounding(made, stepped(params, *inputs), 1e-5)
    np.testing.assert_array_equal(np.sort(made.stoch, -1)[..., :-1], 0)
    np.testing.assert_array_equal(np.max(made.stoch, -1), 1)


def test_an_episode_within_a_sequence_is_one_of_its_own():
    params = parameters()
    tokens, actions, _, noise, start = sequence()
    first = jnp.zeros((B, T), bool).at[:, 2].set(True)
    whole = observed()(params, tokens, actions, first, noise, start)
    # the action before a first observation counts as zero, as does the state
    other = rssm.zero_state((B,), *SIZES[:1], *SIZES[3:5], jnp.float32)
    alone = jax.jit(lambda *x: rssm.observe(*x, dtype=jnp.float32))(
        params, tokens[:, 2:], actions.at[:, 2].set(0.0)[:, 2:], first[:, 2:], noise[:, 2:]
    )
    later = jax.tree.map(lambda x: x[:, 2:], whole)
    assert_equal_to_rounding(later, alone, 1e-6)
    by_zero_start = observed()(
        params, tokens, actions.at[:, 0].set(0.0), first.at[:, 0].set(False), noise, other
    )
    by_first = observed()(params, tokens, actions, first.at[:, 0].set(True), noise, start)
    assert_equal_to_rounding(by_first, by_zero_start, 1e-6)
    # what the layer makes of a masked action is not zero
    silent = jax.tree.map(lambda x: x, params)
    silent["core"]["x2"] = jax.tree.map(jnp.zeros_like, params["core"]["x2"])
    without = observed()(silent, tokens, actions, first, noise, start)
    assert np.abs(without.deter[:, 2] - whole.deter[:, 2]).max() > 1e-3


def test_the_core_is_a_dense_layer_with_a_mask():
    params = parameters()
    _, actions, _, _, start = sequence()
    made = jax.jit(lambda *x: rssm.core(*x, jnp.float32))(params, start, actions[:, 0])
    expected = jax.jit(reference.core)(params, start.deter, start.stoch, actions[:, 0])
    assert_equal_to_rounding(made, expected, 1e-5)
    matrix = jax.jit(reference.block_matrix)(params["core"]["gates"]["kernel"])
    assert np.count_nonzero(matrix) == matrix.size // SIZES.blocks


def test_actions_are_limited_in_the_core_alone():
    values = jnp.array([[-3.0, -1.0, 0.5], [0.0, 1.0, 100.0]])
    limited = jax.jit(rssm_cell.limited)
    np.testing.assert_allclose(limited(values), np.clip(values, -1, 1), atol=1e-7)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(rssm_cell.limited(x))))(values)
    np.testing.assert_allclose(slope, 1 / np.maximum(1, np.abs(values)), atol=1e-7)
    params, (tokens, actions, first, noise, start) = parameters(), sequence()
    made = observed()(params, tokens, actions, first, noise, start)
    clipped = observed()(params, tokens, jnp.clip(actions, -1, 1), first, noise, start)
    assert_equal_to_rounding(made, clipped, 1e-6)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_imagination_is_core_and_prior_by_hand(monkeypatch, backend):
    """All H steps, forward and, through the dynamics, backward."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    horizon, params = 3, parameters()
    _, _, _, _, start = sequence()
    noise = random((horizon, B, SIZES.stoch, SIZES.classes), 8)
    policy_noise = random((horizon + 1, B, 3), 9)
    mix = random((SIZES.deter, 3), 10, 0.3)

    def policy(deter, stoch, noise):
        return 2.0 * jnp.tanh(deter @ mix + noise) + stoch[:, :, 0]

    def dreamt(params):
        made = rssm.imagine(
            params, start, policy, (noise, policy_noise), horizon, dtype=jnp.float32
        )
        return jnp.sum(jnp.sin(made.deter)) + jnp.sum(made.actions), made

    def by_hand(params):
        deter, stoch = start
        states, actions = [(deter, stoch)], [policy(deter, stoch, policy_noise[0])]
        for h in range(horizon):
            deter = reference.core(params, deter, stoch, actions[h])
            raw = reference.prior(params, deter, SIZES.stoch)
            stoch = reference.sample(raw, noise[h], 0.01, False)
            states.append((deter, stoch))
            actions.append(policy(deter, stoch, policy_noise[h + 1]))
        deter, stoch = (jnp.stack(x) for x in zip(*states, strict=True))
        actions = jnp.stack(actions)
        made = rssm.Dreamt(deter, stoch, actions)
        return jnp.sum(jnp.sin(deter)) + jnp.sum(actions), made

    expected, made = (jax.jit(jax.grad(f, has_aux=True))(params) for f in (by_hand, dreamt))
    assert_equal_to_rounding(made, expected, 2e-5)
    assert made[1].deter.shape == (horizon + 1, B, SIZES.deter)
    np.testing.assert_array_equal(made[1].deter[0], start.deter)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_seeds_under_vmap_are_seeds_alone(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    noise = random((2, B, SIZES.stoch, SIZES.classes), 8)
    mix = random((SIZES.deter, 3), 10, 0.3)

    def run(params, inputs, share):
        def loss(params):
            made = rssm.observe(params, *inputs, share=share, dtype=jnp.float32)
            return jnp.sum(made.deter * jnp.cos(made.deter)) + jnp.sum(made.logits**2), made

        gradient, made = jax.grad(loss, has_aux=True)(params)
        last = rssm.State(made.deter[:, -1], made.stoch[:, -1])
        return gradient, rssm.imagine(
            params,
            last,
            lambda deter, stoch, noise: jnp.tanh(deter @ mix) + noise,
            (noise, jnp.zeros((3, B, 3))),
            2,
            share=share,
            dtype=jnp.float32,
        )

    many = [(parameters(seed), sequence(10 * seed), np.float32(0.1 * seed)) for seed in (1, 2)]
    together = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *x: jnp.stack(x), *many))
    alone = jax.jit(run)
    for seed, one in enumerate(many):
        here = jax.tree.map(lambda x, seed=seed: x[seed], together)
        assert_equal_to_rounding(here, alone(*one), 3e-5)


def test_bfloat16_computes_near_float32_and_keeps_gradients_in_float32():
    params, inputs = parameters(), sequence()

    def loss(params, dtype):
        made = rssm.observe(params, *inputs, dtype=dtype, share=0.01)
        return jnp.mean(made.deter.astype(jnp.float32) ** 2), made

    both = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (grads, made), (exact, expected) = both(params, "bfloat16"), both(params, "float32")
    assert made.deter.dtype == made.stoch.dtype == jnp.bfloat16
    assert made.logits.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
    first = np.s_[:, 0]  # later a class may be drawn otherwise
    np.testing.assert_allclose(
        np.float32(made.deter[first]), expected.deter[first], rtol=0, atol=0.05
    )
    for a, b in zip(jax.tree.leaves(grads["core"]), jax.tree.leaves(exact["core"]), strict=True):
        assert np.all(np.isfinite(a))
        assert np.linalg.norm(a) < 3 * np.linalg.norm(b) + 1e-3
    head = rssm_heads.head(params["reward"], made.deter, made.stoch, jnp.bfloat16)
    assert head.dtype == jnp.float32


@pytest.mark.parametrize("size", rssm_params.SIZES)
def test_every_size_has_its_shapes(size):
    sizes = rssm_params.sizes_of(size)
    if size != "nano":
        units = sizes.units
        assert sizes == (8 * units, units, units, 32, units // 16, units // 16, 8)
    obs = rssm_codec.parts_of(
        {"image": ArraySpec((64, 64, 3), "uint8"), "kind": ArraySpec((), "int32", 5)}
    )
    actions = (rssm_actions.ActionPart("action", 4, True),)
    latent = (sizes.stoch, sizes.classes)

    def run(key, obs_values, vectors, first, noise):
        params = rssm_params.init(key, sizes, obs, actions)
        tokens = rssm_codec.encode(params["enc"], obs_values, obs, jnp.float32)
        made = rssm.observe(params, tokens, vectors, first, noise)
        decoded = rssm_codec.decode(
            params["dec"], made.deter, made.stoch, obs, sizes.depth, jnp.float32
        )
        value = rssm_heads.head(params["critic"], made.deter, made.stoch, jnp.float32)
        return params, made, decoded, value

    def struct(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype)

    values = {"image": struct(2, 3, 64, 64, 3, dtype="uint8"), "kind": struct(2, 3, dtype="int32")}
    key = jax.eval_shape(jax.random.key, 0)
    params, made, decoded, value = jax.eval_shape(
        run, key, values, struct(2, 3, 4), struct(2, 3, dtype="bool"), struct(2, 3, *latent)
    )
    assert made.deter.shape == (2, 3, sizes.deter)
    assert made.stoch.shape == made.logits.shape == (2, 3, *latent)
    assert decoded["image"].shape == (2, 3, 64, 64, 3)
    assert decoded["kind"].shape == (2, 3, 5)
    assert value.shape == (2, 3, 255)
    assert params["core"]["hid"]["kernel"].shape[0] == 8


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"unknown size '12M'; did you mean '12m'"):
        rssm_params.sizes_of("12M")
    key = jax.random.key(0)
    with pytest.raises(InputError, match="deter = 30: expected a multiple of blocks = 4"):
        rssm_params.init(key, SIZES._replace(deter=30), OBS, ACTIONS)
    image = rssm_codec.parts_of(ArraySpec((8, 8, 1), "uint8"))
    with pytest.raises(InputError, match=r"depth = 3: a decoder of images needs multiples of 8"):
        rssm_params.init(key, SIZES._replace(depth=3), image, ACTIONS)
    without = functools.partial(rssm_params.init, decoder=False)
    assert "dec" not in jax.eval_shape(lambda key: without(key, SIZES, image, ACTIONS), key)


def test_unimix_has_a_floor():
    logits = np.array([[100.0, 0.0, -50.0, -1000.0], [1.0, 1.0, 1.0, 1.0]], np.float32)
    softmax = special.softmax(logits, -1)

    def unimix(share):
        return functools.partial(rssm_latents.unimix, share=share)

    for share in (0.01, np.float32(0.3), 1.0):
        prob = np.exp(jax.jit(unimix(share))(logits))
        assert prob.min() >= share / 4 * (1 - 1e-6)
        np.testing.assert_allclose(prob.sum(-1), 1, atol=1e-6)
        expected = (1 - share) * softmax + share / 4
        np.testing.assert_allclose(prob, expected, rtol=1e-5)
    for share in (0.0, np.float32(0.0)):
        plain = jax.jit(unimix(share))(logits)
        np.testing.assert_allclose(plain, special.log_softmax(logits, -1), rtol=1e-6)
        slope = jax.jit(jax.jacobian(unimix(share)))(logits[1])
        np.testing.assert_allclose(slope, np.eye(4) - 0.25, atol=1e-6)


def test_samples_are_one_hot_with_the_gradient_of_their_chances():
    logits = np.float32([[2.0, 0.0, -1.0, -8.0]]).repeat(20_000, 0)
    draw_noise = jax.jit(rssm_latents.draw_noise, static_argnums=1)
    noise = np.asarray(draw_noise(jax.random.key(1), logits.shape))
    drawn = np.asarray(jax.jit(rssm_latents.straight_through)(logits, noise, 0.2))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    np.testing.assert_array_equal(drawn.sum(-1), 1)
    prob = 0.8 * special.softmax(logits[0]) + 0.05
    np.testing.assert_allclose(drawn.mean(0), prob, atol=4 * 0.5 / np.sqrt(20_000))
    weight = random((4,), 2)

    def value(logits, f):
        return jnp.sum(f(logits) * weight)

    slope = jax.jit(jax.grad(value), static_argnums=1)
    straight = slope(logits[0], lambda x: rssm_latents.straight_through(x, noise[0], 0.2))
    smooth = slope(logits[0], lambda x: 0.8 * jax.nn.softmax(x))
    np.testing.assert_allclose(straight, smooth, atol=1e-6)


@pytest.mark.parametrize("gaussian", [False, True])
def test_divergence_and_entropy_are_those_of_the_samples(gaussian):
    """Against means over many samples."""
    num, raw = 100_000, [random((2, 6 if gaussian else 3), seed) for seed in (3, 4)]

    @jax.jit
    def draw(key, raw):
        noise = rssm_latents.draw_noise(key, (num, 2, 3), gaussian)
        return rssm_latents.sample(raw[None], noise, 0.1, gaussian)

    drawn = np.float64(draw(jax.random.key(2), raw[0]))
    unimix, normal = jax.jit(rssm_latents.unimix), jax.jit(rssm_latents.normal)

    def log_density(raw):
        if not gaussian:
            return np.sum(np.float64(unimix(raw, 0.1)) * drawn, (1, 2))
        mean, std = (np.float64(x) for x in normal(raw))
        terms = -0.5 * ((drawn - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        return np.sum(terms, (1, 2))

    p, q = log_density(raw[0]), log_density(raw[1])
    tolerance = 5 * (p - q).std() / np.sqrt(num)
    divergence = jax.jit(rssm_latents.kl, static_argnums=3)
    kl = divergence(*raw, 0.1, gaussian)
    np.testing.assert_allclose(kl, (p - q).mean(), atol=tolerance)
    entropy = jax.jit(rssm_latents.entropy, static_argnums=2)(raw[0], 0.1, gaussian)
    np.testing.assert_allclose(entropy, -p.mean(), atol=5 * p.std() / np.sqrt(num))
    np.testing.assert_allclose(divergence(raw[0], raw[0], 0.1, gaussian), 0, atol=1e-6)
