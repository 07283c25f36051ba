"""Adam, its flat vector and rules of each tensor against slow float64 references."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import golden, part

from mbrl_jax.nn.optimiser import adam, clip_by_tensor, flat, laprop
from mbrl_jax.nn.schedules import warm_up


def slow_adam(theta, grads, rates, b1, b2, eps, longest, decay):
    """Kingma and Ba (2015), Algorithm 1; with `decay` Loshchilov and Hutter (2019), Algorithm 2."""
    m = v = np.zeros(len(theta))
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        grad = grad * min(1.0, longest / np.sqrt(np.sum(grad**2)))
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        move = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        theta = theta - rate * (move + decay * theta)
        yield theta


@pytest.mark.parametrize(("longest", "decay"), [(None, None), (0.7, None), (None, 0.1), (0.7, 0.1)])
def test_adam_equals_a_slow_one(longest, decay):
    rng = np.random.default_rng(0)
    theta, grads, rates = rng.normal(size=5), rng.normal(size=(8, 5)), 0.1 / np.arange(1, 9)
    grads *= 4.0 * np.arange(1, 9)[:, None] ** -1.5  # norms beyond 0.7 and later below it
    optimiser = partial(adam, b1=0.8, b2=0.95, eps=1e-3, max_grad_norm=longest, weight_decay=decay)

    @jax.jit
    def step(fast, state, grads, rate):
        moves, state = optimiser(rate).update(grads, state, fast)
        return jax.tree.map(jnp.add, fast, moves), state

    fast = {"a": jnp.float32(theta[:2]), "b": jnp.float32(theta[2:])}
    state = optimiser(0.0).init(fast)
    slow = slow_adam(theta, grads, rates, 0.8, 0.95, 1e-3, longest or np.inf, decay or 0.0)
    for grad, rate, expected in zip(grads, rates, slow, strict=True):
        grad = {"a": jnp.float32(grad[:2]), "b": jnp.float32(grad[2:])}
        fast, state = step(fast, state, grad, rate)
        got = np.concatenate([fast["a"], fast["b"]])
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_adam_equals_a_slow_one_for_every_seed_under_vmap():
    rng = np.random.default_rng(1)
    theta, grads = rng.normal(size=(3, 5)), rng.normal(size=(3, 4, 5))
    optimiser = adam(0.1, b1=0.8, b2=0.95, eps=1e-3)

    def tree(vector):
        return {"a": vector[..., :2], "b": vector[..., 2:]}

    def run(params, grads):
        def step(carry, grad):
            params, state = carry
            moves, state = optimiser.update(tree(grad), state, params)
            return (jax.tree.map(jnp.add, params, moves), state), None

        return jax.lax.scan(step, (params, optimiser.init(params)), grads)[0][0]

    many = jax.jit(jax.vmap(run))
    got = many(tree(jnp.float32(theta)), jnp.float32(grads))
    rates = [0.1] * 4
    slow = [list(slow_adam(t, g, rates, 0.8, 0.95, 1e-3, np.inf, 0.0))[-1]
            for t, g in zip(theta, grads, strict=True)]  # fmt: skip
    np.testing.assert_allclose(np.concatenate([got["a"], got["b"]], 1), slow, rtol=1e-4, atol=1e-5)
    text = many.lower(tree(jnp.float32(theta)), jnp.float32(grads)).as_text()
    assert "dynamic_update_slice" in text
    assert "scatter" not in text


PARAMS = {
    "torso": {"kernel": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4), "bias": jnp.zeros(4)},
    "scale": jnp.float32(0.3),
    "empty": jnp.zeros((0, 4)),
}


def gradients(number):
    return [
        jax.tree.map(
            lambda x, i=i: (
                jnp.sin(jnp.arange(x.size, dtype=jnp.float32) + 7.0 * i).reshape(x.shape)
                * 10.0 ** (i % 3)
            ),
            PARAMS,
        )
        for i in range(number)
    ]


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return request.param


def test_one_vector_holds_all_leaves_in_order_on_every_backend(backend):
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.bfloat16(-2.0), "c": jnp.zeros((0, 2))}
    vector = flat(tree)
    assert vector.dtype == jnp.float32
    assert vector.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, -2.0]
    text = jax.jit(lambda tree: flat(tree)).lower(PARAMS).as_text()  # not traced before
    assert ("dynamic_update_slice" in text) == (backend == "cpu")
    assert ("concatenate" in text) == (backend == "gpu")


def test_a_vector_of_many_leaves_is_written_in_groups(capfd):
    """XLA complains on stderr of a chain of more than 50 slices, and its errors are the user's."""
    leaves = [jnp.full((1, i % 3 + 1), float(i)) for i in range(100)]
    vector = jax.jit(lambda leaves: flat(leaves))(leaves)
    np.testing.assert_array_equal(vector, np.concatenate([x.ravel() for x in leaves]))
    assert "circular" not in capfd.readouterr().err


@pytest.mark.parametrize(("longest", "decay"), [(None, None), (0.7, 0.1)])
def test_a_step_and_its_state_are_the_same_on_every_backend(monkeypatch, longest, decay):
    """So that a checkpoint moves between devices."""

    def run(name):
        monkeypatch.setattr(jax, "default_backend", lambda: name)
        optimiser = adam(0.1, max_grad_norm=longest, weight_decay=decay)
        params, state = PARAMS, optimiser.init(PARAMS)
        for grads in gradients(4):
            # op by op: each program would round in its own way
            moves, state = optimiser.update(grads, state, params)
            params = optax.apply_updates(params, moves)
        return params, state

    (params, state), (theirs, other) = run("cpu"), run("gpu")
    assert jax.tree.structure(state) == jax.tree.structure(other)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, other)
    chex.assert_trees_all_close((params, state), (theirs, other), rtol=1e-6)
    assert not np.allclose(params["scale"], PARAMS["scale"])


def test_a_rule_of_each_tensor_stands_before_the_flat_part(backend):
    """Clipping by tensor, then RMS scaling, then momentum: the optimiser of DreamerV3."""
    optimiser = laprop(0.1, b1=0.8, b2=0.9)
    update = jax.jit(optimiser.update)
    params, state = PARAMS, optimiser.init(PARAMS)
    slow, structure = jax.tree.flatten(jax.tree.map(np.float64, PARAMS))
    nu, mu = ([np.zeros_like(x) for x in slow] for _ in range(2))
    short = set()
    for t, grads in enumerate(gradients(5), start=1):
        moves, state = update(grads, state, params)
        params = optax.apply_updates(params, moves)
        for i, g in enumerate(map(np.float64, jax.tree.leaves(grads))):
            longest = 0.3 * max(1e-3, np.linalg.norm(slow[i]))
            short.add(bool(np.linalg.norm(g) <= longest))
            g = g / max(1.0, np.linalg.norm(g) / longest)
            nu[i] = 0.9 * nu[i] + 0.1 * g**2
            mu[i] = 0.8 * mu[i] + 0.2 * g / (np.sqrt(nu[i] / (1 - 0.9**t)) + 1e-20)
            slow[i] = slow[i] - 0.1 * mu[i] / (1 - 0.8**t)
        chex.assert_trees_all_close(params, jax.tree.unflatten(structure, slow), rtol=1e-4)
    assert short == {True, False}
    vectors = [x.shape for x in jax.tree.leaves(state) if x.ndim]
    assert vectors == [(17,), (17,)], "the elementwise part keeps one vector of each moment"


@pytest.mark.parametrize(
    ("setting", "rate", "steps"),
    [("default", 4e-5, 1000.0), ("fast", 1e-2, 4.0), ("nowarm", 1e-2, 0.0)],
)
def test_laprop_with_its_warm_up_gives_the_authors_numbers(setting, rate, steps):
    """Ten updates, the first of which has a rate of zero."""
    got = golden("g2_optimiser")
    params = part(got, "param0.")
    state = laprop(0.0).init(params)

    @jax.jit
    def step(params, state, grads, n):
        moves, state = laprop(warm_up(rate, steps, n)).update(grads, state, params)
        return optax.apply_updates(params, moves), state, moves

    for n in range(10):
        params, state, moves = step(params, state, part(got, f"grad{n + 1}."), jnp.int32(n))
        expected = part(got, f"{setting}.update{n + 1}.")
        assert expected.keys() == params.keys()
        for name in expected:
            np.testing.assert_allclose(moves[name], expected[name], rtol=2e-5, atol=1e-5 * rate)
        if n == 0 and steps:
            assert not any(np.any(move) for move in moves.values())
        after = part(got, f"{setting}.params_after{n + 1}.")
        for name in after:
            np.testing.assert_allclose(params[name], after[name], rtol=1e-5, atol=1e-6)
    for moment in ("nu", "mu"):
        after = part(got, f"{setting}.{moment}_after10.")
        vector = np.concatenate([after[name].ravel() for name in sorted(params)])
        found = optax.tree_utils.tree_get(state, {"nu": "nu", "mu": "ema"}[moment])
        np.testing.assert_allclose(found, vector, rtol=1e-4, atol=1e-9)


def test_first_steps_of_the_smallest_gradients_are_the_authors():
    """Below 3e-18 the second moment is zero in float32, and the step is the gradient over 1e-20."""
    got = golden("g2_optimiser_underflow")
    params = {"w": jnp.ones(got["grad"].shape)}
    moves, _ = jax.jit(laprop(0.5).update)({"w": got["grad"]}, laprop(0.5).init(params), params)
    np.testing.assert_allclose(moves["w"], -0.5 * got["update_over_minus_lr"], rtol=1e-5)


def test_clipping_takes_the_norms_of_whole_tensors():
    got = golden("g2_optimiser")
    clip = clip_by_tensor(0.3, 1e-3)
    params = part(got, "param0.")
    for number in (1, 7):
        clipped, _ = clip.update(part(got, f"grad{number}."), clip.init(params), params)
        for name, expected in part(got, f"agc_of_grad{number}_at_param0.").items():
            np.testing.assert_allclose(clipped[name], expected, rtol=1e-5)
    changed = [name for name in params if not np.allclose(clipped[name], got[f"grad7.{name}"])]
    assert 0 < len(changed) < len(params)
