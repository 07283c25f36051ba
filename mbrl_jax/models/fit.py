"""Training of stacked dynamics networks on a buffer that grows inside a fixed capacity.

Janner et al. (2019), "MBPO", as their code trains: every member sees a bootstrap of the training
rows of its own, a part of the rows is held out, and each member keeps the weights with which it was
best there. Compiled as a whole: the count of rows is traced, so a growing buffer never recompiles.

"early_stopping" ends when no member has improved for a while; under `vmap` it lasts until the
slowest seed ends, and a seed that has ended keeps what it has. "fixed_steps" takes the same number
of gradient steps whatever the data.

How many gradient steps a round takes and how many rows of the holdout are looked at follow from
`size`, which seeds under `vmap` share, so neither loop selects anything seed by seed.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mbrl_jax.models.dynamics import (
    LOGVAR_RANGE,
    Bounds,
    Dynamics,
    Scaling,
    fit_scaling,
    standardised,
)
from mbrl_jax.nn.optimiser import adam
from mbrl_jax.types import InputError, PyTree, Transition, config, ranged
from mbrl_jax.x64 import in_32_bits

HOLDOUT_ROWS = 500  # of the holdout that are evaluated at once on a CPU; an accelerator takes all


@config
class Config:
    """Fields annotated float may be vmapped and never recompile."""

    # Adam's; its state is kept between trainings
    learning_rate: float = ranged("(0, inf)", default=1e-3)
    # rows that each member sees in a gradient step
    batch_size: int = ranged("[1, inf)", default=256)
    # share of the rows that is held out
    holdout: float = ranged("(0, 1)", default=0.2)
    # rows that are held out at most
    max_holdout: int = ranged("[1, inf)", default=5_000)
    # until no member improves, or the same number of gradient steps at every training
    mode: Literal["early_stopping", "fixed_steps"] = "early_stopping"
    # early stopping: passes over the data at most
    max_epochs: int = ranged("[1, inf)", default=100)
    # early stopping: how many passes in a row may improve no member
    patience: int = ranged("[0, inf)", default=5)
    # by which share the holdout error must fall to count as better
    improvement: float = ranged("[0, 1)", default=0.01)
    # fixed steps: gradient steps of a training
    steps: int = ranged("[1, inf)", default=1_000)
    # fixed steps: gradient steps between two looks at the holdout
    eval_every: int = ranged("[1, inf)", default=100)


class Curves(NamedTuple):
    """Of R rounds (epochs, or stretches of `eval_every` steps); nan where none ran."""

    holdout: jax.Array  # [R, E] mean squared error of the standardised targets
    loss: jax.Array  # [R] mean over members and steps of what is minimised
    rounds: jax.Array  # [] int32, how many ran
    dropped: jax.Array  # [] int32, rows that were not finite


class Fitted(NamedTuple):
    """Members as they were when they were best on the holdout."""

    net: PyTree  # [E, ...]
    bounds: Bounds
    scaling: Scaling
    opt: PyTree
    error: jax.Array  # [E] holdout error of `net`
    curves: Curves


def init(net: PyTree, bounds: Bounds) -> PyTree:
    """The optimiser's state for stacked members."""
    return adam(0.0).init((net, bounds))


@in_32_bits
def fit(
    model: Dynamics,
    config: Config,
    net: PyTree,
    bounds: Bounds,
    opt: PyTree,
    data: Transition,
    size: jax.Array,
    key: jax.Array,
) -> Fitted:
    """Trains E members from where they are; jit it, with `model` and `config` closed over.

    Args:
      model: the network.
      config: of the training.
      net, bounds, opt: weights [E, ...], bounds of the log-variance, and `init`'s state.
      data: rows [C, ...] of a buffer; `truncated` is not read.
      size: int32, how many of them are written, at least 2; where seeds are vmapped, the same for
        all (an axis of its own gives the same results in more time). Rows that are not finite are
        left out; `check` refuses or reports them before.
      key: consumed.

    Memory: 4 (F + K + 1 + E) bytes for each row of the buffer, beside the data.
    """
    boot_key, split_key, key = jax.random.split(key, 3)
    num_members, capacity = _leading(net), data.reward.shape[0]
    written = jnp.arange(capacity) < size
    valid = written & _finite(data)
    data = jax.tree.map(lambda leaf: _masked(valid, leaf), data)

    # the first `held` rows in a random order are the holdout, the next ones are for training
    count = jnp.sum(valid)
    held, most_held = held_out(config, count), held_out(config, size)
    order = jnp.argsort(jnp.where(valid, jax.random.uniform(split_key, (capacity,)), jnp.inf))
    rank = jnp.zeros(capacity, jnp.int32).at[order].set(jnp.arange(capacity, dtype=jnp.int32))
    training = valid & (rank >= held)
    num_rows = jnp.maximum(count - held, 1)

    x, y = model.inputs(data.obs, data.action), model.targets(data.obs, data.reward, data.next_obs)
    scaling = fit_scaling(model, data.obs, x, y, training.astype(jnp.float32))
    x = standardised(x, scaling.x_mean, scaling.x_std)
    y = standardised(y, scaling.y_mean, scaling.y_std)
    packed = jnp.concatenate([x, y, data.terminated[:, None].astype(jnp.float32)], axis=-1)
    cuts = (model.num_inputs, model.num_inputs + model.num_targets)
    kept = packed[order[: min(config.max_holdout, capacity)]]
    weight = jnp.arange(kept.shape[0]) < held

    # drawn once for a training: which rows make up each member's own data set
    drawn = jax.random.uniform(boot_key, (num_members, capacity))
    bootstrap = order[held + jnp.minimum(jnp.int32(drawn * num_rows), num_rows - 1)]

    def holdout_error(net: PyTree, bounds: Bounds) -> jax.Array:
        block = min(HOLDOUT_ROWS, len(kept)) if jax.default_backend() == "cpu" else len(kept)

        def some(i: jax.Array, each: jax.Array) -> jax.Array:
            start = jnp.minimum(i * block, len(kept) - block)  # the last block is no shorter
            rows = jax.lax.dynamic_slice_in_dim(kept, start, block)
            x, y, _ = jnp.split(rows, cuts, axis=-1)
            mean = jax.vmap(lambda one: model.apply(one, bounds, x).mean)(net)
            error = jnp.mean(jnp.square(mean - y[None]), axis=-1)
            return jax.lax.dynamic_update_slice_in_dim(each, error, start, axis=1)

        each = jnp.zeros((num_members, len(kept)))
        each = jax.lax.fori_loop(0, -(-most_held // block), some, each)
        return jnp.sum(jnp.where(weight[None], each, 0.0), axis=-1) / held

    def loss(trained: tuple[PyTree, Bounds], rows: jax.Array) -> jax.Array:
        net, bounds = trained
        x, y, end = jnp.split(rows, cuts, axis=-1)
        many = jax.vmap(model.loss, (0, None, 0, 0, 0))
        total = jnp.sum(many(net, bounds, x, y, end[..., 0]))
        if model.config.probabilistic and model.config.learn_bounds:
            total += model.config.bounds_weight * jnp.sum(bounds.high - bounds.low)
        return total

    optimiser = adam(config.learning_rate)
    shape = (num_members, config.batch_size)

    def step(carry, key: jax.Array):
        trained, opt, total = carry
        place = jnp.int32(jax.random.uniform(key, shape) * num_rows)
        place = jnp.minimum(place, num_rows - 1)
        rows = packed[jnp.take_along_axis(bootstrap, place, axis=1)]
        value, grads = jax.value_and_grad(loss)(trained, rows)
        moves, opt = optimiser.update(grads, opt, trained)
        net, bounds = optax.apply_updates(trained, moves)
        low, high = (jnp.clip(x, *LOGVAR_RANGE) for x in bounds)
        bounds = Bounds(low, high) if model.config.learn_bounds else trained[1]
        return (net, bounds), opt, total + value / num_members

    early = config.mode == "early_stopping"
    rounds = config.max_epochs if early else -(-config.steps // config.eval_every)
    num_batches = -(-jnp.maximum(size - most_held, 1) // config.batch_size)
    per_round = num_batches if early else config.eval_every

    def one_round(carry):
        trained, opt, best, error, stale, number, curves = carry
        round_key = jax.random.fold_in(key, number)
        trained, opt, total = jax.lax.fori_loop(
            0,
            per_round,
            lambda i, carry: step(carry, jax.random.fold_in(round_key, i)),
            (trained, opt, jnp.float32(0)),
        )
        now = holdout_error(*trained)
        better = now < (1.0 - config.improvement) * error  # never where it is nan
        best = jax.tree.map(lambda new, old: _choose(better, new, old), trained[0], best)
        error = jnp.where(better, now, error)
        stale = jnp.where(jnp.any(better), 0, stale + 1)
        holdout = curves.holdout.at[number].set(now)
        losses = curves.loss.at[number].set(total / per_round)
        curves = curves._replace(holdout=holdout, loss=losses, rounds=number + 1)
        return trained, opt, best, error, stale, number + 1, curves

    def goes_on(carry) -> jax.Array:
        stale, number = carry[4:6]
        return (number < rounds) & (stale <= config.patience) if early else number < rounds

    nothing = jnp.full((rounds, num_members), jnp.nan)
    curves = Curves(nothing, nothing[:, 0], jnp.int32(0), jnp.sum(written & ~valid))
    start = ((net, bounds), opt, net, jnp.full(num_members, jnp.inf), 0, 0, curves)
    trained, opt, best, error, _, _, curves = jax.lax.while_loop(goes_on, one_round, start)
    return Fitted(best, trained[1], scaling, opt, error, curves)


def report(curves: Curves, bounds: Bounds) -> dict[str, jax.Array]:
    """What an agent logs of a training, [] float32 each.

    `holdout_error` of the best member at its best, `model_loss` of the last round, `model_rounds`,
    and the mean bounds of the log-variance, `logvar_min` and `logvar_max`.
    """
    return {
        "holdout_error": jnp.nanmin(curves.holdout),
        "model_loss": curves.loss[curves.rounds - 1],
        "model_rounds": curves.rounds.astype(jnp.float32),
        "logvar_min": jnp.mean(bounds.low),
        "logvar_max": jnp.mean(bounds.high),
    }


def held_out(config: Config, num_rows: jax.Array) -> jax.Array:
    """How many of `num_rows` (int32) rows are held out, int32: the share, 1 to `max_holdout`."""
    return jnp.clip(jnp.int32(config.holdout * num_rows), 1, config.max_holdout)


def check_warmup(config: Config, warmup_steps: int, buffer_size: int) -> None:
    """Whether an agent's random steps suffice for its first training.

    Raises:
      InputError: too few for a holdout, or more than its buffer holds.
    """
    if warmup_steps > buffer_size:
        raise InputError(
            f"warmup_steps = {warmup_steps}: expected at most buffer_size = {buffer_size}"
        )
    # a traced share is one of a sweep, whose values were checked to lie in (0, 1)
    share = config.holdout
    if isinstance(share, float) and int(share * warmup_steps) < 1:
        raise InputError(
            f"warmup_steps = {warmup_steps}: too few for a holdout of {share}; take "
            f"{math.ceil(1 / share)} or more"
        )


def check(
    model: Dynamics, config: Config, data: Transition, size: int, refuse: bool = False
) -> int:
    """Looks at rows on the host before a training; returns how many are not finite.

    Raises:
      InputError: arrays that do not match the model's `spec` (the first one is named), a `size`
        that is not among the rows, fewer finite rows than a holdout and a training need, or, with
        `refuse`, rows that are not finite. Without it they are counted in a warning.
    """
    spec, rows = model.spec, data.reward.shape[0]
    shapes = {"obs": spec.obs_shape, "action": spec.action_shape, "next_obs": spec.obs_shape}
    for name in ("obs", "action", "reward", "next_obs", "terminated"):
        expected, got = (rows, *shapes.get(name, ())), getattr(data, name).shape
        if got != expected:
            raise InputError(f"data.{name} has shape {got}: expected {expected} for {spec.id}")
    if not 0 <= size <= rows:
        raise InputError(f"size = {size}: expected 0 to {rows}, the rows of the data")
    bad = size - int(np.sum(np.asarray(_finite(data))[:size]))
    if bad and refuse:
        raise InputError(f"{bad} of {size} rows of the data are not finite; leave them out")
    if size - bad < 2 or int(config.holdout * (size - bad)) < 1:
        raise InputError(
            f"{size - bad} finite rows: too few for a holdout of {config.holdout}; collect more, "
            "or hold out a larger share"
        )
    if bad:
        warnings.warn(f"{bad} of {size} rows of the data are not finite and left out", stacklevel=2)
    return bad


def _leading(tree: PyTree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _finite(data: Transition) -> jax.Array:
    """[C] bool: every number of the row is finite."""
    parts = (data.obs, data.action, data.reward, data.next_obs)
    flat = (jnp.isfinite(part).reshape(part.shape[0], -1).all(axis=1) for part in parts)
    return jnp.stack(list(flat)).all(axis=0)


def _masked(rows: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))


def _choose(which: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(which.reshape(-1, *[1] * (new.ndim - 1)), new, old)
