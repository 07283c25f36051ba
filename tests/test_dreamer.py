"""Dreamer's update against the authors' numbers, and what its switches change."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden, part, tree
from test_dreamer_losses import close

from mbrl_jax.agents import dreamer
from mbrl_jax.agents.dreamer import Draws, Record, State
from mbrl_jax.agents.dreamer_config import Config
from mbrl_jax.data import online
from mbrl_jax.models import rssm_actions, rssm_params
from mbrl_jax.nn.normaliser import Range
from mbrl_jax.types import ArraySpec, EnvSpec

B, T, H = 2, 6, 15
PART = {"vector": ArraySpec((7,), "float32")}
SPEC = EnvSpec("golden", (), "dict", 100, obs_parts=tuple(PART.items()))
SPECS = {
    "g3a_vector_discrete": dataclasses.replace(SPEC, num_actions=4),
    "g3b_vector_continuous": dataclasses.replace(
        SPEC, action_low=(-1.0,) * 3, action_high=(1.0,) * 3
    ),
}
CFG = Config(size="nano", batch_size=B, batch_length=T, learning_rate=1e-3, warmup_updates=0.0)


@pytest.fixture(autouse=True)
def golden_sizes(monkeypatch):
    """The nano of the goldens has 8 variables."""
    sizes = rssm_params.SIZES["nano"]._replace(stoch=8)
    monkeypatch.setitem(rssm_params.SIZES, "nano", sizes)


def window_of(got):
    batch = part(got, "batch.")
    return Record(
        obs={"vector": batch["vector"]},
        action=batch["action"],
        reward=batch["reward"],
        is_first=batch["is_first"],
        is_last=batch["is_last"],
        is_terminal=batch["is_terminal"],
        deter=batch["stored_deter"],
        stoch=np.argmax(batch["stored_stoch"], -1).astype(np.uint8),
    )


def forced(classes, num):
    """Gumbel noise with which a class wins whatever the logits are."""
    return 1e9 * np.eye(num, dtype=np.float32)[classes]


def draws_of(got, discrete):
    draw = part(got, "draw.")
    action = np.moveaxis(draw["imag_action.action"], 0, 1)
    return Draws(
        posterior=forced(draw["posterior_class"], 4),
        prior=np.moveaxis(forced(draw["imag_prior_class"], 4), 0, 1),
        # `taken` puts numbers in the place of samples
        action=forced(action, 4) if discrete else action,
    )


@pytest.fixture
def taken(monkeypatch):
    """Continuous actions are given in place of their noise."""
    sample = rssm_actions.sample_action

    def given(policy, noise, parts):
        return sample(policy, noise, parts) if parts[0].discrete else noise

    monkeypatch.setattr(rssm_actions, "sample_action", given)


def state_of(got, range_=None):
    params = tree(part(got, "param."))
    slow = params.pop("slow_critic")
    if range_ is None:
        range_ = Range(got["norm.lo_before"], got["norm.hi_before"])
    opt = dreamer.optimiser(CFG, 0).init(params)
    return jax.tree.map(jnp.asarray, State(params, slow, opt, range_, (), online.empty(), ()))


def flat(params):
    return {
        ".".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def check_losses(learnt, total, got):
    expected = part(got, "loss.")
    np.testing.assert_allclose(total, expected.pop("total"), rtol=1e-5)
    names = {name.replace("rec.", "rec_"): x for name, x in expected.items()}
    assert learnt.losses.keys() == names.keys()
    for name, x in names.items():
        close(learnt.losses[name], x)


@cache
def whole_update(name):
    """(loss with its gradients, update): one program for all that the goldens ask."""

    def run(cfg, state, window, draws, number):
        given = (state.params, state.slow, state.range_, window, draws)
        loss = jax.value_and_grad(partial(dreamer.total_loss, cfg, SPECS[name]), has_aux=True)
        learnt = dreamer.learn(cfg, SPECS[name], state, window, draws, number)
        return *loss(*given), *learnt

    return jax.jit(run)


@pytest.mark.parametrize("name", SPECS)
def test_a_whole_loss_with_its_gradients_and_one_update(name, taken):
    got, spec = golden(name), SPECS[name]
    state, window = state_of(got), window_of(got)
    draws = draws_of(got, spec.discrete)
    (total, learnt), grads, after, _, metrics = whole_update(name)(
        CFG, state, window, draws, jnp.int32(0)
    )
    close(learnt.latent.deter, got["writeback.deter"])
    np.testing.assert_array_equal(np.argmax(learnt.latent.stoch, -1), got["writeback.stoch_class"])
    close(learnt.imagined.returns.T, got["mid.img_return"])
    check_losses(learnt, total, got)
    grads = flat(grads)
    for tensor, expected in part(got, "grad.").items():
        close(grads[tensor], expected, 1e-4)
    squares = {}
    for tensor, x in grads.items():
        module = tensor.split(".")[0]
        for key in (module, "all", "rssm" if module in ("core", "prior", "post") else None):
            squares[key] = squares.get(key, 0.0) + np.sum(np.square(np.float64(x)))
    for module, norm in part(got, "grad_norm.").items():
        np.testing.assert_allclose(np.sqrt(squares[module]), norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_norm"], got["grad_norm.all"], rtol=1e-4)
    np.testing.assert_allclose(
        after.range_, [got["norm.lo_after"], got["norm.hi_after"]], rtol=1e-5
    )

    before, params = flat(state.params), flat(after.params)
    for tensor, sign in part(got, "sign_of_move.").items():
        move = (np.asarray(params[tensor]) - np.asarray(before[tensor])) / 1e-3
        np.testing.assert_allclose(move[sign != 9], sign[sign != 9], atol=1e-3)
    for tensor, expected in part(got, "param_after.slow_critic.").items():
        critic = part(got, "sign_of_move.critic.")[tensor]
        found = np.asarray(flat(after.slow)[tensor])
        np.testing.assert_allclose(found[critic != 9], expected[critic != 9], rtol=1e-6, atol=1e-6)


def test_three_updates_with_warm_up():
    """Clipping, momentum, warm-up, the normaliser and the slow critic leave their traces."""
    params = {k: v for k, v in golden("g3a_vector_discrete").items() if k.startswith("param.")}
    got = params | golden("g3a_three_updates")
    cfg = dataclasses.replace(CFG, warmup_updates=2.0)
    state = start = state_of(got, Range(jnp.float32(0), jnp.float32(0)))
    window, run = window_of(got), whole_update("g3a_vector_discrete")
    for number in range(3):
        update = part(got, f"update{number + 1}.")
        draws = draws_of(update, True)
        *_, state, learnt, metrics = run(cfg, state, window, draws, jnp.int32(number))
        check_losses(learnt, metrics["total_loss"], update)
        np.testing.assert_allclose(metrics["grad_norm"], update["grad_norm.all"], rtol=1e-4)
        ends = [update["norm.lo_after"], update["norm.hi_after"]]
        np.testing.assert_allclose(state.range_, ends, rtol=1e-5)
    after, before = flat(state.params), flat(start.params)
    for tensor, move in part(got, "move.").items():
        skip = got.get(f"skip.{tensor}", np.zeros(move.shape, bool))
        found = np.asarray(after[tensor]) - np.asarray(before[tensor])
        np.testing.assert_allclose(found[~skip], move[~skip] * 1e-7, atol=2e-6, err_msg=tensor)
    for tensor, expected in part(got, "param_after3.slow_critic.").items():
        skip = got.get(f"skip.slow_critic.{tensor}", np.zeros(expected.shape, bool))
        found = np.asarray(flat(state.slow)[tensor])
        np.testing.assert_allclose(found[~skip], expected[~skip], rtol=1e-6, atol=2e-6)
