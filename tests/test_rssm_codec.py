"""Observations and actions of every kind through encoder, decoder, losses and policy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import randomly

import mbrl_jax
from mbrl_jax.models import rssm_actions, rssm_codec, rssm_heads, rssm_layers, rssm_params
from mbrl_jax.nn.two_hot import symlog
from mbrl_jax.types import ArraySpec, EnvSpec, InputError

SIZES = rssm_params.Sizes(32, 8, 16, 3, 4, 4, 4)
ACTIONS = (rssm_actions.ActionPart("action", 3, False),)
LEAD = (2, 3)
DICT = {
    "walls": ArraySpec((7, 10, 2), "bool"),
    "action_mask": ArraySpec((3,), "bool"),
    "speed": ArraySpec((), "float32"),
    "cards": ArraySpec((2, 2), "int32", 3),
    "count": ArraySpec((2,), "int32"),
    "heat": ArraySpec((7, 10, 1), "float32"),
    "camera": ArraySpec((7, 10, 3), "uint8"),
    "table": ArraySpec((2, 5, 4), "float32"),
}
SPECS = {
    "dict": DICT,
    "one number": ArraySpec((), "float32"),
    "state": ArraySpec((), "int32", 16),
    "two axes": ArraySpec((10, 5), "float32"),
    "small grid": ArraySpec((10, 10, 4), "float32"),
    "tiny image": ArraySpec((3, 5, 1), "uint8"),
    "odd image": ArraySpec((13, 19, 1), "uint8"),
}


def values(spec, seed=0):
    rng = np.random.default_rng(seed)
    if isinstance(spec, dict):
        return {name: values(part, i) for i, (name, part) in enumerate(spec.items())}
    shape = (*LEAD, *spec.shape)
    if spec.num is not None:
        return jnp.asarray(rng.integers(spec.num, size=shape), spec.dtype)
    drawn = {
        "bool": lambda: rng.random(shape) < 0.3,
        "uint8": lambda: rng.integers(256, size=shape),
        "int32": lambda: rng.integers(-5, 50, size=shape),
        "float32": lambda: 10 * rng.normal(size=shape),
    }
    return jnp.asarray(drawn[spec.dtype](), spec.dtype)


def parameters(parts):
    init = jax.eval_shape(
        lambda key: rssm_params.init(key, SIZES, parts, ACTIONS), jax.random.key(0)
    )
    return randomly(init, 0)


def latent(seed=0):
    rng = np.random.default_rng(seed)
    deter = jnp.asarray(rng.normal(size=(*LEAD, SIZES.deter)), jnp.float32)
    return deter, jax.nn.one_hot(rng.integers(4, size=(*LEAD, 3)), 4, dtype=jnp.float32)


@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_is_encoded_decoded_and_learned_from(kind):
    spec = SPECS[kind]
    parts = rssm_codec.parts_of(spec)
    params, obs, (deter, stoch) = parameters(parts), values(spec), latent()

    def loss(params, dtype):
        tokens = rssm_codec.encode(params["enc"], obs, parts, dtype)
        decoded = rssm_codec.decode(params["dec"], deter, stoch, parts, SIZES.depth, dtype)
        losses = rssm_codec.losses(decoded, obs, parts)
        total = sum(jnp.mean(x) for x in losses.values())
        return total + jnp.mean(tokens.astype(jnp.float32) ** 2), (tokens, decoded, losses)

    (_, (tokens, decoded, losses)), grads = jax.jit(
        jax.value_and_grad(loss, has_aux=True), static_argnums=1
    )(params, "float32")
    assert tokens.shape == (*LEAD, params["post"]["0"]["kernel"].shape[0] - SIZES.deter)
    assert set(decoded) == set(losses) == {part.name for part in parts}
    for part in parts:
        assert losses[part.name].shape == LEAD
        shape = (*part.shape, part.classes) if part.kind == "discrete" else part.shape
        assert decoded[part.name].shape == (*LEAD, *shape)
    for leaf in jax.tree.leaves((grads["enc"], grads["dec"])):
        assert np.all(np.isfinite(leaf))
        assert np.any(np.array(leaf))
    for name, made in rssm_codec.predictions(decoded, parts).items():
        assert made.shape == (*LEAD, *{part.name: part.shape for part in parts}[name])
    half = jax.eval_shape(lambda params: loss(params, "bfloat16")[1], params)
    assert half[0].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(half[1:])} == {np.dtype("float32")}


def test_kinds_of_a_dict_are_sorted_and_the_reserved_left_out():
    parts = rssm_codec.parts_of(DICT, binary=("heat",))
    assert [(part.name, part.kind, part.width) for part in parts] == [
        ("camera", "image", 3),
        ("cards", "discrete", 12),
        ("count", "vector", 2),
        ("heat", "binary", 1),
        ("speed", "vector", 1),
        ("table", "vector", 40),
        ("walls", "binary", 2),
    ]
    shuffled = rssm_codec.parts_of(dict(reversed(DICT.items())), binary=["heat"])
    assert shuffled == parts


def test_encoders_see_symlogs_one_hots_and_pixels_in_order():
    parts = rssm_codec.parts_of({k: DICT[k] for k in ("speed", "cards", "count", "walls", "heat")})
    obs = values({k: DICT[k] for k in ("speed", "cards", "count", "walls", "heat")})
    flat = [
        np.eye(3)[np.array(obs["cards"])].reshape(*LEAD, 12),
        np.sign(obs["count"]) * np.log1p(np.abs(np.float64(obs["count"]))),
        np.sign(obs["speed"])[..., None] * np.log1p(np.abs(np.float64(obs["speed"])))[..., None],
    ]
    params = parameters(parts)["enc"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 + 1 if path[-1].key == "norm_scale" else x, params
    )
    tokens = jax.jit(lambda params: rssm_codec.encode(params, obs, parts, jnp.float32))(params)
    x = jnp.asarray(np.concatenate(flat, -1), jnp.float32)
    expected = rssm_layers.mlp(params["vec"], x, jnp.float32)
    np.testing.assert_allclose(tokens[..., : SIZES.units], expected, atol=1e-5)
    # heat before walls, one stage of 3 x 3 to 4 x 5 places
    heat = np.sign(obs["heat"]) * np.log1p(np.abs(obs["heat"]))
    x = np.concatenate([heat, obs["walls"]], -1).reshape(6, 7, 10, 3)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    kernel = np.array(params["img"]["0"]["kernel"])
    assert kernel.shape == (3, 3, 3, 8)
    y = sum(padded[:, i : i + 7, j : j + 10] @ kernel[i, j] for i in range(3) for j in range(3))
    y = y + np.array(params["img"]["0"]["bias"])
    y = np.pad(y, [(0, 0), (0, 1), (0, 0), (0, 0)], constant_values=-np.inf)
    y = y.reshape(6, 4, 2, 5, 2, 8).max((2, 4))
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-4)
    expected = (y / (1 + np.exp(-y))).reshape(*LEAD, -1)
    np.testing.assert_allclose(tokens[..., SIZES.units :], expected, atol=1e-5)


def test_losses_are_those_of_the_kinds():
    parts = rssm_codec.parts_of(DICT)
    obs, rng = values(DICT), np.random.default_rng(5)
    decoded = {}
    for part in parts:
        shape = (*part.shape, part.classes) if part.kind == "discrete" else part.shape
        decoded[part.name] = rng.normal(size=(*LEAD, *shape)).astype(np.float32)
    decoded["camera"] = 1 / (1 + np.exp(-decoded["camera"]))
    made = rssm_codec.losses(decoded, obs, parts)
    obs = {name: np.array(x) for name, x in obs.items()}
    y = {name: np.float64(x) for name, x in decoded.items()}

    def squares(name, target):
        return ((y[name] - target) ** 2).reshape(*LEAD, -1).sum(-1)

    def symlog(x):
        return np.sign(x) * np.log1p(np.abs(np.float64(x)))

    for name in ("speed", "count", "heat", "table"):
        np.testing.assert_allclose(made[name], squares(name, symlog(obs[name])), rtol=1e-5)
    np.testing.assert_allclose(made["camera"], squares("camera", obs["camera"] / 255), rtol=1e-5)
    log_prob = y["cards"] - np.log(np.exp(y["cards"]).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_prob, obs["cards"][..., None], -1)[..., 0]
    np.testing.assert_allclose(made["cards"], -picked.sum((-2, -1)), rtol=1e-5)
    chance = 1 / (1 + np.exp(-y["walls"]))
    terms = np.where(obs["walls"], np.log(chance), np.log(1 - chance))
    np.testing.assert_allclose(made["walls"], -terms.sum((-3, -2, -1)), rtol=1e-5)


def test_predictions_are_in_the_units_of_observations():
    parts = rssm_codec.parts_of(DICT)
    obs = values(DICT)
    exact = {}
    for part in parts:
        x = np.float32(obs[part.name])
        if part.kind == "discrete":
            exact[part.name] = 9 * np.eye(part.classes, dtype=np.float32)[np.int32(x)]
        elif part.kind == "binary":
            exact[part.name] = 60 * x - 30
        elif part.kind == "image":
            exact[part.name] = x / 255
        else:
            exact[part.name] = symlog(x)
    for name, made in rssm_codec.predictions(exact, parts).items():
        np.testing.assert_allclose(made, np.float32(obs[name]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "binary"),
    [
        (ArraySpec((10, 5), "float32"), ["obs"]),
        (ArraySpec((4,), "int32"), ["obs"]),
        (ArraySpec((), "bool"), []),
        (ArraySpec((2, 3), "bool"), []),
    ],
)
def test_bits_are_numbers_going_in_and_chances_coming_out(spec, binary):
    (part,) = parts = rssm_codec.parts_of(spec, binary)
    assert (part.kind, part.width, part.spatial) == ("bits", math.prod(spec.shape), False)
    obs = jnp.asarray(np.random.default_rng(0).random((*LEAD, *spec.shape)) < 0.3, spec.dtype)
    params = parameters(parts)["enc"]
    tokens = jax.jit(lambda params: rssm_codec.encode(params, obs, parts, jnp.float32))(params)
    flat = jnp.asarray(np.array(obs).reshape(*LEAD, -1), jnp.float32)
    np.testing.assert_allclose(tokens, rssm_layers.mlp(params["vec"], flat, jnp.float32), atol=1e-5)
    logits = np.random.default_rng(1).normal(size=obs.shape).astype(np.float32)
    chance = 1 / (1 + np.exp(-np.float64(logits)))
    np.testing.assert_allclose(
        rssm_codec.predictions({"obs": logits}, parts)["obs"], chance, rtol=1e-5
    )
    terms = -np.where(np.array(obs) != 0, np.log(chance), np.log(1 - chance))
    np.testing.assert_allclose(
        rssm_codec.losses({"obs": logits}, obs, parts)["obs"],
        terms.reshape(*LEAD, -1).sum(-1),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("side", "sides", "kernel", "channels"),
    [
        ((64, 64), [(64, 64), (32, 32), (16, 16), (8, 8), (4, 4)], 5, (2, 3, 4, 4)),
        ((10, 10), [(10, 10), (5, 5)], 3, (2,)),
        ((30, 40), [(30, 40), (15, 20), (8, 10), (4, 5)], 3, (2, 3, 4)),
        ((3, 5), [(3, 5), (3, 5)], 3, (2,)),
    ],
)
def test_stages_follow_the_size(side, sides, kernel, channels):
    part = rssm_codec.Part("x", "image", (*side, 3))
    plan = rssm_codec.stages([part], 1)
    assert plan == rssm_codec.Stages(tuple(sides), channels, kernel)


@pytest.mark.parametrize(
    ("obs", "binary", "message"),
    [
        (ArraySpec((4, 8, 8, 3), "uint8"), (), r"cannot encode the observation 'obs' of shape \(4"),
        ({"a": ArraySpec((0,), "float32")}, (), r"cannot encode the observation 'a' of shape \(0,"),
        (ArraySpec((2,), "complex64"), (), "cannot encode .* dtype complex64; expected numbers"),
        (ArraySpec((2,), "text"), (), "cannot encode .* dtype text; expected numbers"),
        (
            {"a": ArraySpec((8, 8, 3), "uint8"), "b": ArraySpec((16, 8, 1), "bool")},
            (),
            "one size; here are 'a' 8 x 8, 'b' 16 x 8",
        ),
        ({"action_mask": ArraySpec((3,), "bool")}, (), "nothing to encode in an observation"),
        (
            {"a": ArraySpec((3,), "float32"), "b": ArraySpec((3,), "int32", 2)},
            ("b",),
            r"'b' is to be binary; arrays of numbers without a count are here \['a'\]; name one",
        ),
        (ArraySpec((8, 8, 3), "uint8"), ("observation",), r"'observation' is to .* \['obs'\]"),
    ],
)
def test_what_cannot_be_encoded_is_named(obs, binary, message):
    with pytest.raises(InputError, match=message):
        rssm_codec.parts_of(obs, binary)


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        ("CartPole-v1", "vector"),
        ("Catch-bsuite", "vector"),
        ("DeepSea-bsuite", "vector"),
        ("FrozenLake-misc", "discrete"),
        ("Breakout-MinAtar", "grid"),
        ("Pong-misc", "grid"),
    ],
)
def test_environments_have_their_kinds(env, kind):
    spec = mbrl_jax.make_env(env).spec
    (part,) = rssm_codec.parts_of(spec.obs)
    assert (part.name, part.kind, part.shape) == ("obs", kind, spec.obs_shape)
    if kind != "discrete":
        named = {"grid": "binary", "vector": "bits"}[kind]
        assert rssm_codec.parts_of(spec.obs, binary=["obs"])[0].kind == named
    (action,) = rssm_actions.action_parts(spec)
    assert action == ("action", spec.num_actions, True)


MIXED = (rssm_actions.ActionPart("force", 2, False), rssm_actions.ActionPart("move", 5, True))


def test_actions_of_several_parts_are_one_vector():
    actions = {"move": jnp.array([3, 0]), "force": jnp.array([[0.5, -2.0], [0.0, 1.0]])}
    vector = rssm_actions.action_vector(actions, MIXED)
    expected = [[0.5, -2, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(vector, expected)
    assert rssm_actions.action_width(MIXED) == 7
    back = rssm_actions.split_actions(vector, MIXED)
    assert back.keys() == actions.keys()
    jax.tree.map(np.testing.assert_array_equal, back, actions)
    spec = EnvSpec("a", (1,), "float32", 9, action_low=(-1.0, 0.0), action_high=(1.0, 2.0))
    alone = rssm_actions.action_parts(spec)
    assert alone == (("action", 2, False),)
    np.testing.assert_array_equal(
        rssm_actions.split_actions(actions["force"], alone), actions["force"]
    )


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_policy_samples_what_it_says(share):
    """Frequencies, moments, densities and entropies over many samples."""
    num, raw = 50_000, np.random.default_rng(0).normal(size=9).astype(np.float32)
    outputs = {
        "force": {"mean": raw[None, :2], "std": raw[None, 2:4]},
        "move": {"logits": raw[None, 4:]},
    }
    policy = rssm_actions.policy(outputs, share)
    noise = rssm_actions.draw_action_noise(jax.random.key(0), (num,), MIXED)
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (num, x.shape[-1])), policy)
    vector = np.float64(rssm_actions.sample_action(many, noise, MIXED))
    chance = (1 - share) * np.exp(raw[4:]) / np.exp(raw[4:]).sum() + share / 5
    np.testing.assert_allclose(vector[:, 2:].mean(0), chance, atol=0.01)
    mean, std = np.tanh(raw[:2]), 0.1 + 0.9 / (1 + np.exp(-raw[2:4] - 2))
    np.testing.assert_allclose(vector[:, :2].mean(0), mean, atol=0.02)
    np.testing.assert_allclose(vector[:, :2].std(0), std, rtol=0.02)
    log_prob = np.float64(rssm_actions.log_prob(many, jnp.asarray(vector, jnp.float32), MIXED))
    terms = -0.5 * ((vector[:, :2] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    expected = terms.sum(-1) + np.log(vector[:, 2:] @ chance)
    np.testing.assert_allclose(log_prob, expected, atol=1e-4)
    entropy = rssm_actions.policy_entropy(policy)
    np.testing.assert_allclose(entropy, -log_prob.mean(), atol=0.02)
    mode = rssm_actions.sample_action(policy, jnp.zeros((1, 7)), MIXED)
    np.testing.assert_allclose(mode[0, :2], mean, rtol=1e-5)
    assert mode[0, 2:].argmax() == chance.argmax()


def test_heads_read_deter_before_stoch():
    parts = rssm_codec.parts_of(SPECS["two axes"])
    params = parameters(parts)
    deter, stoch = latent()
    feature = jnp.concatenate([deter, stoch.reshape(*LEAD, -1)], -1)
    x = rssm_layers.layer(params["cont"]["0"], feature, jnp.float32)
    expected = rssm_layers.dense(params["cont"]["out"], x, jnp.float32)[..., 0]
    made = rssm_heads.continues(params["cont"], deter, stoch, jnp.float32)
    np.testing.assert_allclose(made, expected, atol=1e-6)
    assert rssm_heads.head(params["reward"], deter, stoch, jnp.float32).shape == (*LEAD, 255)
    (outputs,) = rssm_heads.actor(params["actor"], deter, stoch, jnp.float32).values()
    assert {name: x.shape for name, x in outputs.items()} == {"mean": (*LEAD, 3), "std": (*LEAD, 3)}
    cast = rssm_layers.cast_kernels(params, jnp.bfloat16)
    dtypes = {path[-1].key: x.dtype for path, x in jax.tree_util.tree_leaves_with_path(cast)}
    assert dtypes == {"kernel": jnp.bfloat16, "bias": jnp.float32, "norm_scale": jnp.float32}
