"""Slow definitions of MuZero's targets and losses, and the small worlds that its tests share."""

from __future__ import annotations

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mbrl_jax.agents import muzero, muzero_targets
from mbrl_jax.agents.muzero_config import Config
from mbrl_jax.agents.muzero_targets import Record
from mbrl_jax.models import muzero_chance, muzero_net
from mbrl_jax.models.muzero_net import Net
from mbrl_jax.types import ArraySpec, EnvSpec

# represent, predict, transition, project
FUNCTIONS = (
    jax.jit(muzero_net.represent, static_argnums=0), jax.jit(muzero_net.predict, static_argnums=0),
    jax.jit(muzero_net.transition, static_argnums=0),
    jax.jit(muzero_net.project, static_argnums=(0, 3)),
)  # fmt: skip
AFTERSTATE, CHANCE, ENCODE = (
    jax.jit(function, static_argnums=0)
    for function in (muzero_chance.afterstate, muzero_chance.chance, muzero_chance.encode)
)
TINY = Config(
    width=8, hidden=(8,), bins=11, num_simulations=6, num_envs=2, buffer_size=64, warmup_steps=32,
    updates=2, batch_size=4, unroll=3, n_step=2, reward_range=(-1.0, 1.0),
)  # fmt: skip


def vector_spec(**changes):
    given = {"id": "Vector-test", "obs_shape": (3,), "obs_dtype": "float32", "episode_limit": 20}
    return EnvSpec(**{**given, "num_actions": 3, **changes})


def ball_spec():
    """Continuous actions whose bounds are not those of the unit."""
    return vector_spec(id="Ball-test", num_actions=None, action_low=(-2.0, 0.0),
                       action_high=(2.0, 1.0))  # fmt: skip


def dict_spec(id, num_players=1, num_actions=3, **parts):
    parts = tuple(sorted({name: ArraySpec(*part) for name, part in parts.items()}.items()))
    return EnvSpec(id=id, obs_shape=(), obs_dtype="dict", episode_limit=20, obs_parts=parts,
                   num_players=num_players, num_actions=num_actions)  # fmt: skip


def game_spec():
    """A board of 3 x 3 with a mask, for two players."""
    return dict_spec(
        "Game-test", 2, 9, board=((3, 3, 2), "float32"), action_mask=((9,), "bool"),
        to_play=((), "int32"),
    )  # fmt: skip


def small_net(spec, **changes):
    return Net(**{"spec": spec, "grid": muzero_net.takes_grid(spec), "width": 8, "blocks": 1,
                  "hidden": (8,), "bins": 11, **changes})  # fmt: skip


@functools.cache
def first_params(net):
    return jax.jit(muzero_net.init, static_argnums=0)(net, jax.random.key(0))


def random_params(net, seed=0, scale=0.4):
    """Parameters that are nowhere as they start, heads too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), first_params(net)
    )


def random_obs(spec, *lead, seed=0):
    """Observations [*lead, ...] of any spec; of a mask about half, and at least one."""
    rng = np.random.default_rng(seed)

    def drawn(name, part):
        shape = (*lead, *part.shape)
        if name == "action_mask":
            mask = rng.random(shape) < 0.5
            mask[..., 0] |= ~mask.any(axis=-1)
            return mask
        if name == "to_play":
            return rng.integers(0, 2, shape, np.int32)
        if part.num is not None or part.dtype == "uint8":
            return rng.integers(0, part.num or 256, shape).astype(part.dtype)
        return rng.standard_normal(shape).astype(part.dtype)

    if not spec.obs_parts:
        return jnp.asarray(drawn("obs", spec.obs))
    return {name: jnp.asarray(drawn(name, part)) for name, part in spec.obs_parts}


def row_of(tree, i):
    """Row i of each leaf, with its axis."""
    return jax.tree.map(lambda x: x[i : i + 1], tree)


# windows


def window_of(rows, spec=None, obs=None, seed=0, num_actions=3):
    """A `Record` [B, L, ...] of B lists of L dicts with the fields that matter in a test.

    A dict may have `reward`, `terminated`, `truncated`, `is_last` and `to_play`.
    """
    lead, rng = (len(rows), len(rows[0])), np.random.default_rng(seed)

    def column(name, dtype):
        return jnp.asarray([[row.get(name, 0) for row in one] for one in rows], dtype)

    if obs is None:
        obs = random_obs(spec, *lead, seed=seed) if spec else {}
    if isinstance(obs, dict):
        obs = obs | {"to_play": column("to_play", "int32")}
    weights = rng.random((*lead, num_actions)).astype(np.float32)
    return Record(
        obs=obs, action=jnp.asarray(rng.integers(0, num_actions, lead, np.int32)),
        reward=column("reward", "float32"), terminated=column("terminated", bool),
        truncated=column("truncated", bool), is_last=column("is_last", bool),
        weights=jnp.asarray(weights / weights.sum(-1, keepdims=True)), candidates=(),
        value=jnp.asarray(rng.standard_normal(lead), "float32"),
    )  # fmt: skip


def records(kinds, opens_last=False, rewards=None, players=None):
    """Rows of one environment: "go", "end" or "cut" for each step, final records put between."""
    rows = [{"is_last": True}] if opens_last else []
    for kind in kinds:
        rows.append({"terminated": kind == "end", "truncated": kind == "cut"})
        if kind != "go":
            rows.append({"is_last": True})
    for i, row in enumerate(rows):
        row["to_play"] = players[i % len(players)] if players else 0
        if rewards and not row.get("is_last"):
            row["reward"] = rewards[i % len(rewards)]
    return rows


# targets, one window at a time, one step at a time, in float64


def slow_n_step(rows, later, start, n, gamma):
    """n rewards from `start` on and the value of the state after them, `later[i]` of step i."""
    total, factor = 0.0, 1.0
    for i in range(start, start + n):
        row, after = rows[i], rows[i + 1]
        total += factor * row.get("reward", 0.0)
        if row.get("terminated"):
            return total
        factor *= gamma
        if after.get("to_play", 0) != row.get("to_play", 0):
            factor = -factor
        if row.get("truncated"):
            return total + factor * later[i]
    return total + factor * later[start + n - 1]


def slow_mean(rows, later, start, lam, gamma):
    """The mean of n-step returns with weights (1 - lam) lam^(n - 1); the longest has the rest."""
    longest = len(rows) - 1 - start
    for n in range(1, longest + 1):
        if rows[start + n - 1].get("terminated") or rows[start + n - 1].get("truncated"):
            longest = n
            break
    total = 0.0
    for n in range(1, longest + 1):
        weight = lam ** (n - 1) * (1.0 if n == longest else 1.0 - lam)
        total += weight * slow_n_step(rows, later, start, n, gamma)
    return total


def slow_targets(rows, later, unroll, gamma, n_step=None, lam=None, prefix_period=0):
    """The targets of one window as lists, K + 1 or K of them; None where nothing is asked."""
    found = {"value": [], "reward": [], "continues": [], "policy_mask": [], "likeness_mask": []}
    state = "unknown" if rows[0].get("is_last") else "running"
    since = 0.0
    for k in range(unroll + 1):
        row = rows[k]
        if state == "running":
            if lam is None:
                value = slow_n_step(rows, later, k, n_step, gamma)
            else:
                value = slow_mean(rows, later, k, lam, gamma)
            found["value"].append(value)
        elif state == "absorbed":
            found["value"].append(0.0)
        else:
            found["value"].append(None)
        found["policy_mask"].append(state == "running")
        if k == unroll:
            break
        if prefix_period and k % prefix_period == 0:
            since = 0.0
        reward = row.get("reward", 0.0) if state == "running" else 0.0
        since = since + reward if prefix_period else reward
        if state == "unknown":
            found["reward"].append(None)
            found["continues"].append(None)
        else:
            found["reward"].append(since)
            goes_on = state == "running" and not row.get("terminated")
            found["continues"].append(1.0 if goes_on else 0.0)
        found["likeness_mask"].append(state == "running")
        if state == "running":
            if row.get("terminated"):
                state = "absorbed"
            elif row.get("truncated"):
                state = "unknown"
    return found


@functools.partial(jax.jit, static_argnums=1)
def made_targets(cfg, spec, window, later, root, age):
    """The code's targets from given values, without a network."""
    value, whole = muzero.value_targets(cfg, spec, window, later, root, age)
    status = muzero_targets.status_of(window.terminated, window.truncated, window.is_last)
    status = jax.tree.map(lambda x: x[:, : cfg.unroll + 1], status)
    policy = window.weights[:, : cfg.unroll + 1]
    made = muzero_targets.targets_of(window, status, policy, (), value, cfg.prefix_period)
    return made, whole


def assert_targets(made, b, slow, tolerance=1e-4):
    """Row b of `Targets` against `slow_targets`."""
    made = jax.tree.map(np.asarray, made)
    pairs = (("value", made.value_mask), ("reward", made.step_mask), ("continues", made.step_mask))
    for name, mask in pairs:
        asked = [x is not None for x in slow[name]]
        np.testing.assert_array_equal(mask[b], np.float32(asked), err_msg=f"mask of {name}")
        for found, expected in zip(getattr(made, name)[b], slow[name], strict=True):
            if expected is not None:
                assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance), name
    for name in ("policy_mask", "likeness_mask"):
        np.testing.assert_array_equal(getattr(made, name)[b], np.float32(slow[name]), name)


# the loss, one sample and one step at a time


def slow_two_hot(target, bins):
    """The code of a target in the units of the bins, float64."""
    bins, code = np.float64(bins), np.zeros(len(bins))
    target = min(max(target, bins[0]), bins[-1])
    for i in range(len(bins) - 1):
        if bins[i] <= target <= bins[i + 1]:
            share = (target - bins[i]) / (bins[i + 1] - bins[i])
            code[i], code[i + 1] = 1.0 - share, share
            return code
    raise AssertionError(target)


def slow_transform(x):
    return math.copysign(math.sqrt(abs(x) + 1.0) - 1.0, x) + 1e-3 * x


def log_softmax(logits):
    logits = np.float64(logits)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def slow_policy_loss(policy, weights, candidates):
    """Cross-entropy, or the weighted log-density of a Gaussian at its candidates."""
    if candidates is None:
        return -sum(float(w) * float(x) for w, x in zip(weights, log_softmax(policy), strict=True))
    mean, std = np.float64(policy[0]), np.float64(policy[1])
    total = 0.0
    for weight, point in zip(np.float64(weights), np.float64(candidates), strict=True):
        apart = (point - mean) / std
        total -= weight * np.sum(-0.5 * apart**2 - np.log(std) - 0.5 * math.log(2 * math.pi))
    return total


def slow_losses(net, params, support, obs, action, made, later_obs=None):
    """Lists of floats by name: each sample's losses [B][steps], unscaled."""
    names = ["policy", "value", "entropy", "reward", "continues"]
    names += ["consistency"] if net.projection else []
    names += ["chance", "afterstate_value", "commitment"] if net.chance else []
    found = {name: [] for name in names}
    for b in range(action.shape[0]):
        one = slow_sample(net, params, support, obs, action, made, later_obs, b)
        for name in found:
            found[name].append(one[name])
    return found


def slow_sample(net, params, support, obs, action, made, later_obs, b):
    def row(tree, *at):
        return jax.tree.map(lambda x: x[(slice(b, b + 1), *at)], tree)

    def cross_entropy(logits, target, bins):
        code = slow_two_hot(slow_transform(float(target)), np.asarray(bins))
        return -float(np.dot(code, log_softmax(logits[0])))

    represent, predict, transition, project = FUNCTIONS
    losses = collections.defaultdict(list)
    num = action.shape[1]
    latent = represent(net, params, row(obs))
    for k in range(num + 1):
        said = predict(net, params, latent)
        policy = jax.tree.map(lambda x: np.asarray(x[0]), said.policy)
        points = None if isinstance(made.candidates, tuple) else made.candidates[b, k]
        runs = float(made.policy_mask[b, k])
        losses["policy"].append(runs * slow_policy_loss(policy, made.policy[b, k], points))
        losses["entropy"].append(runs * slow_entropy(policy))
        value = cross_entropy(said.value, made.value[b, k], support.value)
        losses["value"].append(float(made.value_mask[b, k]) * value)
        if k == num:
            break
        asked, known = float(made.step_mask[b, k]), float(made.likeness_mask[b, k])
        given = action[b : b + 1, k]
        if net.chance:
            features, read = AFTERSTATE(net, params, latent.features, given)
            said, code = CHANCE(net, params, read), ENCODE(net, params, row(later_obs, k))
            given = jnp.round(code.chosen)
            which, shares = int(jnp.argmax(given)), np.float64(code.shares[0])
            losses["chance"].append(-known * log_softmax(said.codes[0])[which])
            apart = np.sum((shares - np.eye(net.chance)[which]) ** 2)
            losses["commitment"].append(known * apart)
            value = cross_entropy(said.value, made.value[b, k], support.value)
            losses["afterstate_value"].append(asked * value)
            latent = latent._replace(features=features)
        latent, came = transition(net, params, support, latent, given)
        losses["reward"].append(
            asked * cross_entropy(came.reward, made.reward[b, k], support.reward)
        )
        chance = 1.0 / (1.0 + math.exp(-float(came.continues[0])))
        right = chance if float(made.continues[b, k]) else 1.0 - chance
        losses["continues"].append(-asked * math.log(right))
        if net.projection:
            seen = represent(net, params, row(later_obs, k))
            x, y = (np.float64(project(net, params, given, through)[0])
                    for given, through in ((latent, True), (seen, False)))  # fmt: skip
            cosine = x @ y / math.sqrt((x @ x) * (y @ y))
            losses["consistency"].append(known * (1.0 - cosine))
    return losses


def slow_entropy(policy):
    if isinstance(policy, tuple):
        return float(np.sum(np.log(policy[1]) + 0.5 * math.log(2 * math.pi * math.e)))
    log = log_softmax(policy)
    return -float(np.sum(np.exp(log) * log))


def slow_total(losses, coefs, weights):
    """The first state whole, each later step one K-th; the mean over weighted samples."""
    total, steps = 0.0, len(losses["reward"][0])
    for b, weight in enumerate(weights):
        for name, rows in losses.items():
            coef = coefs.get(name, 1.0)
            for k, loss in enumerate(rows[b]):
                first = k == 0 and len(rows[b]) == steps + 1
                total += weight * coef * loss / (1 if first else steps) / len(weights)
    return total
