"""Ensembles: mixture moments, disagreement, and every propagation against closed forms."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbrl_jax.models import dynamics, ensemble
from mbrl_jax.models.dynamics import Bounds, Config, Gaussian
from mbrl_jax.types import EnvSpec, InputError

SPEC = EnvSpec("toy", (2,), "float32", 100, action_low=(-1.0,), action_high=(1.0,))
LINEAR = Config(hidden=(), weight_decay=(0.0,), termination="never")


def gaussians(seed, members=4, num=6, k=3):
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(size=(members, num, k)), rng.uniform(0.1, 2.0, size=(members, num, k))
    return Gaussian(np.float32(mean), np.float32(var), np.full((members, num), np.nan, np.float32))


def test_members_predict_as_they_do_alone():
    many = ensemble.make(Config(hidden=(5,), weight_decay=(0.0,)), SPEC, 3, 2)
    params = jax.device_get(jax.jit(many.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)
    obs, action = np.float32(rng.normal(size=(7, 2))), np.float32(rng.normal(size=(7, 1)))
    got = jax.device_get(jax.jit(many.predict)(params, obs, action))
    assert got.mean.shape == (3, 7, 3)
    gaussian = jax.jit(many.dynamics.gaussian)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params.net)
        alone = gaussian(one, params.bounds, params.scaling, obs, action)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), got, alone
        )
    first, second = got.mean[0], got.mean[1]
    assert np.abs(first - second).max() > 0.01, "members begin differently"


def test_moments_are_those_of_the_mixture():
    members = gaussians(0)
    moments = jax.jit(ensemble.moments)
    got = jax.device_get(moments(members))
    rng = np.random.default_rng(1)
    which = rng.integers(0, 4, size=200_000)
    mean, std = np.asarray(members.mean)[which, 0], np.sqrt(np.asarray(members.var)[which, 0])
    drawn = mean + std * rng.normal(size=mean.shape)
    np.testing.assert_allclose(got.mean[0], drawn.mean(0), atol=0.02)
    np.testing.assert_allclose((got.aleatoric + got.epistemic)[0], drawn.var(0), rtol=0.02)
    same = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, axis=0), members)
    assert np.abs(moments(same).epistemic).max() < 1e-6


def slow_jensen_shannon(m1, v1, m2, v2):
    """The formula of MACURA's code as the specification gives it, one state."""
    va = 1 / (0.5 / v1 + 0.5 / v2)
    ma = va * (0.5 * m1 / v1 + 0.5 * m2 / v2)
    quadratic = 0.5 * m1 @ (m1 / v1) + 0.5 * m2 @ (m2 / v2) - ma @ (ma / va)
    logs = 0.5 * np.log(v1).sum() + 0.5 * np.log(v2).sum() - np.log(va).sum()
    return 0.5 * (quadratic + logs)


def test_scores_of_disagreement_equal_slow_ones():
    members = gaussians(2)
    mean, var = np.float64(members.mean), np.float64(members.var)
    pairs = list(itertools.combinations(range(4), 2))
    scores = jax.jit(lambda members: {name: f(members) for name, f in ensemble.SCORES.items()})
    scored = jax.device_get(scores(members))
    for b in range(6):
        std = np.std(mean[:, b], axis=0).mean()
        far = max(np.linalg.norm(mean[i, b] - mean[j, b]) for i, j in pairs)
        js = np.mean([slow_jensen_shannon(mean[i, b], var[i, b], mean[j, b], var[j, b])
                      for i, j in pairs])  # fmt: skip
        got = [scored[name][b] for name in ("std", "max_distance", "jensen_shannon")]
        np.testing.assert_allclose(got, [std, far, js], rtol=1e-4)
    same = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, axis=0), members)
    alone = jax.tree.map(lambda leaf: leaf[:1], members)
    for given in (same, alone):
        for name, score in scores(given).items():
            np.testing.assert_allclose(score, 0.0, atol=1e-6, err_msg=name)


@cache
def started(members):
    many = ensemble.make(LINEAR, SPEC, members, members)
    return many, jax.jit(many.init)(jax.random.key(0))


def linear(changes, variances, start_scale=1.0):
    """An ensemble whose member i moves s to s + changes[i] s, with variances[i] of noise."""
    many, params = started(len(changes))
    wide = Bounds(np.full(3, -30, np.float32), np.full(3, 30, np.float32))  # far: they bind nothing
    kernel, bias = np.zeros((len(changes), 3, 6)), np.zeros((len(changes), 6))
    for i, (change, var) in enumerate(zip(changes, variances, strict=True)):
        kernel[i, 0, 0], kernel[i, 1, 1] = change, -change
        bias[i, 3:] = np.log(var)
    net = {"params": {"Dense_0": {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}}}
    return many, params._replace(net=net, bounds=wide)


def predicted(model, params, obs, action, seed):
    """The model's prediction, from one program."""
    made = jax.jit(model.predict)(params, obs, action, jax.random.key(seed))
    return jax.device_get(made)


CHANGES, VARIANCES = (0.3, -0.2, 0.1), (0.01, 0.04, 0.02)
STEPS, START = 4, np.array([1.0, 2.0])


def closed_form(propagation):
    """Mean and variance of each dimension after STEPS steps from START."""
    factors = 1 + np.outer(CHANGES, [1, -1])  # [members, 2]
    noise = np.array(VARIANCES)[:, None]
    if propagation == "expectation":
        return START * factors.mean(0) ** STEPS, np.zeros(2)
    if propagation == "tsinf":
        mean = START * factors**STEPS
        var = noise * sum(factors ** (2 * i) for i in range(STEPS))
        return mean.mean(0), (var + mean**2).mean(0) - mean.mean(0) ** 2
    mean, square = START, START**2
    for _ in range(STEPS):
        mean, square = mean * factors.mean(0), square * (factors**2).mean(0) + noise.mean()
    return mean, square - mean**2


@pytest.mark.parametrize(
    "propagation", ["ts1", "tsinf", "expectation", "distribution", "moment_matching"]
)
def test_propagated_moments_equal_the_closed_form(propagation):
    many, params = linear(CHANGES, VARIANCES)
    # many small batches, since the rows of one block share their members
    batches, rows = 20_000, 9
    if propagation == "moment_matching":
        batches, rows = 20, 9_000

    def roll(key):
        def step(obs, t):
            action, now = jnp.zeros((rows, 1)), jax.random.fold_in(key, t)
            model = many.model(propagation, particles=rows)
            return model.predict(params, obs, action, now).next_obs, None

        start = jnp.broadcast_to(jnp.float32(START)[None], (rows, 2))
        return jax.lax.scan(step, start, jnp.arange(STEPS))[0]

    last = jax.jit(jax.vmap(roll))(jax.random.split(jax.random.key(1), batches))
    last = np.float64(last).reshape(-1, 2)
    mean, var = closed_form(propagation)
    effective = batches * (rows if propagation == "moment_matching" else 3)
    np.testing.assert_allclose(last.mean(0), mean, atol=5 * np.sqrt(var.max() / effective) + 1e-5)
    np.testing.assert_allclose(last.var(0), var, rtol=0.05, atol=1e-6)
    if propagation == "expectation":
        assert np.ptp(last, axis=0).max() < 1e-5


@pytest.mark.parametrize("num", [1, 2, 7, 12])
def test_ts1_gives_each_state_each_elite_equally_often_in_a_batch_of_any_size(num):
    many, params = linear((0.0, 1.0, 2.0, 3.0), (1e-12,) * 4)
    many = many._replace(num_elites=3)
    params = params._replace(elites=jnp.array([3, 0, 2]))
    for score in ("none", "std"):  # by blocks, and by evaluating all
        keys = jax.random.split(jax.random.key(5), 3_000)
        step = jax.vmap(
            lambda key, score=score: (
                many.sample(
                    params, jnp.ones((num, 2)), jnp.zeros((num, 1)), key, "ts1", score
                ).next_obs
            )
        )
        member = np.rint(np.asarray(jax.jit(step)(keys))[..., 0] - 1).astype(int)
        assert member.shape == (3_000, num)
        for row in range(num):
            count = np.bincount(member[:, row], minlength=4)
            assert count[1] == 0, "no elite"
            # four standard deviations of a binomial
            np.testing.assert_allclose(count[[0, 2, 3]], 1_000, atol=4 * np.sqrt(3_000 * 2 / 9))
        if num == 7 and score == "none":
            blocks = np.array([np.bincount(row, minlength=4) for row in member])
            assert blocks.max() == 3, "an equal split, but for the last block"


def test_tsinf_keeps_the_member_of_a_row():
    many, params = linear((0.0, 1.0, 2.0), (1e-12,) * 3)
    step = jax.jit(lambda key, score: many.sample(
        params, jnp.ones((8, 2)), jnp.zeros((8, 1)), key, "tsinf", score
    ).next_obs[:, 0], static_argnums=1)  # fmt: skip
    for score in ("none", "std"):
        for seed in range(5):
            got = np.rint(np.asarray(step(jax.random.key(seed), score))) - 1
            assert got.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("propagation", ["tsinf", "ts1"])
def test_a_large_batch_is_dealt_out_in_rounds_of_blocks(propagation, monkeypatch):
    monkeypatch.setattr(ensemble, "BLOCK_ROWS", 2)
    many, params = linear((0.0, 1.0, 2.0), (1e-12,) * 3)
    obs = np.arange(1, 17, dtype=np.float32)[:, None].repeat(2, axis=1)
    sample = jax.jit(many.sample, static_argnums=(4, 5))
    for score in ("none", "std") if propagation == "tsinf" else ("none",):
        key = jax.random.key(0)
        step = sample(params, obs, jnp.zeros((16, 1)), key, propagation, score)
        member = np.rint(np.asarray(step.next_obs / obs)[:, 0] - 1).astype(int)
        first = member[:6:2]
        assert sorted(first) == [0, 1, 2]
        assert member.tolist() == [*np.repeat(first, 2).tolist() * 3][:16]
        if propagation == "tsinf":
            assert first.tolist() == [0, 1, 2]


def test_disagreement_comes_with_the_prediction_only_where_it_is_asked_for():
    many, params = linear((0.0, 1.0), (1e-2,) * 2)
    obs, action = jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.zeros((2, 1))
    unit = params.scaling
    params = params._replace(scaling=unit._replace(y_std=jnp.array([2.0, 1.0, 1.0])))
    none = predicted(many.model("ts1"), params, obs, action, 0)
    assert not none.disagreement.any()
    got = predicted(many.model("ts1", "std"), params, obs, action, 0)
    # in standardised targets the change is 0 or obs, and its deviation over two members is half
    np.testing.assert_allclose(got.disagreement, [0.5 / 3, 1.5 / 3], rtol=1e-5)
    assert got.reward.shape == (2,)
    assert not got.terminated.any()


@cache
def judging():
    """Two members whose rewards and ends are known functions, and their parameters."""
    spec = EnvSpec(
        "toy", (2,), "float32", 100, action_low=(-1.0,), action_high=(1.0,),
        reward_fn=lambda obs, action, next_obs: 10.0 * next_obs[..., 0],
        termination_fn=lambda obs, action, next_obs: next_obs[..., 0] > 4.0,
    )  # fmt: skip
    cfg = Config(hidden=(), weight_decay=(0.0,), reward="known", termination="known")
    many = ensemble.make(cfg, spec, 2, 2)
    return many, jax.jit(many.init)(jax.random.key(0))


@pytest.mark.parametrize("propagation", ["ts1", "expectation", "moment_matching"])
def test_known_functions_judge_the_clipped_prediction(propagation):
    """What is stored is what was judged; an infinity is left as it is, and ends a rollout."""
    many, params = judging()
    scaling = params.scaling._replace(
        obs_low=jnp.array([-1.0, 0.0]), obs_high=jnp.array([1.0, 0.5])
    )
    bias = np.float32([[2.0, 0.0, -60.0, -60.0]] * 2)  # s' = s + (2, 0)
    net = {"params": {"Dense_0": {"kernel": jnp.zeros((2, 3, 4)), "bias": jnp.asarray(bias)}}}
    bounds = Bounds(*np.full((2, 2), -60, np.float32))
    params = params._replace(net=net, scaling=scaling, bounds=bounds)
    obs, idle = jnp.array([[-9.0, 0.2], [0.5, 9.0], [1.5, 0.0], [2.5, 0.0]]), jnp.zeros((4, 1))
    clipping = many.model(propagation, particles=4, clip_margin=1.0)
    got = predicted(clipping, params, obs, idle, 1)
    if propagation != "moment_matching":  # which mixes the four
        np.testing.assert_allclose(got.next_obs[:, 0], [-3.0, 2.5, 3.0, 3.0], rtol=1e-4)
        np.testing.assert_allclose(got.next_obs[:, 1], [0.2, 1.0, 0.0, 0.0], atol=1e-4)
        free = predicted(many.model(propagation), params, obs, idle, 1)
        assert free.terminated.tolist() == [False, False, False, True]
        assert not got.terminated.any()
    assert (got.next_obs >= np.array([[-3.0, -0.5]])).all()
    assert (got.next_obs <= np.array([[3.0, 1.0]])).all()
    np.testing.assert_allclose(got.reward, 10.0 * got.next_obs[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(got.terminated, got.next_obs[:, 0] > 4.0)
    if propagation == "ts1":
        params = params._replace(scaling=scaling._replace(y_mean=jnp.array([jnp.inf, 0.0])))
        got = predicted(many.model("ts1", clip_margin=1.0), params, obs, idle, 1)
        assert np.isinf(got.next_obs[:, 0]).all()


def test_an_untrained_ensemble_clips_nothing():
    many, params = linear((0.0, 1.0), (1e-2,) * 2)
    obs = jnp.array([[1e6, -1e6]])
    for margin in (0.0, 1.0):
        low, high = dynamics.obs_limits(params.scaling, margin)
        assert (low == -jnp.inf).all()
        assert (high == jnp.inf).all()
        model = many.model("expectation", clip_margin=margin)
        got = predicted(model, params, obs, jnp.zeros((1, 1)), 0)
        assert np.abs(got.next_obs).min() > 1e5


def test_elites_are_the_best_on_the_holdout():
    error = jnp.array([0.3, jnp.nan, 0.1, jnp.inf, 0.2])
    assert ensemble.elites(error, 3).tolist() == [2, 4, 0]
    with pytest.raises(InputError, match="count = 6: expected 1 to 5"):
        ensemble.elites(error, 6)


def test_bad_ensembles_are_refused():
    with pytest.raises(InputError, match="num_elites = 8: expected 1 to num_members = 7"):
        ensemble.make(LINEAR, SPEC, 7, 8)
    with pytest.raises(InputError, match="num_members = 0"):
        ensemble.make(LINEAR, SPEC, 0, 0)
    many, params = linear((0.0, 1.0), (1e-2,) * 2)
    with pytest.raises(InputError, match="unknown propagation 'ts2'; did you mean 'ts1'"):
        many.sample(params, jnp.ones((1, 2)), jnp.ones((1, 1)), jax.random.key(0), "ts2")
    with pytest.raises(InputError, match="unknown propagation 'ts2'; did you mean 'ts1'"):
        many.model("ts2")
    with pytest.raises(InputError, match="unknown score 'stdd'; did you mean 'std'"):
        many.model("ts1", "stdd")
    with pytest.raises(InputError, match="particles = 1: expected 2 or more for moment matching"):
        many.model("moment_matching")
    with pytest.raises(InputError, match="particles = 1: expected 2 or more for moment matching"):
        many.sample(
            params, jnp.ones((1, 2)), jnp.ones((1, 1)), jax.random.key(0), "moment_matching"
        )
    model = many.model("moment_matching", particles=3)
    with pytest.raises(InputError, match="particles = 3: expected a divisor of the 4 rows"):
        model.predict(params, jnp.ones((4, 2)), jnp.ones((4, 1)), jax.random.key(0))
    assert isinstance(many.dynamics, dynamics.Dynamics)
