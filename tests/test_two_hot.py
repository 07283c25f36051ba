"""The two-hot code and the symmetric logarithm against float64 and against the authors' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden
from scipy import special

from mbrl_jax.nn.two_hot import (
    neighbours,
    symexp,
    symexp_bins,
    symlog,
    two_hot_loss,
    two_hot_mean,
)

GRIDS = {
    "symexp": lambda: symexp_bins(),
    "even number": lambda: symexp_bins(6, 3.0),
    "two": lambda: symexp_bins(2, 1.0),
    "evenly spaced": lambda: jnp.linspace(-30.0, 30.0, 61),
    "lopsided": lambda: jnp.asarray([-1.0, 0.5, 0.75, 9.0]),
}


def slow_code(target, bins):
    """[len(bins)] float64, by searching for the neighbours."""
    code = np.zeros(len(bins))
    if target <= bins[0]:
        code[0] = 1
    elif target >= bins[-1]:
        code[-1] = 1
    else:
        above = next(i for i, b in enumerate(bins) if b > target)
        share = (target - bins[above - 1]) / (bins[above] - bins[above - 1])
        code[above - 1], code[above] = 1 - share, share
    return code


def test_the_authors_numbers():
    got = golden("g2_symlog")
    np.testing.assert_allclose(symlog(got["x"]), got["symlog"], rtol=1e-6)
    np.testing.assert_allclose(symexp(got["y"]), got["symexp"], rtol=2e-6)
    got, bins = golden("g2_twohot"), symexp_bins()
    # their JAX made an even grid with other rounding errors, up to 2e-6 of the smallest bins
    np.testing.assert_allclose(bins, got["bins"], rtol=3e-6)
    bins = got["bins"]
    for suffix in ("", "_peaked"):
        loss = two_hot_loss(got[f"logits{suffix}"], got["target"], bins)
        np.testing.assert_allclose(loss, got[f"loss{suffix}"], rtol=1e-5)
    grad = jax.grad(lambda x: jnp.sum(two_hot_loss(x, got["target"], bins)))(got["logits"])
    np.testing.assert_allclose(grad, got["dloss_dlogits"], atol=1e-6)
    for logits, mean in (("logits_peaked", "pred_peaked"), ("logits", "pred_wide")):
        scale = np.abs(got[mean]).max()
        np.testing.assert_allclose(two_hot_mean(got[logits], bins), got[mean], atol=1e-5 * scale)


@pytest.mark.parametrize("name", GRIDS)
def test_loss_and_gradient_are_the_cross_entropy_of_a_slow_code(name):
    bins = np.asarray(GRIDS[name]())
    rng = np.random.default_rng(0)
    ends = bins[0], bins[-1], bins[len(bins) // 2], 2.0 * bins[0], 2.0 * bins[-1] + 1.0
    target = np.float32([*ends, *rng.uniform(-1.5, 1.5, 19)]).reshape(2, 3, 4)
    logits = rng.normal(size=(2, 3, 4, len(bins))).astype(np.float32)

    def total(logits, target):
        loss = two_hot_loss(logits, target, bins)
        return jnp.sum(loss), loss

    (_, loss), slopes = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(logits, target)
    codes = [slow_code(t, np.float64(bins)) for t in np.float64(target).ravel()]
    codes = np.reshape(codes, logits.shape)
    log_p = np.float64(logits) - special.logsumexp(np.float64(logits), axis=-1, keepdims=True)
    np.testing.assert_allclose(loss, -np.sum(codes * log_p, axis=-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slopes[0], np.exp(log_p) - codes, rtol=1e-4, atol=1e-5)
    assert not slopes[1].any(), "a target is data"
    # a number alone
    alone = two_hot_loss(logits[1, 2, 3], target[1, 2, 3], bins)
    np.testing.assert_allclose(alone, loss[1, 2, 3], rtol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_a_target_is_the_mean_of_its_code(name):
    bins = GRIDS[name]()
    magnitudes = 10.0 ** np.arange(-4, 7)
    target = np.concatenate([-magnitudes[::-1], [0.0], magnitudes]).astype(np.float32)
    target = np.clip(target, bins[0], bins[-1])
    below, weight = neighbours(target, bins)
    rows = np.arange(len(target))
    code = np.zeros((len(target), len(bins)), np.float32)
    np.add.at(code, (rows, np.asarray(below)), 1 - np.asarray(weight))
    np.add.at(code, (rows, np.asarray(below) + 1), np.asarray(weight))
    found = two_hot_mean(jnp.log(jnp.maximum(code, 1e-38)), bins)
    np.testing.assert_allclose(found, target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [2, 6, 7, 255, 256])
def test_uniform_logits_mean_exactly_zero(num):
    bins = symexp_bins(num)
    assert bins.shape == (num,)
    np.testing.assert_array_equal(bins, -bins[::-1])
    assert (np.diff(bins) > 0).all()
    mean = jax.jit(lambda logits: two_hot_mean(logits, bins))
    assert mean(jnp.zeros((3, num))).tolist() == [0.0] * 3
    # which needs the order of the sum
    naive = jnp.sum(jax.nn.softmax(jnp.zeros(255)) * symexp_bins())
    assert abs(naive) > 0.1


def test_a_target_that_is_no_number_is_seen():
    loss = two_hot_loss(jnp.zeros((2, 255)), jnp.asarray([jnp.nan, 0.0]), symexp_bins())
    assert np.isnan(loss).tolist() == [True, False]


@pytest.mark.parametrize("x64", [False, True])
def test_everything_is_float32(x64):
    with jax.enable_x64(x64):
        bins, target = symexp_bins(), np.linspace(-9.0, 9.0, 4)
        logits = np.zeros((4, 255))
        made = [bins, symlog(target), symexp(target), two_hot_mean(logits, bins)]
        made += [two_hot_loss(logits, target, bins), neighbours(target, bins)[1]]
        assert {x.dtype.name for x in made} == {"float32"}
        assert neighbours(target, bins)[0].dtype == jnp.int32


def test_the_gradient_is_a_pass_over_the_logits_and_no_scatter():
    bins, logits = symexp_bins(), jnp.zeros((3, 4, 255))
    gradient = jax.grad(lambda x: jnp.sum(two_hot_loss(x, jnp.ones((3, 4)), bins)))
    assert "scatter" not in str(jax.make_jaxpr(gradient)(logits))


@pytest.mark.parametrize("num", [2, 31, 32, 33, 64, 255])
def test_bins_are_found_whatever_their_number(num):
    bins = np.linspace(-3.0, 4.0, num, dtype=np.float32)
    targets = np.concatenate([bins, bins[:-1] + 0.3 * np.diff(bins), [-9.0, 9.0, np.inf, -np.inf]])
    below, _ = neighbours(targets.astype(np.float32), bins)
    expected = np.clip(np.searchsorted(bins, targets, side="right") - 1, 0, num - 2)
    np.testing.assert_array_equal(below, expected)
