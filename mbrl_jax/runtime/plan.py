"""How a run is divided: warm-up, prefill, and periods of equal length with their updates."""

from __future__ import annotations

from typing import NamedTuple

from mbrl_jax.types import InputError, Schedule

_MAX_STEPS = 2**31 - 1  # the index of a batched step is int32


class Plan(NamedTuple):
    """How many of what; plain Python ints."""

    num_envs: int
    warmup: int  # batched steps of random actions
    prefill: int  # batched steps by the policy, after the warm-up and before the first update
    updates: int  # per period
    steps_per_update: int  # batched steps
    periods: int

    @property
    def start(self) -> int:
        """Batched steps before the first period."""
        return self.warmup + self.prefill

    @property
    def steps_per_period(self) -> int:
        """Batched steps."""
        return self.updates * self.steps_per_update

    def env_steps(self, period: int) -> int:
        """Environment steps taken when period `period` (from 0) has ended."""
        return self.num_envs * (self.start + (period + 1) * self.steps_per_period)


def make_plan(agent: str, schedule: Schedule, total_steps: int, eval_every: int | None) -> Plan:
    """How a run of `total_steps` environment steps is divided; arguments as in `make_train`.

    The periods are as few as `eval_every` allows and equally long, so that the budget is overshot
    by less than one update in each of them.

    Raises:
      InputError: a budget that warm-up and prefill use up, or more than 2**31 - 1 batched steps.
    """
    num_envs, steps_per_update = schedule.num_envs, schedule.steps_per_update
    warmup = -(-schedule.warmup_steps // num_envs)
    prefill = -(-schedule.prefill_steps // num_envs)
    left = total_steps - (warmup + prefill) * num_envs
    if left < 1:
        filled = schedule.warmup_steps + schedule.prefill_steps
        raise InputError(
            f"total_steps = {total_steps}: expected more than the {filled} steps of {agent}'s "
            "warm-up"
        )
    if eval_every is None:
        eval_every = max(1, total_steps // 20)
    per_update = num_envs * steps_per_update
    longest = -(-min(eval_every, left) // per_update)  # updates
    periods = -(-left // (longest * per_update))
    updates = -(-left // (periods * per_update))
    plan = Plan(num_envs, warmup, prefill, updates, steps_per_update, periods)
    if plan.start + periods * plan.steps_per_period > _MAX_STEPS:
        raise InputError(f"total_steps = {total_steps}: at most {_MAX_STEPS} batched steps fit")
    return plan


def check_counts(
    total_steps: int, eval_every: int | None, eval_episodes: int, eval_max_steps: int | None
) -> None:
    """Raises InputError for a count that is no whole number or too small; as in `make_train`."""
    for name, value, least in (
        ("total_steps", total_steps, 1),
        ("eval_every", 1 if eval_every is None else eval_every, 1),
        ("eval_episodes", eval_episodes, 0),
        ("eval_max_steps", 1 if eval_max_steps is None else eval_max_steps, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} = {value!r}: expected a whole number, {least} or more")
