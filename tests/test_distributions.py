"""Distributions of actions against distrax, scipy and slow float64 references."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from mbrl_jax.nn import distributions as dist

LOGITS = np.array([0.3, -1.0, -np.inf, 2.0, 0.0, -np.inf], np.float32)


def slow_log_prob(u, noise, log_std):
    """log N(u) - log(1 - tanh(u)**2), which is 2 (log 2 - |u| - log1p(exp(-2 |u|)))."""
    squash = 2 * (np.log(2) - np.abs(u) - np.log1p(np.exp(-2 * np.abs(u))))
    return np.sum(-0.5 * noise**2 - log_std - 0.5 * np.log(2 * np.pi) - squash, axis=-1)


def test_tanh_normal_is_finite_and_exact_where_tanh_saturates():
    rng = np.random.default_rng(0)
    mean = rng.uniform(-30, 30, size=(400, 2))
    mean[:5] = [[0, 0], [30, -30], [-30, -30], [1e-4, -1e-4], [9.1, -9.1]]
    log_std, noise = rng.uniform(-5, 1, size=mean.shape), rng.normal(size=mean.shape)
    mean, log_std, noise = map(np.float32, (mean, log_std, noise))

    def density(mean, log_std, noise):
        return dist.tanh_normal(mean, log_std).from_noise(noise)

    action, log_prob = jax.jit(density)(mean, log_std, noise)
    mean64, log_std64, noise64 = map(np.float64, (mean, log_std, noise))
    u = mean64 + np.exp(log_std64) * noise64
    assert np.abs(u).max() > 29
    np.testing.assert_allclose(action, np.tanh(u), rtol=1e-5, atol=1e-6)
    expected = slow_log_prob(u, noise64, log_std64)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=2e-5)
    grads = jax.jit(jax.grad(lambda *x: jnp.sum(density(*x)[1]), (0, 1)))(mean, log_std, noise)
    slope = 2 * np.tanh(u)  # of -log(1 - tanh(u)**2)
    np.testing.assert_allclose(grads[0], slope, rtol=1e-4, atol=1e-5)
    expected = slope * noise64 * np.exp(log_std64) - 1
    np.testing.assert_allclose(grads[1], expected, rtol=1e-4, atol=1e-5)
    through = jax.jit(jax.grad(lambda *x: jnp.sum(density(*x)[0]), (0, 1)))(mean, log_std, noise)
    assert all(np.isfinite(grad).all() for grad in through)


def test_density_of_tanh_normal_is_one_in_all_and_agrees_with_distrax():
    policy = dist.tanh_normal(jnp.array([0.4]), jnp.array([-0.3]))
    density = jax.jit(lambda action: jnp.exp(policy.log_prob(action[None])))
    total, _ = integrate.quad(lambda a: float(density(np.float32(a))), -1, 1, epsabs=1e-5)
    assert total == pytest.approx(1.0, abs=1e-3)
    rng = np.random.default_rng(1)
    noise = np.float32(rng.normal(size=(50, 3)))
    mean, log_std = np.float32([0.2, -0.5, 0.0]), np.float32([-1.0, -0.5, -2.0])

    @jax.jit
    def both(noise):
        policy = dist.tanh_normal(*(jnp.broadcast_to(x, (50, 3)) for x in (mean, log_std)))
        action, of_noise = policy.from_noise(noise)
        normal = distrax.MultivariateNormalDiag(policy.mean_before, jnp.exp(policy.log_std))
        theirs = distrax.Transformed(normal, distrax.Block(distrax.Tanh(), 1)).log_prob(action)
        saturated = policy.log_prob(jnp.array([[1.0, -1.0, 1.0]] * 50))
        return of_noise, policy.log_prob(action), theirs, policy.mode(), saturated

    of_noise, ours, theirs, mode, saturated = both(noise)
    np.testing.assert_allclose(ours, of_noise, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(theirs, of_noise, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(mode[0], np.tanh(mean), rtol=1e-6)
    assert np.isfinite(saturated).all()


def test_densities_and_entropies_equal_scipy():
    x, mean, std = np.random.default_rng(0).normal(size=(3, 4, 2))
    std = np.abs(std) + 0.1

    @jax.jit
    def normal(x, mean, std):
        policy = dist.diagonal_normal(mean, std)
        return policy.log_prob(x), policy.entropy()

    log_prob, entropy = normal(*map(np.float32, (x, mean, std)))
    expected = stats.norm.logpdf(x, mean, std).sum(-1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)
    expected = stats.norm.entropy(mean, std).sum(-1)
    np.testing.assert_allclose(entropy, expected, rtol=1e-5, atol=1e-5)

    @jax.jit
    def categorical(logits):
        policy = dist.categorical(logits)
        log_probs = jnp.stack([policy.log_prob(action) for action in range(5)])
        return policy.entropy(), log_probs, policy.mode()

    (entropy, log_probs, mode), p = categorical(LOGITS), special.softmax(np.float64(LOGITS))
    np.testing.assert_allclose(entropy, stats.entropy(p), rtol=1e-5)
    for action in (0, 1, 3, 4):
        np.testing.assert_allclose(log_probs[action], np.log(p[action]), rtol=1e-5)
    assert log_probs[2] == -np.inf
    assert mode == 3


def test_categorical_samples_have_their_probabilities():
    uniform = jax.random.uniform(jax.random.key(0), (100_000,))
    drawn = jax.jit(dist.sample_categorical)(jnp.broadcast_to(LOGITS, (100_000, 6)), uniform)
    assert drawn.dtype == jnp.int32
    counts, p = np.bincount(drawn, minlength=6), special.softmax(np.float64(LOGITS))
    assert stats.chisquare(counts[p > 0], 100_000 * p[p > 0]).pvalue > 1e-4


@pytest.mark.parametrize("num_actions", [6, 300])
def test_what_has_no_probability_is_never_drawn(num_actions):
    """At 0, just below 1, and where the sums of two neighbours meet."""
    rng = np.random.default_rng(0)
    logits = np.float32(rng.normal(size=(500, num_actions)))
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[:100, 0] = logits[100:200, -1] = -np.inf
    logits[:, 1] = 0.0
    sums = np.cumsum(special.softmax(np.float64(logits), axis=-1), axis=-1)
    draw = jax.jit(dist.sample_categorical)
    for nudge in np.arange(-4, 5) * 2.0**-24:
        uniform = np.clip(np.round(sums * 2**24) * 2.0**-24 + nudge, 0.0, 1 - 2.0**-24)
        uniform[:, 0], uniform[:, -1] = 0.0, 1 - 2.0**-24
        for column in range(0, num_actions, max(1, num_actions // 60)):
            drawn = np.asarray(draw(logits, np.float32(uniform[:, column])))
            assert np.isfinite(logits[np.arange(500), drawn]).all()
