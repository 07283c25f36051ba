"""The world model against arrays of the published code (see golden/dreamer/README.md)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden, part, tree

from mbrl_jax.models import (
    rssm,
    rssm_actions,
    rssm_codec,
    rssm_heads,
    rssm_latents,
    rssm_params,
)
from mbrl_jax.types import ArraySpec, EnvSpec

FLOAT = jnp.float32


def paths(params):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(key.key for key in path): leaf for path, leaf in flat}


def assert_close(value, expected, tolerance=1e-5):
    """Relative to the largest magnitude of the array."""
    assert value.shape == expected.shape
    scale = max(np.abs(np.float64(expected)).max(), 1e-30)
    np.testing.assert_allclose(
        np.float64(value) / scale, np.float64(expected) / scale, rtol=0, atol=tolerance
    )


VECTOR = EnvSpec("robot", (24,), "float32", 100, action_low=(-1.0,) * 6, action_high=(1.0,) * 6)


def shapes(sizes, spec, **kwargs):
    obs, actions = rssm_codec.parts_of(spec.obs), rssm_actions.action_parts(spec)
    return jax.eval_shape(
        lambda key: rssm_params.init(key, sizes, obs, actions, **kwargs), jax.random.key(0)
    )


MODULES = {
    "1m": [10112, 273664, 45312, 45440, 51096, 57663, 41153, 50316, 66111],
    "12m": [138752, 4338688, 721920, 722432, 794136, 721407, 656129, 791052, 853503],
    "200m": [
        2127872, 69259264, 11538432, 11540480, 12613656, 10749183, 10488833, 12601356, 12850431,
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "count"), [("1m", 640_867), ("12m", 9_738_019), ("200m", 153_769_507)]
)
def test_the_parameters_are_as_many_as_published(size, count):
    params = shapes(rssm_params.SIZES[size], VECTOR)
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(module)) for name, module in params.items()
    }
    modules = ["enc", "core", "post", "prior", "dec", "reward", "cont", "actor", "critic"]
    assert counts == dict(zip(modules, MODULES[size], strict=True))
    assert sum(counts.values()) == count


def test_parameters_are_drawn_as_published():
    stats = golden("g0_init_stats")
    image = ArraySpec((64, 64, 3), "uint8")
    obs = rssm_codec.parts_of({"image": image, "vector": ArraySpec((24,), "float32")})
    actions = rssm_actions.action_parts(VECTOR)
    init = jax.jit(lambda key: rssm_params.init(key, rssm_params.SIZES["1m"], obs, actions))
    params = init(jax.random.key(3))
    drawn = paths(params)
    names = [name for name in stats["names"] if not name.startswith("slow_critic")]
    assert set(drawn) == set(names)
    for i, name in enumerate(stats["names"]):
        if name not in drawn:
            continue
        values, size = np.float64(drawn[name]), int(stats["size"][i])
        assert values.size == size, name
        if not name.endswith("kernel") or stats["std"][i] == 0:
            np.testing.assert_array_equal(values, stats["mean"][i], err_msg=name)
            continue
        scale = 0.01 if name.startswith("actor.out") else 1.0
        std = scale / np.sqrt(stats["fan_in"][i])
        # five standard errors of either draw
        assert abs(values.mean()) < 5 * std / np.sqrt(size), name
        assert abs(values.std() / std - 1) < 5 / np.sqrt(2 * size), name
        assert abs(stats["std"][i] / std - 1) < 5 / np.sqrt(2 * size), name
        # no entry beyond two deviations of the normal before the cut, and some near it
        assert np.abs(values).max() <= 2.2737 * std, name
        assert np.abs(values).max() > 2.0 * std or size < 500, name


PARTS = (
    rssm_codec.Part("angles", "vector", (2, 2)),
    rssm_codec.Part("flags", "discrete", (2,), 4),
    rssm_codec.Part("image", "image", (64, 64, 3)),
    rssm_codec.Part("kind", "discrete", (), 3),
    rssm_codec.Part("zpos", "vector", (3,)),
)
ACTIONS = (
    rssm_actions.ActionPart("force", 2, False),
    rssm_actions.ActionPart("move", 5, True),
)
SIZES = rssm_params.Sizes(128, 32, 32, 8, 4, 4, 8)


@pytest.fixture(scope="module")
def modules():
    """(what the published code gave, what this one gives) for each module on the same input."""
    data = golden("g1_modules")
    params, given = tree(part(data, "param.")), tree(part(data, "in."))

    def run(params, given):
        deter = given["deter"]
        stoch = jax.nn.one_hot(given["stoch_class"], 4, dtype=FLOAT)
        state = rssm.State(deter, stoch)
        action = rssm_actions.action_vector(given["action"], ACTIONS)
        noise = jnp.zeros_like(stoch)
        step = rssm.step(params, state, given["tokens"], action, given["reset"], noise, dtype=FLOAT)
        after = rssm.core(params, state, action, FLOAT)
        prior = rssm.prior_logits(params, after, 8, FLOAT)
        heads = {
            name: rssm_heads.head(params[name], deter, stoch, FLOAT)
            for name in ("reward", "critic", "slow_critic")
        }
        policy = rssm_actions.policy(rssm_heads.actor(params["actor"], deter, stoch, FLOAT))
        return {
            "enc.tokens": rssm_codec.encode(params["enc"], given["obs"], PARTS, FLOAT),
            "dec": rssm_codec.decode(params["dec"], deter, stoch, PARTS, 4, FLOAT),
            "core.action_vec": action,
            "core.deter_next": after,
            "post.deter_next": step.deter,
            "post.logits": step.logits,
            "post.logprob_mixed": rssm_latents.unimix(step.logits),
            "prior.logits": prior,
            "prior.logprob_mixed": rssm_latents.unimix(prior),
            "cont.logit": rssm_heads.continues(params["cont"], deter, stoch, FLOAT),
            **{f"{name}.logits": value for name, value in heads.items()},
            "policy": policy,
        }

    return data, jax.jit(run)(params, given)


@pytest.mark.parametrize(
    "name",
    [
        "enc.tokens", "core.deter_next", "post.deter_next", "post.logits", "post.logprob_mixed",
        "prior.logits", "prior.logprob_mixed", "cont.logit", "reward.logits", "critic.logits",
        "slow_critic.logits",
    ],
)  # fmt: skip
def test_modules_agree_with_the_published_code(modules, name):
    data, made = modules
    assert_close(made[name], data[f"out.{name}"])


def test_both_decoders_agree_with_the_published_code(modules):
    data, made = modules
    assert sorted(made["dec"]) == ["angles", "flags", "image", "kind", "zpos"]
    for name, value in made["dec"].items():
        assert_close(value, data[f"out.dec.{name}"])


def test_actions_agree_with_the_published_code(modules):
    data, made = modules
    assert_close(made["core.action_vec"], data["out.core.action_vec"], 1e-7)
    policy = made["policy"]
    assert_close(policy.mean["force"], data["out.actor.force.mean"])
    assert_close(policy.std["force"], data["out.actor.force.std"])
    assert_close(policy.log_probs["move"], jax.nn.log_softmax(data["out.actor.move.logits"]))
    vector = made["core.action_vec"]
    log_prob = rssm_actions.log_prob(policy, vector, ACTIONS)
    both = data["out.actor.force.logp"] + data["out.actor.move.logp"]
    assert_close(log_prob, both)
    both = data["out.actor.force.entropy"] + data["out.actor.move.entropy"]
    assert_close(rssm_actions.policy_entropy(policy), both)


@pytest.mark.parametrize("name", ["g3a_vector_discrete", "g3b_vector_continuous"])
def test_sequences_agree_with_the_published_code(name):
    """Encoder, posterior pass and imagination of a whole update, all draws given."""
    data = golden(name)
    params, discrete = tree(part(data, "param.")), name == "g3a_vector_discrete"
    obs = (rssm_codec.Part("vector", "vector", (7,)),)
    actions = (rssm_actions.ActionPart("action", 4 if discrete else 3, discrete),)
    draws = tree(part(data, "draw."))
    batch = tree(part(data, "batch."))

    def forced(classes):
        """Noise under which `classes` are drawn."""
        return 1e4 * jax.nn.one_hot(classes, 4, dtype=FLOAT)

    def run(params, batch, draws):
        tokens = rssm_codec.encode(params["enc"], {"vector": batch["vector"][:, 1:]}, obs, FLOAT)
        start = rssm.State(batch["stored_deter"][:, 0], batch["stored_stoch"][:, 0])
        before = rssm_actions.action_vector(batch["action"][:, :-1], actions)
        posterior = rssm.observe(
            params,
            tokens,
            before,
            batch["is_first"][:, 1:],
            forced(draws["posterior_class"]),
            start,
            dtype=FLOAT,
        )
        first = rssm.State(posterior.deter.reshape(12, -1), posterior.stoch.reshape(12, 8, 4))
        vectors = rssm_actions.action_vector(draws["imag_action"]["action"], actions)
        noise = (jnp.moveaxis(forced(draws["imag_prior_class"]), 0, 1), jnp.moveaxis(vectors, 0, 1))
        dreamt = rssm.imagine(
            params, first, lambda deter, stoch, given: given, noise, 15, dtype=FLOAT
        )
        return tokens, posterior, dreamt, rssm.prior_logits(params, dreamt.deter, 8, FLOAT)

    tokens, posterior, dreamt, prior = jax.jit(run)(params, batch, draws)
    assert_close(tokens, data["mid.tokens"])
    assert_close(posterior.deter, data["mid.deter"])
    assert_close(posterior.logits, data["mid.post_logits"])
    classes = np.asarray(posterior.stoch).argmax(-1)
    np.testing.assert_array_equal(classes, data["draw.posterior_class"])
    assert set(np.unique(posterior.stoch)) == {0.0, 1.0}
    assert_close(np.moveaxis(dreamt.deter[1:], 0, 1), data["mid.img_deter"])
    assert_close(np.moveaxis(prior[1:], 0, 1), data["mid.img_prior_logits"])
    classes = np.moveaxis(np.asarray(dreamt.stoch[1:]).argmax(-1), 0, 1)
    np.testing.assert_array_equal(classes, data["draw.imag_prior_class"])
    assert dreamt.actions.shape[:2] == (16, 12)
