"""One dynamics network against slow float64 code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mbrl_jax.models import dynamics
from mbrl_jax.models.dynamics import Bounds, Config
from mbrl_jax.types import EnvSpec, InputError

SPEC = EnvSpec("toy", (3,), "float32", 100, action_low=(-1.0,), action_high=(1.0,))
DISCRETE = EnvSpec("toy", (3,), "float32", 100, num_actions=4)


def rows(seed, num, action_dim=1):
    rng = np.random.default_rng(seed)
    obs, action = rng.normal(size=(num, 3)), rng.uniform(-1, 1, size=(num, action_dim))
    return np.float32(obs), np.float32(action), np.float32(obs + rng.normal(size=obs.shape))


def slow_bounds(raw, low, high):
    raw = high - np.logaddexp(0, high - raw)
    return low + np.logaddexp(0, raw - low)


def slow_net(net, x, activation):
    layers = net["params"]
    for i in range(len(layers)):
        x = x @ np.float64(layers[f"Dense_{i}"]["kernel"]) + np.float64(
            layers[f"Dense_{i}"]["bias"]
        )
        x = activation(x) if i < len(layers) - 1 else x
    return x


def swish(x):
    return x / (1 + np.exp(-x))


def test_inputs_and_targets_of_every_kind():
    obs, action, next_obs = rows(0, 5)
    reward = np.arange(5, dtype=np.float32)
    plain = dynamics.make(Config(hidden=(4,), weight_decay=(0.0,)), SPEC)
    np.testing.assert_array_equal(plain.inputs(obs, action), np.concatenate([obs, action], 1))
    got = plain.targets(jnp.array(obs), jnp.array(reward), jnp.array(next_obs))
    np.testing.assert_allclose(got, np.concatenate([next_obs - obs, reward[:, None]], 1))
    cfg = Config(hidden=(4,), weight_decay=(0.0,), angles=(1,), direct=(0, 2))
    model = dynamics.make(cfg, DISCRETE)
    which = np.array([0, 3, 1, 2, 2])
    expected = [obs[:, [0, 2]], np.sin(obs[:, [1]]), np.cos(obs[:, [1]]), np.eye(4)[which]]
    got = model.inputs(jnp.array(obs), jnp.array(which))
    np.testing.assert_allclose(got, np.concatenate(expected, 1), rtol=1e-6)
    assert (model.num_inputs, model.num_targets) == (8, 4)
    y = model.targets(jnp.array(obs), jnp.array(reward), jnp.array(next_obs))
    np.testing.assert_allclose(y[:, 0], next_obs[:, 0])
    np.testing.assert_allclose(y[:, 1], next_obs[:, 1] - obs[:, 1])
    back = model.outcome(jnp.array(obs), jnp.array(which), y, jnp.array([1.0, -1, 0, 9, -9]))
    np.testing.assert_allclose(back[0], next_obs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(back[1], reward)
    assert back[2].tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("probabilistic", [True, False])
@pytest.mark.parametrize("termination", ["learned", "never"])
def test_prediction_and_loss_equal_slow_ones(probabilistic, termination):
    cfg = Config(
        hidden=(6, 5), weight_decay=(0.1, 0.2, 0.3), probabilistic=probabilistic,
        termination=termination,
    )  # fmt: skip
    model = dynamics.make(cfg, SPEC)
    net = model.init(jax.random.key(3))
    net = jax.tree.map(lambda leaf: leaf + 0.3, net)
    bounds = Bounds(jnp.linspace(-3.0, -1.0, 4), jnp.linspace(0.0, 2.0, 4))
    obs, action, next_obs = rows(1, 7)
    reward, terminated = np.float32(np.arange(7) / 3), np.float32(np.arange(7) % 2)
    x = jnp.asarray(model.inputs(obs, action))
    y = model.targets(jnp.array(obs), jnp.array(reward), jnp.array(next_obs))
    out = slow_net(net, np.float64(x), swish)
    assert out.shape[1] == (8 if probabilistic else 4) + (termination == "learned")
    mean, logvar = out[:, :4], np.zeros((7, 4))
    if probabilistic:
        logvar = slow_bounds(out[:, 4:8], *map(np.float64, bounds))
        assert np.all((logvar > np.asarray(bounds.low)) & (logvar < np.asarray(bounds.high)))
    expected = np.mean((mean - np.asarray(y)) ** 2 * np.exp(-logvar) + logvar)
    if termination == "learned":
        p = 1 / (1 + np.exp(-out[:, -1]))
        expected -= np.mean(terminated * np.log(p) + (1 - terminated) * np.log(1 - p))
    layers = [np.float64(net["params"][f"Dense_{i}"]["kernel"]) for i in range(3)]
    expected += sum(0.5 * c * np.sum(w**2) for c, w in zip((0.1, 0.2, 0.3), layers, strict=True))
    got = model.loss(net, bounds, x, y, jnp.array(terminated))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    unit = model.scaling()
    scaling = unit._replace(
        x_mean=unit.x_mean + 0.5,
        x_std=2 * unit.x_std,
        y_mean=unit.y_mean - 1.0,
        y_std=3 * unit.y_std,
    )
    said = model.gaussian(net, bounds, scaling, jnp.array(obs), jnp.array(action))
    out = slow_net(net, (np.float64(x) - 0.5) / 2, swish)
    np.testing.assert_allclose(said.mean, 3 * out[:, :4] - 1, rtol=1e-4, atol=1e-5)
    if probabilistic:
        logvar = slow_bounds(out[:, 4:8], *map(np.float64, bounds))
        np.testing.assert_allclose(said.var, 9 * np.exp(logvar), rtol=1e-4)
    else:
        assert not said.var.any()


def test_gradients_of_the_loss_are_those_of_finite_differences():
    model = dynamics.make(Config(hidden=(4,), weight_decay=(0.1,)), SPEC)
    obs, action, next_obs = (jnp.array(part) for part in rows(2, 6))
    x, y = model.inputs(obs, action), model.targets(obs, obs[:, 0], next_obs)
    end = jnp.array([0.0, 1, 0, 0, 1, 0])
    args = (model.init(jax.random.key(0)), Bounds(jnp.full(4, -2.0), jnp.full(4, 0.5)))

    def loss(args):
        return model.loss(*args, x, y, end)

    check_grads(loss, (args,), order=1, modes="rev", atol=2e-2, rtol=2e-2, eps=1e-2)


def test_known_functions_answer_in_place_of_the_network():
    spec = EnvSpec(
        "toy", (3,), "float32", 100, action_low=(-1.0,), action_high=(1.0,),
        reward_fn=lambda obs, action, next_obs: obs[..., 0] + action[..., 0] + next_obs[..., 1],
        termination_fn=lambda obs, action, next_obs: next_obs[..., 2] > 0,
    )  # fmt: skip
    cfg = Config(hidden=(4,), weight_decay=(0.0,), reward="known", termination="known")
    model = dynamics.make(cfg, spec)
    assert model.num_targets == 3
    obs, action, next_obs = (jnp.array(part) for part in rows(3, 6))
    y = model.targets(obs, jnp.zeros(6), next_obs)
    got = model.outcome(obs, action, y, jnp.full(6, jnp.nan))
    np.testing.assert_allclose(got[0], next_obs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], obs[:, 0] + action[:, 0] + got[0][:, 1], rtol=1e-6)
    np.testing.assert_array_equal(got[2], got[0][:, 2] > 0)


def test_scaling_standardises_the_weighted_rows_and_leaves_constants_alone():
    model = dynamics.make(Config(hidden=(4,), weight_decay=(0.0,)), SPEC)
    rng = np.random.default_rng(4)
    obs = np.float32(rng.normal(size=(50, 3)) * [1e-3, 10.0, 0.0] + [1.0, -3.0, 1e4])
    x, y = np.concatenate([obs, obs[:, :1]], 1), np.concatenate([obs, obs[:, 1:2]], 1)
    weight = np.float32(np.arange(50) < 40)
    got = dynamics.fit_scaling(model, *map(jnp.array, (obs, x, y, weight)))
    np.testing.assert_allclose(got.x_mean, x[:40].mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(got.x_std)[[0, 1, 3]], x[:40, [0, 1, 3]].std(0), rtol=1e-3
    )
    assert got.x_std[2] == 1.0
    np.testing.assert_array_equal(got.obs_low, obs[:40].min(0))
    np.testing.assert_array_equal(got.obs_high, obs[:40].max(0))
    off = dynamics.make(Config(hidden=(), weight_decay=(0.0,), normalise_targets=False), SPEC)
    got = dynamics.fit_scaling(off, *map(jnp.array, (obs, x, y, weight)))
    assert not got.y_mean.any()
    assert (got.y_std == 1).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"direct": (3,)}, "direct = (3,): expected different dimensions"),
        ({"angles": (1, 1)}, "angles = (1, 1)"),
        ({"weight_decay": (0.1, 0.1)}, "one for each of the 5 layers"),
        ({"weight_decay": (-0.1,)}, "weight_decay = (-0.1,): expected a value in [0, inf)"),
        ({"reward": "known"}, "toy has no known reward function; take reward='learned'"),
        ({"termination": "known"}, "toy has no known termination function"),
        ({"hidden": (0,)}, "hidden = (0,)"),
    ],
)
def test_bad_configs_are_refused(fields, words):
    with pytest.raises(InputError) as error:
        dynamics.make(Config(**fields), SPEC)
    assert words in str(error.value)


def test_other_observations_are_refused():
    with pytest.raises(InputError, match="float32 vectors; grid has shape"):
        dynamics.make(Config(), EnvSpec("grid", (4, 4), "float32", 9, num_actions=2))
