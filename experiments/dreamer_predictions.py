"""What DreamerV3's world model expects to see: open-loop forecasts against the truth.

    python experiments/dreamer_predictions.py
    python experiments/dreamer_predictions.py --env Breakout-MinAtar --total-steps 100000

Trains the agent, lets it play new episodes, shows its model the first observations of each, and
lets it foretell the others from the actions alone. Writes under experiments/results/ a strip (PNG)
and a film (GIF) for images, grids and boards, curves for vectors; the model's error by steps ahead
with intervals over seeds; imagined returns beside those that came; and all numbers as JSON.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import report
from learning import QUICK, SMALL_DREAMER

import mbrl_jax
from mbrl_jax.agents import dreamer
from mbrl_jax.agents.dreamer_config import model_of
from mbrl_jax.analysis import forecast_plots, model_plots
from mbrl_jax.analysis.stats import bootstrap_interval
from mbrl_jax.envs import Env
from mbrl_jax.models import rssm, rssm_actions, rssm_forecast
from mbrl_jax.models.diagnostics import rank_correlation
from mbrl_jax.types import Agent, PyTree


@dataclasses.dataclass(frozen=True)
class Options:
    # environment id
    env: str = "Catch-bsuite"
    # environment steps of each seed
    total_steps: int = 10_000
    # independent runs
    seeds: int = 5
    # observations of an episode that the model sees
    context: int = 2
    # steps of an episode, those that are seen among them; by default the episode's, 50 at most
    length: int | None = None
    # new episodes of each seed
    episodes: int = 64
    # size of the networks
    size: str = "nano"
    # folder of the files
    out: Path = Path("experiments/results")
    # a few steps, to see that it runs
    quick: bool = False


class Played(NamedTuple):
    """Episodes [N, T, ...], each from its first observation."""

    obs: PyTree
    before: jax.Array  # [N, T, A] float32, the vectors of the actions before the observations
    reward: jax.Array  # [N, T] float32, that came with the observations
    valid: jax.Array  # [N, T] bool, the episode has gone on so far


def play(agent: Agent, env: Env, state: PyTree, key: jax.Array, count: int, length: int) -> Played:
    """Episodes of the agent in mode "eval"; what comes after an episode's end is not valid."""
    model_actions = rssm_actions.action_parts(env.spec)
    keys = jax.random.split(key, 3)
    worlds, obs = jax.vmap(env.reset)(jax.random.split(keys[0], count))
    nothing = jnp.zeros((count, rssm_actions.action_width(model_actions)))

    def one(carry: tuple, t: jax.Array) -> tuple[tuple, tuple]:
        worlds, obs, memory, before, reward, valid, going = carry
        first = jnp.full(count, t == 0)
        at = jax.random.fold_in(keys[1], t)
        action, memory, extras = agent.act(state, memory, obs, first, at, t, "eval")
        step_keys = jax.random.split(jax.random.fold_in(keys[2], t), count)
        worlds, after = jax.vmap(env.step)(step_keys, worlds, action)
        vector = rssm_actions.action_vector(extras["action"], model_actions)
        goes_on = going & ~(after.terminated | after.truncated)
        # the observation that ends an episode still belongs to it
        carry = (worlds, after.obs, memory, vector, after.reward, going, goes_on)
        return carry, (obs, before, reward, valid)

    flags = jnp.ones(count, bool)
    start = (worlds, obs, agent.init_memory(count), nothing, jnp.zeros(count), flags, flags)
    _, rows = jax.lax.scan(one, start, jnp.arange(length))
    return Played(*jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), rows))


class Found(NamedTuple):
    """Of one seed."""

    foretold: jax.Array  # [N, T, *shape]
    true: jax.Array  # [N, T, *shape]
    valid: jax.Array  # [N, T]
    errors: rssm_forecast.ForecastErrors
    imagined: jax.Array  # [N] return from the last observation that was seen
    real: jax.Array  # [N] discounted return that came


def look(
    config: dreamer.Config,
    env: Env,
    options: Options,
    length: int,
    state: dreamer.State,
    key: jax.Array,
) -> Found:
    """Episodes of one seed, their forecasts and the returns."""
    agent, model = dreamer.make(config, env.spec), model_of(config, env.spec)
    keys = jax.random.split(key, 4)
    played = play(agent, env, state, keys[0], options.episodes, length)
    first = jnp.zeros(played.valid.shape, bool).at[:, 0].set(True)
    made = rssm_forecast.forecast(
        state.params, played.obs, played.before, first, keys[1], options.context, model.obs,
        model.sizes, **model.latent,
    )  # fmt: skip
    (name,) = made.obs
    errors = rssm_forecast.forecast_errors(
        made.obs[name], played.obs, played.valid, options.context
    )
    seen = options.context - 1
    start = rssm.State(made.deter[:, seen], made.stoch[:, seen])
    small = dataclasses.replace(config, batch_size=options.episodes, batch_length=2)
    draws = jax.tree.map(lambda x: x[:, : options.episodes],
                         dreamer.draw(small, env.spec, keys[2])._replace(posterior=()))  # fmt: skip
    dreamt = dreamer.imagine(config, model, state.params, state.slow, state.range_, start, draws)
    later = jnp.where(played.valid, played.reward, 0.0)[:, options.context :]
    discount = config.gamma ** jnp.arange(later.shape[1])
    return Found(made.obs[name], played.obs, played.valid, errors, dreamt.returns[0],
                 later @ discount)  # fmt: skip


def draw(options: Options, name: str, found: Found) -> list[Path]:
    """The figures of the first seed's longest episode, and those of all seeds."""
    longest = int(np.argmax(np.asarray(found.valid[0]).sum(-1)))
    steps = int(np.asarray(found.valid[0, longest]).sum())
    true, said = (np.asarray(x[0, longest, :steps]) for x in (found.true, found.foretold))
    made: list[Path] = []
    if true.ndim == 2:
        samples = np.asarray(found.foretold[0, longest, :steps])
        made += forecast_plots.curves(
            true, samples, options.out / f"{name}_curves", options.context, title=options.env
        )
    else:
        made.append(forecast_plots.strip(true, said, options.out / name, options.context))
        made.append(forecast_plots.film(true, said, options.out / name, options.context))
    errors = np.maximum(np.asarray(found.errors.mse), 1e-12)
    made += model_plots.error_growth(
        {options.env: errors}, options.out / f"{name}_error", title=f"{options.env}, open loop"
    )
    made += model_plots.imagined_against_real(
        {options.env: (np.ravel(found.real), np.ravel(found.imagined))},
        options.out / f"{name}_returns", title=options.env,
    )  # fmt: skip
    return made


def main(options: Options) -> dict[str, Any]:
    """Trains, foretells and draws; -> the table."""
    started = time.perf_counter()
    env = mbrl_jax.make_env(options.env)
    fields: dict[str, Any] = SMALL_DREAMER | {"size": options.size}
    if options.quick:
        options = dataclasses.replace(options, total_steps=256, seeds=2, episodes=4)
        fields |= QUICK["dreamer"]
    if not isinstance(env.spec.obs, mbrl_jax.types.ArraySpec):
        raise SystemExit(f"--env {options.env}: expected observations of one array")
    result = mbrl_jax.train(
        "dreamer", env, options.total_steps, options.seeds, progress=True, eval_episodes=10,
        eval_every=max(options.total_steps // 4, 1), **fields,
    )  # fmt: skip
    config = mbrl_jax.AGENTS["dreamer"].config_for(env.spec, **fields)
    length = options.length or min(env.spec.episode_limit or 50, 50)
    if not 0 < options.context < length:
        raise SystemExit(f"--context {options.context}: expected 1 to {length - 1}")
    keys = jax.random.split(jax.random.key(1), options.seeds)
    run = jax.jit(jax.vmap(partial(look, config, env, options, length)))
    found = jax.device_get(run(result.state, keys))
    name = f"dreamer_{options.env}{'_quick' if options.quick else ''}"
    files = draw(options, name, found)
    rows: dict[str, Any] = {}
    for depth in range(length - options.context):
        if found.errors.num[:, depth].min() > 0:
            rows[f"{depth + 1} steps ahead"] = {
                "mean squared error": bootstrap_interval(found.errors.mse[:, depth]),
                "numbers that are right": bootstrap_interval(found.errors.accuracy[:, depth]),
            }
    pairs = zip(found.imagined, found.real, strict=True)
    rows["returns"] = {
        "imagined": bootstrap_interval(found.imagined.mean(-1)),
        "real": bootstrap_interval(found.real.mean(-1)),
        "rank correlation": bootstrap_interval(
            np.array([np.nan_to_num(rank_correlation(*map(jnp.asarray, pair))) for pair in pairs])
        ),
    }
    settings = dataclasses.asdict(options)
    del settings["out"]
    settings["files"] = [path.name for path in files]
    return report(options.out, name, {options.env: rows}, started, **settings)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except mbrl_jax.InputError as error:
        raise SystemExit(f"error: {error}") from None
