"""The losses of Dreamer against the authors' numbers and slow float64 definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden, part

from mbrl_jax.agents import dreamer_losses as losses
from mbrl_jax.models import rssm_latents
from mbrl_jax.nn import normaliser
from mbrl_jax.nn.networks import polyak
from mbrl_jax.nn.returns import lambda_returns
from mbrl_jax.nn.two_hot import symexp_bins, two_hot_mean

GAMMA, LAM = 1 - 1 / 333, 0.95


def close(found, expected, tolerance=1e-5):
    """Within `tolerance` of the largest magnitude."""
    scale = max(np.abs(expected).max(), 1e-30)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def in_time(x):
    """[N, T, ...] as [T, N, ...]"""
    return np.moveaxis(x, 0, 1)


# returns


def slow_returns(reward, discount, value, lam):
    """As weighted sums of n-step returns, each from its definition; [T] float64 lists."""
    steps = len(reward)

    def n_step(start, n):
        total, factor = 0.0, 1.0
        for k in range(start, start + n):
            total += factor * reward[k]
            factor *= discount[k]
        return total + factor * value[start + n - 1]

    returns = []
    for start in range(steps):
        total, weight = 0.0, 1.0
        for n in range(1, steps - start + 1):
            stop = 1.0 if start + n == steps else 1.0 - lam[start + n - 1]
            total += weight * stop * n_step(start, n)
            weight *= lam[start + n - 1]
        returns.append(total)
    return returns


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("varies", [True, False])
def test_lambda_returns_are_averages_of_n_step_returns(steps, varies):
    rng = np.random.default_rng(steps)
    reward, value = rng.normal(size=(2, steps, 3))
    discount = rng.choice([0.0, 0.9, 1.0], size=(steps, 3), p=[0.2, 0.6, 0.2])
    lam = rng.choice([0.0, 0.95], size=(steps, 3)) if varies else np.full((steps, 3), 0.8)
    given = (reward, discount, value, lam if varies else 0.8)
    found = jax.jit(lambda_returns)(*map(np.float32, given))
    for i in range(3):
        expected = slow_returns(reward[:, i], discount[:, i], value[:, i], lam[:, i])
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-5, atol=1e-5)


def test_returns_of_the_authors():
    got = golden("g2_lambda_return")
    reward, value, cont, boot = (in_time(got[k]) for k in ("reward", "value", "cont", "boot"))
    returns, weight = losses.imagined_returns(reward, cont, value, LAM)
    close(returns, in_time(got["imag_return"]))
    np.testing.assert_allclose(weight, np.cumprod(cont, axis=0)[:-1], rtol=1e-6)
    found = losses.replay_returns(
        reward, in_time(got["is_last"]), in_time(got["is_terminal"]), boot, GAMMA, LAM
    )
    close(found, in_time(got["replay_return"]))


def test_a_replayed_return_ends_with_its_episode():
    """Reward 1 in all states, an imagined return of 10; the third state of five ends an episode."""
    reward, boot = np.ones((5, 1), np.float32), np.full((5, 1), 10.0, np.float32)
    last = np.array([0, 0, 1, 0, 0], bool)[:, None]
    gone_on = losses.replay_returns(
        reward, np.zeros_like(last), np.zeros_like(last), boot, 0.9, 1.0
    )
    np.testing.assert_allclose(gone_on[2:, 0], [1 + 0.9 * (1 + 9), 1 + 9], rtol=1e-6)
    truncated = losses.replay_returns(reward, last, np.zeros_like(last), boot, 0.9, 1.0)
    # arrives in the last state with 1, and goes on with what is imagined from there
    np.testing.assert_allclose(truncated[:2, 0], [1 + 0.9 * 10, 10.0], rtol=1e-6)
    terminal = losses.replay_returns(reward, last, last, boot, 0.9, 1.0)
    np.testing.assert_allclose(terminal[:2, 0], [1 + 0.9, 1.0], rtol=1e-6)
    for ended in (truncated, terminal):
        np.testing.assert_array_equal(ended[2:], gone_on[2:])


def test_the_range_of_returns_is_the_authors():
    got = golden("g2_retnorm")
    range_ = normaliser.init_range()
    update = jax.jit(normaliser.update_range)
    for i in range(6):
        range_ = update(range_, got["x"][i])
        np.testing.assert_allclose(range_.low, got["state_lo"][i], rtol=1e-5)
        np.testing.assert_allclose(range_.high, got["state_hi"][i], rtol=1e-5)
        np.testing.assert_allclose(normaliser.width(range_), got["scale"][i], rtol=1e-5)


def test_the_range_moves_from_zero_without_a_correction():
    x = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32) * 100
    range_ = normaliser.update_range(normaliser.init_range(), x)
    low, high = np.percentile(np.float64(x), [5, 95])
    np.testing.assert_allclose(range_, [0.01 * low, 0.01 * high], rtol=1e-5)
    assert normaliser.width(normaliser.init_range()) == 1.0
    assert normaliser.width(range_) == np.maximum(1.0, range_.high - range_.low)


# the world model


def gaussian_like(p, q):
    """Any divergence: 2 at first, with the slopes 4 and -3."""
    return 2.0 + 4.0 * (p - jax.lax.stop_gradient(p)) - 3.0 * (q - jax.lax.stop_gradient(q))


@pytest.mark.parametrize(
    ("form", "free", "slopes"),
    [
        ("balanced", 1.0, {"dyn": (0.0, -3.0), "rep": (4.0, 0.0)}),
        ("balanced", 3.0, {"dyn": (0.0, 0.0), "rep": (0.0, 0.0)}),
        ("joint", 1.0, {"dyn": (4.0, -3.0)}),
        ("joint", 3.0, {"dyn": (0.0, 0.0)}),
    ],
)
def test_who_moves_by_which_divergence(form, free, slopes):
    def loss(p, q, name):
        return losses.dynamics_losses(p, q, gaussian_like, free, form)[name]

    found = losses.dynamics_losses(0.5, 0.5, gaussian_like, free, form)
    assert found.keys() == slopes.keys()
    for name, expected in slopes.items():
        assert found[name] == max(2.0, free)
        assert jax.grad(loss, (0, 1))(0.5, 0.5, name) == expected


def test_divergences_and_their_gradients_are_the_authors():
    """With 1 % of the uniform distribution mixed in; below one nat nothing moves."""
    got = golden("g2_kl")
    logits = got["post_logits"], got["prior_logits"]

    def total(post, prior, name):
        made = losses.dynamics_losses(post, prior, rssm_latents.kl)
        return jnp.sum(made[name]), made

    for name in ("dyn", "rep"):
        slope = jax.value_and_grad(partial(total, name=name), (0, 1), has_aux=True)
        (_, made), grads = jax.jit(slope)(*logits)
        close(made[name], got[name])
        for grad, which in zip(grads, ("post", "prior"), strict=True):
            expected = got[f"d{name}_d{which}"]
            np.testing.assert_allclose(grad, expected, atol=1e-4 * np.abs(got["ddyn_dprior"]).max())
    free = got["kl_sum"] < 1.0
    assert free.any()
    assert not free.all()
    assert not grads[0][free].any()
    np.testing.assert_allclose(rssm_latents.kl(logits[0], logits[0]), 0.0, atol=1e-6)


def test_the_continue_target_is_the_discount_or_zero():
    logit = jnp.linspace(-30.0, 30.0, 7)
    for terminal in (False, True):
        target, x = 0.0 if terminal else GAMMA, np.float64(logit)
        expected = target * np.logaddexp(0, -x) + (1 - target) * np.logaddexp(0, x)
        found = losses.continue_loss(logit, jnp.full(7, terminal), GAMMA)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    best = np.log(GAMMA / (1 - GAMMA))
    slope = jax.grad(lambda x: losses.continue_loss(x, jnp.bool_(False), GAMMA))(best)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


# imagination


def distribution(kind, arrays):
    """(log pi(a), entropy) of the golden's raw outputs; plain formulas."""
    action = arrays["action"]
    if kind == "disc":
        log_p = jax.nn.log_softmax(arrays["actor_logits"])
        chosen = jnp.take_along_axis(log_p, action[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    mean = jnp.tanh(arrays["actor_mean_raw"])
    std = 0.1 + 0.9 * jax.nn.sigmoid(arrays["actor_std_raw"] + 2.0)
    log_p = -0.5 * ((action - mean) / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
    entropy = jnp.log(std) + 0.5 * np.log(2 * np.pi * np.e)
    return jnp.sum(log_p, -1), jnp.sum(entropy, -1)


@pytest.mark.parametrize("kind", ["disc", "cont"])
def test_imagination_losses_of_the_authors(kind):
    """Five calls that share the normaliser; with gradients in the first and the last."""
    got, bins = golden(f"g2_imag_loss_{kind}"), golden("g2_twohot")["bins"]
    outputs = ["actor_logits"] if kind == "disc" else ["actor_mean_raw", "actor_std_raw"]

    @jax.jit
    def both(raw, arrays, range_):
        value = arrays["value"]
        returns, weight = losses.imagined_returns(arrays["reward"], arrays["cont"], value, LAM)
        range_ = normaliser.update_range(range_, returns)
        advantage = (returns - value[:-1]) / normaliser.width(range_)

        def of_actor(raw):
            log_prob, entropy = distribution(kind, {**arrays, **raw})
            loss = losses.actor_loss(log_prob[:-1], entropy[:-1], advantage, weight, 3e-4)
            return jnp.mean(loss), (loss, jnp.mean(entropy[:-1]))

        def of_critic(logits):
            loss = losses.critic_loss(logits[:-1], returns, arrays["slow_value"][:-1], weight, bins)
            return jnp.mean(loss), loss

        (_, (actor, entropy)), grads = jax.value_and_grad(of_actor, has_aux=True)(raw)
        (_, critic), slope = jax.value_and_grad(of_critic, has_aux=True)(arrays["value_logits"])
        weight = jnp.mean(jnp.cumprod(arrays["cont"], axis=0))  # theirs is of all 16 states
        means = jnp.stack([weight, jnp.mean(advantage), jnp.std(advantage), entropy])
        return range_, returns, actor, critic, grads, slope, means

    range_ = normaliser.init_range()
    for call in range(5):
        arrays = {k: in_time(v) for k, v in part(got, f"call{call}.").items() if v.ndim > 1}
        arrays.setdefault("value_logits", np.zeros((16, 4, 255), np.float32))
        raw = {name: arrays[name] for name in outputs}
        given = {k: v for k, v in arrays.items() if "grad" not in k and "slow_value_l" not in k}
        range_, returns, actor, critic, grads, slope, means = both(raw, given, range_)
        close(returns, arrays["return"])
        close(actor, arrays["loss_policy"])
        close([range_.low, range_.high], [got[f"call{call}.norm_{k}"] for k in ("lo", "hi")])
        names = ("weight_mean", "adv_mean", "adv_std", "entropy_mean")
        for found, name in zip(means, names, strict=True):
            np.testing.assert_allclose(found, got[f"call{call}.{name}"], rtol=1e-4, atol=1e-6)
        for name, grad in grads.items():
            theirs = name if kind == "disc" else name.removeprefix("actor_")
            close(grad, arrays[f"policy_grad_{theirs}"], 1e-4)
        if call in (0, 4):
            for values, logits in (("value", "value_logits"), ("slow_value", "slow_value_logits")):
                close(two_hot_mean(arrays[logits], bins), arrays[values])
            close(critic, arrays["loss_value"])
            close(slope, arrays["value_grad_value_logits"], 1e-4)


def test_a_terminal_start_counts_next_to_nothing():
    """The weight of a state holds its own chance of going on, and not that of its successor."""
    cont = np.array([[0.9, 1e-6], [0.8, 0.9], [0.7, 0.9]], np.float32)
    zero = np.zeros_like(cont)
    _, weight = losses.imagined_returns(zero, cont, zero, LAM)
    np.testing.assert_allclose(weight, [[0.9, 1e-6], [0.72, 0.9e-6]], rtol=1e-5)


def test_no_gradient_of_the_losses_goes_where_it_should_not():
    x = jnp.linspace(0.1, 1.0, 4)
    actor = jax.grad(lambda *args: jnp.sum(losses.actor_loss(*args, 0.1)), argnums=(0, 1, 2, 3))(
        x, x, x, x
    )
    np.testing.assert_allclose(actor[0], -x * x, rtol=1e-6)
    np.testing.assert_allclose(actor[1], -0.1 * x, rtol=1e-6)
    assert not np.any(actor[2:])
    logits, bins = jnp.sin(jnp.arange(28.0)).reshape(4, 7), symexp_bins(7)
    critic = jax.grad(lambda *args: jnp.sum(losses.critic_loss(*args, bins)), argnums=(0, 1, 2, 3))(
        logits, x, x, x
    )
    assert np.all(critic[0])
    assert not np.any(np.stack(critic[1:]))


def test_the_replayed_critic_of_the_authors():
    got, bins = golden("g2_replay_critic_loss"), golden("g2_twohot")["bins"]
    reward, last, terminal, boot = (
        in_time(got[k]) for k in ("reward", "is_last", "is_terminal", "boot")
    )
    slow = two_hot_mean(in_time(got["slow_value_logits"]), bins)

    def mean(logits):
        returns = losses.replay_returns(reward, last, terminal, boot, GAMMA, LAM)
        loss = losses.critic_loss(logits[:-1], returns, slow[:-1], 1.0 - last[:-1], bins)
        return jnp.mean(loss), (loss, returns)

    (value, (loss, returns)), grad = jax.jit(jax.value_and_grad(mean, has_aux=True))(
        in_time(got["value_logits"])
    )
    close(returns, in_time(got["ret"]))
    close(loss, in_time(got["loss"]))
    np.testing.assert_allclose(value, got["loss_mean"], rtol=1e-5)
    close(grad, in_time(got["grad_value_logits"]), 1e-4)


def test_the_slow_critic_of_the_authors():
    got = golden("g2_slow_critic")
    slow = part(got, "slow0.")
    for number in (1, 2, 3):
        slow = polyak(part(got, f"fast{number}."), slow, 0.02)
        for name, expected in part(got, f"slow{number}.").items():
            np.testing.assert_allclose(slow[name], expected, rtol=1e-6)
