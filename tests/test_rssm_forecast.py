"""Open-loop forecasts: seen as `observe` sees, foretold by core and prior alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probes import randomly

from mbrl_jax.models import rssm, rssm_actions, rssm_codec, rssm_forecast, rssm_latents, rssm_params
from mbrl_jax.types import EnvSpec, InputError

SIZES = rssm_params.Sizes(16, 8, 8, 4, 3, 4, 8)
SPEC = EnvSpec("toy", (3,), "float32", 100, num_actions=2)
OBS, ACTIONS = rssm_codec.parts_of(SPEC.obs), rssm_actions.action_parts(SPEC)
BATCH, LENGTH, CONTEXT = 5, 6, 2


@pytest.fixture(scope="module")
def given():
    shapes = jax.eval_shape(
        lambda key: rssm_params.init(key, SIZES, OBS, ACTIONS), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    first = np.zeros((BATCH, LENGTH), bool)
    first[:, 0] = True
    return {
        "params": randomly(shapes, 0),
        "obs": jnp.float32(rng.normal(size=(BATCH, LENGTH, 3))),
        "actions": jax.nn.one_hot(rng.integers(0, 2, (BATCH, LENGTH)), 2),
        "is_first": jnp.asarray(first),
        "key": jax.random.key(1),
    }


@jax.jit
def foretell(params, obs, actions, is_first, key):
    return rssm_forecast.forecast(
        params, obs, actions, is_first, key, CONTEXT, OBS, SIZES, dtype=jnp.float32
    )


def test_the_model_sees_the_context_and_nothing_after_it(given):
    made = foretell(**given)
    assert made.obs["obs"].shape == given["obs"].shape
    later = foretell(**given | {"obs": given["obs"].at[:, CONTEXT:].add(3.0)})
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(later), strict=True):
        np.testing.assert_array_equal(a, b)
    earlier = foretell(**given | {"obs": given["obs"].at[:, CONTEXT - 1].add(3.0)})
    assert np.abs(made.obs["obs"] - earlier.obs["obs"])[:, CONTEXT:].max() > 0


@pytest.mark.parametrize("at", [CONTEXT - 1, CONTEXT, LENGTH - 1])
def test_an_action_tells_from_its_own_observation_on(at, given):
    """`actions[:, t]` comes before `obs[:, t]`: the state at t is the first that knows of it."""
    made = foretell(**given)
    other = foretell(**given | {"actions": given["actions"].at[:, at].set(jnp.array([0.3, -0.8]))})
    apart = np.abs(made.deter - other.deter).max((0, 2))
    assert (apart[:at] == 0).all()
    assert apart[at] > 0


def test_the_steps_are_those_of_core_and_prior_by_hand(given):
    made = foretell(**given)
    params, keys = given["params"], jax.random.split(given["key"])
    shape = (SIZES.stoch, SIZES.classes)
    tokens = rssm_codec.encode(params["enc"], given["obs"], OBS, jnp.float32)
    noise = rssm_latents.draw_noise(keys[0], (BATCH, CONTEXT, *shape), False)
    state = rssm.zero_state((BATCH,), SIZES.deter, *shape, jnp.float32)
    for t in range(CONTEXT):
        step = rssm.step(
            params, state, tokens[:, t], given["actions"][:, t], given["is_first"][:, t],
            noise[:, t], dtype=jnp.float32,
        )  # fmt: skip
        state = rssm.State(step.deter, step.stoch)
    noise = rssm_latents.draw_noise(keys[1], (LENGTH - CONTEXT, BATCH, *shape), False)
    for t in range(CONTEXT, LENGTH):
        deter = rssm.core(params, state, given["actions"][:, t], jnp.float32)
        logits = rssm.prior_logits(params, deter, SIZES.stoch, jnp.float32)
        state = rssm.State(deter, rssm_latents.sample(logits, noise[t - CONTEXT], 0.01, False))
        np.testing.assert_allclose(made.deter[:, t], state.deter, atol=1e-5)
        np.testing.assert_array_equal(made.stoch[:, t].round(), state.stoch.round())


@pytest.mark.parametrize("context", [0, LENGTH, -1])
def test_a_context_leaves_something_to_see_and_to_foretell(context, given):
    with pytest.raises(InputError, match=f"context = {context}: expected 1 to 5"):
        rssm_forecast.forecast(**given, context=context, parts=OBS, sizes=SIZES)


def test_errors_count_what_is_reached():
    true = np.zeros((3, 4, 2), np.float32)
    said = true.copy()
    said[0, 2] = 0.4  # rounds to what came
    said[1, 2] = [1.0, 0.0]
    said[2, 3] = 9.0  # beyond its end
    valid = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
    made = rssm_forecast.forecast_errors(said, true, valid, 2)
    np.testing.assert_array_equal(made.num, [2, 1])
    np.testing.assert_allclose(made.mse, [(0.16 + 0.5) / 2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(made.accuracy, [0.75, 1.0])
