"""Training of ensembles: calibration, early stopping, the holdout, rows that are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import equations, loops
from scipy import stats

from mbrl_jax.models import dynamics, ensemble, fit
from mbrl_jax.models.dynamics import Config
from mbrl_jax.types import EnvSpec, InputError, Transition

SPEC = EnvSpec("toy", (1,), "float32", 100, action_low=(-1.0,), action_high=(1.0,))
NET = Config(hidden=(32, 32), weight_decay=(1e-5,), termination="never")
SMALL = Config(hidden=(8,), weight_decay=(0.0,), termination="never")
STEPS = fit.Config(mode="fixed_steps", steps=2_000, eval_every=100, batch_size=64)


def put(rows, where, value):
    """A copy with other numbers at some rows."""
    rows = rows.copy()
    rows[where] = value
    return rows


def noise_std(x):
    return 0.05 + 0.25 * np.abs(x)


def toy(seed, num, capacity=None):
    """s' = s + sin(3 s) + a / 2 + noise that grows with |s|; the reward is s^2, without noise."""
    rng = np.random.default_rng(seed)
    obs, action = rng.uniform(-1, 1, size=(2, num, 1))
    next_obs = obs + np.sin(3 * obs) + action / 2 + noise_std(obs) * rng.normal(size=obs.shape)
    flags = np.zeros(num, bool)
    rows = Transition(obs, action, obs[:, 0] ** 2, next_obs, flags, flags)
    spare = (capacity or num) - num

    def pad(leaf):
        leaf = leaf.astype(bool if leaf.dtype == bool else np.float32)
        return np.array(np.pad(leaf, [(0, spare)] + [(0, 0)] * (leaf.ndim - 1)))

    return jax.tree.map(pad, rows)


def trainer(config, net=SMALL, members=2, elites=1):
    """(data, size) -> what a training gives, compiled once; and the ensemble."""
    many = ensemble.make(net, SPEC, members, elites)

    @jax.jit
    def run(data, size, key):
        params = many.init(key)
        opt = many.init_opt(params)
        return many.fit(params, opt, config, data, size, jax.random.fold_in(key, 1))

    return many, lambda data, size: run(data, jnp.int32(size), jax.random.key(0))


def test_intervals_cover_and_the_two_kinds_of_uncertainty_are_told_apart():
    many, train = trainer(STEPS, NET, 5, 5)
    moments = jax.jit(lambda *x: ensemble.moments(many.predict(*x)))
    grid = np.linspace(-0.95, 0.95, 41, dtype=np.float32)[:, None]
    parts = {}
    for num in (60, 4_000):
        params, _, _ = train(toy(0, num, 4_000), num)
        parts[num] = jax.tree.map(np.asarray, moments(params, grid, np.zeros_like(grid)))
    test = toy(1, 5_000)
    mix = jax.tree.map(np.asarray, moments(params, test.obs, test.action))
    std = np.sqrt(mix.aleatoric + mix.epistemic)[:, 0]
    error = np.abs(test.next_obs - test.obs - mix.mean[:, :1])[:, 0]
    covered = np.mean(error <= stats.norm.ppf(0.95) * std)
    assert 0.85 <= covered <= 0.95
    few, much = (parts[num] for num in (60, 4_000))
    assert np.mean(much.epistemic[:, 0]) < 0.3 * np.mean(few.epistemic[:, 0])
    true = noise_std(grid[:, 0]) ** 2
    for part in (few, much):
        assert 0.6 < np.mean(part.aleatoric[:, 0]) / np.mean(true) < 1.5
    assert stats.spearmanr(much.aleatoric[:, 0], true).statistic > 0.9, "noise grows with |s|"


def replayed(curves, config):
    """When early stopping must have ended, and the best error of each member."""
    best, stale = np.full(curves.holdout.shape[1], np.inf), 0
    for number, now in enumerate(np.asarray(curves.holdout)):
        better = now < (1 - config.improvement) * best
        best = np.where(better, now, best)
        stale = 0 if better.any() else stale + 1
        if stale > config.patience:
            return number + 1, best
    return len(curves.holdout), best


def holdout_error(many, params, data):
    @jax.jit
    def errors(params, data):
        x, y = (
            many.dynamics.inputs(data.obs, data.action),
            many.dynamics.targets(data.obs, data.reward, data.next_obs),
        )
        scaling = params.scaling
        x = dynamics.standardised(x, scaling.x_mean, scaling.x_std)
        y = dynamics.standardised(y, scaling.y_mean, scaling.y_std)
        mean = jax.vmap(lambda net: many.dynamics.apply(net, params.bounds, x).mean)(params.net)
        return mean, y

    mean, y = map(np.asarray, errors(params, data))
    return np.mean((mean - y) ** 2, axis=(1, 2))


def test_early_stopping_ends_when_no_member_improves_and_keeps_each_at_its_best():
    config = fit.Config(max_epochs=60, patience=3, batch_size=32, learning_rate=0.02)
    many, train = trainer(config, members=3, elites=2)
    params, _, curves = jax.tree.map(np.asarray, train(toy(2, 300), 300))
    rounds, best = replayed(curves, config)
    assert curves.rounds == rounds < 60
    assert np.isnan(curves.holdout[rounds:]).all()
    assert np.isfinite(curves.holdout[:rounds]).all()
    assert params.elites.tolist() == np.argsort(best)[:2].tolist()
    last = np.asarray(curves.holdout[rounds - 1])
    assert (best <= last).all()
    assert (best < last).any(), "some member was better before the end"
    # the snapshot is of the whole member: its error over fresh rows is near its holdout error
    fresh = holdout_error(many, params, toy(3, 5_000))
    np.testing.assert_allclose(fresh, best, rtol=0.5)


def test_a_training_that_diverges_keeps_the_members_it_began_with():
    config = fit.Config(mode="fixed_steps", steps=20, eval_every=10, learning_rate=1e30)
    many, train = trainer(config)
    start = jax.jit(many.init)(jax.random.key(0))
    params, _, curves = train(toy(0, 100), 100)
    assert not np.isfinite(curves.holdout).any()
    jax.tree.map(np.testing.assert_array_equal, params.net, start.net)


def test_rows_beyond_the_size_and_rows_that_are_not_finite_are_not_seen():
    _, train = trainer(fit.Config(mode="fixed_steps", steps=30, eval_every=10, batch_size=16))
    data = toy(0, 50, 80)
    expected = train(data, 50)
    junk = data._replace(obs=put(data.obs, slice(50, None), np.nan),
                         reward=put(data.reward, 60, np.inf))  # fmt: skip
    got = train(junk, 50)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    bad = data._replace(reward=put(data.reward, [3, 7], np.nan))
    params, _, curves = train(bad, 50)
    assert curves.dropped == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params.net, curves)))
    differs = jax.tree.map(
        lambda a, b: (np.asarray(a) != np.asarray(b)).any(), params.net, expected[0].net
    )
    assert any(jax.tree.leaves(differs))


def test_a_growing_buffer_traces_once_and_seeds_under_vmap_are_seeds_alone():
    many = ensemble.make(SMALL, SPEC, 2, 1)
    config = fit.Config(max_epochs=4, batch_size=16)
    traces = []

    def run(data, size, key):
        traces.append(0)
        params = many.init(key)
        return many.fit(
            params, many.init_opt(params), config, data, size, jax.random.fold_in(key, 1)
        )

    one = jax.jit(run)
    for num in (30, 45, 80):
        one(toy(0, num, 80), jnp.int32(num), jax.random.key(num))
    assert len(traces) == 1
    keys = jax.random.split(jax.random.key(0), 3)
    data = toy(0, 64, 80)
    with jax.debug_key_reuse(False):
        many_seeds = jax.jit(jax.vmap(run, (None, None, 0)))(data, jnp.int32(64), keys)
    many_seeds = jax.tree.map(np.asarray, many_seeds)
    for i in range(3):
        alone = one(data, jnp.int32(64), keys[i])
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4),
            many_seeds, alone,
        )  # fmt: skip


def selected_in_gradient_steps(jaxpr, net):
    """(loops of gradient steps on `net` [S, E, ...], shapes of the parameters that they select).

    Gradient steps take Adam's square root of as many numbers as there are parameters. A loop whose
    condition differs by seed is lowered to one that selects all that it carries.
    """
    leaves = jax.tree.leaves(net)
    seeds, size = leaves[0].shape[0], sum(leaf.size for leaf in leaves)
    shapes, count, found = {leaf.shape for leaf in leaves}, 0, []
    for loop, body in loops(jaxpr):
        eqns = list(equations(body))
        roots = [e.outvars[0].aval.size for e in eqns if e.primitive.name == "sqrt"]
        if not any(size <= root < size + seeds * 100 for root in roots):
            continue
        count += 1
        chosen = [e.outvars[0].aval for e in eqns if e.primitive.name == "select_n"]
        if loop.primitive.name == "while" and loop.params["cond_jaxpr"].out_avals[0].shape:
            chosen += [var.aval for var in loop.outvars]
        found += [x.shape for x in chosen if x.shape in shapes or x.size >= size]
    return count, found


@pytest.mark.parametrize("mode", ["early_stopping", "fixed_steps"])
def test_a_gradient_step_of_vmapped_seeds_selects_no_parameters(mode):
    """Also where each seed leaves out another number of rows that are not finite."""
    net = Config(hidden=(13, 11), weight_decay=(1e-5,), termination="never")
    many = ensemble.make(net, SPEC, 3, 2)
    config = fit.Config(mode=mode, batch_size=7, max_epochs=3, steps=12, eval_every=5)
    data = toy(0, 50, 80)
    bad = np.arange(4)[:, None] * 5 > np.arange(80)[None]
    reward = np.where(bad, np.float32(np.nan), data.reward[None])  # 0, 5, 10 and 15 rows

    def run(reward, key, size):
        params = many.init(key)
        return many.fit(
            params, many.init_opt(params), config, data._replace(reward=reward), size,
            jax.random.fold_in(key, 1),
        )  # fmt: skip

    keys, size = jax.random.split(jax.random.key(0), 4), jnp.int32(50)
    seeds = jax.vmap(run, (0, 0, None))
    nets = jax.eval_shape(jax.vmap(many.init), keys).net
    jaxpr = jax.make_jaxpr(seeds)(reward, keys, size).jaxpr
    assert selected_in_gradient_steps(jaxpr, nets) == (1, [])
    with jax.debug_key_reuse(False):
        got = jax.tree.map(np.asarray, jax.jit(seeds)(reward, keys, size))
    assert got[2].dropped.tolist() == [0, 5, 10, 15]
    one = jax.jit(run)
    for i in range(4):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4),
            got, one(reward[i], keys[i], size),
        )  # fmt: skip


def test_the_holdout_is_evaluated_in_blocks_up_to_what_is_held(monkeypatch):
    """300 rows hold out 60: one block for each member and round, not the 5,000 rows at most."""
    monkeypatch.setattr(fit, "HOLDOUT_ROWS", 50)
    seen, apply = [], dynamics.Dynamics.apply

    def counted(self, net, bounds, x):
        if x.shape[0] != 7:  # the rows of a gradient step
            jax.debug.callback(lambda x: seen.append(x.shape[-2]), x)
        return apply(self, net, bounds, x)

    monkeypatch.setattr(dynamics.Dynamics, "apply", counted)
    config = fit.Config(mode="fixed_steps", steps=2, eval_every=1, batch_size=7)
    held = {num: num // 5 for num in (300, 80, 2_000)}
    data = {num: toy(0, num, 10_000) for num in held}
    _, train = trainer(config)
    errors = {}
    for num in held:
        seen.clear()
        curves = train(data[num], num)[2]
        jax.effects_barrier()
        assert curves.rounds == 2
        assert sum(seen) == 2 * 50 * -(-held[num] // 50)
        errors[num] = curves.holdout
    # the error that the blocks add up to is that of all held rows at once
    monkeypatch.setattr(fit, "HOLDOUT_ROWS", 10_000)
    _, train = trainer(config)
    for num in held:
        np.testing.assert_allclose(errors[num], train(data[num], num)[2].holdout, rtol=1e-5)


def test_bounds_of_the_variance_are_trained_within_their_range_or_frozen():
    data = toy(0, 200)
    wild = fit.Config(mode="fixed_steps", steps=200, eval_every=100, learning_rate=0.5)
    low, high = map(np.asarray, trainer(wild)[1](data, 200)[0].bounds)
    assert (low != -10.0).any()
    assert (low >= -12.0).all()
    assert (high <= 2.0).all()
    frozen = Config(**{**vars(SMALL), "learn_bounds": False})
    low, high = map(np.asarray, trainer(wild, frozen)[1](data, 200)[0].bounds)
    assert (low == -10.0).all()
    assert (high == 0.5).all()


def test_check_names_what_is_wrong_with_the_data():
    model, data = ensemble.make(SMALL, SPEC, 2, 1).dynamics, toy(0, 20)
    assert fit.check(model, fit.Config(), data, 20) == 0
    wrong = data._replace(action=np.zeros((20, 2)))
    with pytest.raises(InputError, match=r"data.action has shape \(20, 2\): expected \(20, 1\)"):
        fit.check(model, fit.Config(), wrong, 20)
    with pytest.raises(InputError, match="size = 21: expected 0 to 20"):
        fit.check(model, fit.Config(), data, 21)
    with pytest.raises(InputError, match=r"4 finite rows: too few for a holdout of 0\.2"):
        fit.check(model, fit.Config(), data, 4)
    bad = data._replace(next_obs=put(data.next_obs, 2, np.inf))
    with pytest.warns(UserWarning, match="1 of 20 rows of the data are not finite"):
        assert fit.check(model, fit.Config(), bad, 20) == 1
    with pytest.raises(InputError, match="1 of 20 rows of the data are not finite; leave them out"):
        fit.check(model, fit.Config(), bad, 20, refuse=True)
