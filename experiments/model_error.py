"""How a learned model errs, and what four remedies do about it, on data of a random policy.

    python experiments/model_error.py

For each environment and seed an ensemble is fitted to random steps. It is then asked for one-step
errors, open-loop errors over k steps against true trajectories of the random policy ("in
distribution") and from states drawn far beyond them ("out of distribution"), the rank correlation
of its disagreement with its true error, and the coverage of its intervals. The remedies are
compared by the error of the transitions that they would hand to an agent.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

DEPTHS = (1, 5, 10, 20)
PARTS = {"near": "in distribution", "far": "out of distribution"}
ENVS = ("CartPole-v1", "Pendulum-v1")
# (lowest, highest) of the states out of distribution, in the units of the observations
FAR = {
    "CartPole-v1": ((-2.4, -3.0, -0.2, -3.0), (2.4, 3.0, 0.2, 3.0)),
    "Pendulum-v1": ((-np.pi, -8.0), (np.pi, 8.0)),  # angle and velocity
}


def main(
    seeds: int = 5,
    steps: int = 2_000,
    out: Path = Path("experiments/results"),
    only: str = "",
    quick: bool = False,
) -> None:
    """One-step and k-step errors, their growth, disagreement against error, coverage, remedies.

    Args:
      seeds: ensembles for each environment, each with data of its own.
      steps: of the random policy that an ensemble is fitted to.
      out: folder of the figure and of the table.
      only: a regular expression; environments match by their id.
      quick: 2 seeds and small networks, to see that it runs.
    """
    from common import report

    started = time.perf_counter()
    if quick:
        seeds, steps = 2, 300
    name = "model_error_quick" if quick else "model_error"
    tables: dict[str, Any] = {}
    for env_id in (env_id for env_id in ENVS if re.search(only, env_id)):
        measured = jax.tree.map(np.asarray, measure(env_id, seeds, steps, quick))
        tables |= {f"{env_id}: {title}": rows for title, rows in columns(measured).items()}
        draw(measured, env_id, out / f"{name}_{env_id.split('-')[0].lower()}")
    report(out, name, tables, started, seeds=seeds, steps=steps)


def measure(env_id: str, seeds: int, steps: int, quick: bool) -> dict[str, jax.Array]:
    """Everything that is measured, each array with the leading axis of the seeds."""
    from mbrl_jax import make_env
    from mbrl_jax.envs.env import reset_batch, step_batch
    from mbrl_jax.models import diagnostics, dynamics, ensemble, fit, rollout, rollout_rules
    from mbrl_jax.models.oracle import oracle

    env = make_env(env_id)
    truth, longest = oracle(env), max(DEPTHS)
    hidden = (32, 32) if quick else (200, 200, 200)
    net = dynamics.Config(hidden=hidden, weight_decay=(1e-5,), reward="known", termination="known")
    training = fit.Config(batch_size=128, patience=10, max_epochs=5 if quick else 100)
    many = ensemble.make(net, env.spec, 7, 7)

    def random_steps(key: jax.Array) -> Any:
        """[steps] steps of one environment under the random policy."""
        reset_key, key = jax.random.split(key)

        def step(batch, t):
            action_key, step_key = jax.random.split(jax.random.fold_in(key, t))
            return step_batch(env, step_key, batch, env.spec.random_action(action_key)[None])

        batch = reset_batch(env, reset_key, 1)
        return jax.tree.map(lambda x: x[:, 0], jax.lax.scan(step, batch, jnp.arange(steps))[1])

    def far_states(key: jax.Array, num: int) -> jax.Array:
        low, high = jnp.array(FAR[env_id])
        drawn = jax.random.uniform(key, (num, len(low)), minval=low, maxval=high)
        if env_id != "Pendulum-v1":
            return drawn
        return jnp.stack([jnp.cos(drawn[:, 0]), jnp.sin(drawn[:, 0]), drawn[:, 1]], axis=-1)

    def true_paths(obs: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Random actions [T, N, ...] from obs [N, D], what truly follows, and until when."""
        action_key, key = jax.random.split(key)
        draws = jax.random.split(action_key, longest * obs.shape[0]).reshape(longest, -1)
        actions = jax.vmap(jax.vmap(env.spec.random_action))(draws)
        path = rollout.rollout(truth, env.params, obs, actions, key)
        return actions, path.transition.next_obs, path.mask

    def errors(params: Any, obs: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        path_key, k_step_key, key = jax.random.split(key, 3)
        actions, after, mask = true_paths(obs, path_key)
        model = many.model("expectation", "std")
        k_step = diagnostics.k_step_errors(model, params, obs, actions, after, mask, k_step_key)
        first = model.predict(params, obs, actions[0], key)
        # in the units of the disagreement, where no dimension outweighs the others
        unit = params.scaling.y_std[None]
        error = jnp.mean(jnp.abs(first.next_obs - after[0]) / unit, axis=-1)
        gaussians = many.predict(params, obs, actions[0])
        y = many.dynamics.targets(obs, obs[:, 0], after[0])
        calibrated = diagnostics.calibration(gaussians, y)
        scale, growth = diagnostics.growth_rate(k_step.total)
        return {
            "k_step": k_step.total,
            "growth": growth,
            "scale": scale,
            "rank_correlation": diagnostics.rank_correlation(first.disagreement, error),
            "coverage": calibrated.coverage,
            "pit": calibrated.pit,
            "nll": calibrated.nll,
            "disagreement": first.disagreement,
            "error": error,
        }

    def promises(params: Any, obs: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        """Returns of the same random actions under the model and in truth."""

        def act(obs: jax.Array, key: jax.Array, depth: jax.Array) -> jax.Array:
            return jax.vmap(env.spec.random_action)(jax.random.split(key, obs.shape[0]))

        def summed(model: Any, params: Any) -> jax.Array:
            same = jax.random.clone(key)
            return diagnostics.imagined_returns(model, params, obs, act, same, longest)

        return {
            "imagined": summed(many.model("ts1"), params),
            "real": summed(truth, env.params),
        }

    def remedies(params: Any, obs: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        """Error of the transitions that an agent would get: model state against true state."""
        path_key, first_key, key = jax.random.split(key, 3)
        actions, after, mask = true_paths(obs, path_key)
        model = many.model("ts1", "std")

        def kept(depth: int, rules: rollout.Rules) -> tuple[jax.Array, jax.Array]:
            same = jax.random.clone(key)  # the remedies meet the same noise
            path = rollout.rollout(model, params, obs, actions, same, length=depth, rules=rules)
            error = jnp.mean(jnp.square(path.transition.next_obs - after), axis=-1)
            use = path.mask & mask
            return jnp.sum(jnp.where(use, error, 0.0)) / jnp.maximum(jnp.sum(use), 1), jnp.sum(use)

        first = model.predict(params, obs, actions[0], first_key).disagreement
        cut = rollout.Rules(threshold=jnp.percentile(first, 95.0))
        sure = rollout.Rules(keep=lambda depth: rollout_rules.m2ac_share(depth, longest))
        plain, total = kept(longest, rollout.NO_RULES)
        found = {"none": (plain, total), "short rollouts (5)": kept(5, rollout.NO_RULES)}
        found |= {"disagreement (M2AC)": kept(longest, sure), "truncation": kept(longest, cut)}
        # half of a batch is real and has no error
        found["half real data"] = (0.5 * plain, 2 * total)
        return {name: jnp.stack([e, n / total]) for name, (e, n) in found.items()}

    def one(key: jax.Array) -> dict[str, Any]:
        data_key, init_key, fit_key, far_key, *keys = jax.random.split(key, 8)
        both = jax.vmap(random_steps)(jax.random.split(data_key))
        data, fresh = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in range(2))
        params = many.init(init_key)
        rows = fit.Transition(*data[:6])
        opt = many.init_opt(params)
        params, _, _ = many.fit(params, opt, training, rows, jnp.int32(steps), fit_key)
        near = fresh.obs[: min(steps, 1_000)]
        far = far_states(far_key, near.shape[0])
        return {
            "near": errors(params, near, keys[0]),
            "far": errors(params, far, keys[1]),
            "remedies": remedies(params, near, keys[2]),
            "returns": promises(params, near, keys[3]),
        }

    keys = jax.random.split(jax.random.key(0), seeds)
    return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)


def columns(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of one environment."""
    from common import mean_interval

    quality: dict[str, Any] = {}
    for name, words in PARTS.items():
        part = measured[name]
        column = {f"MSE after {k}": mean_interval(part["k_step"][:, k - 1]) for k in DEPTHS}
        column["growth of the error a step"] = mean_interval(np.exp(part["growth"]))
        column["rank correlation"] = mean_interval(part["rank_correlation"])
        for i, level in enumerate((50, 90, 95)):
            column[f"coverage of {level} %"] = mean_interval(part["coverage"][:, i])
        column["NLL, nats a dimension"] = mean_interval(part["nll"])
        quality[words] = column
    gap = measured["returns"]["imagined"] - measured["returns"]["real"]
    quality["in distribution"]["imagined minus real return"] = mean_interval(gap.mean(axis=1))
    remedies = {
        name: {
            "MSE of the transitions": mean_interval(values[:, 0]),
            "transitions, of those without": mean_interval(values[:, 1]),
        }
        for name, values in measured["remedies"].items()
    }
    return {"quality": quality, "remedies": remedies}


def draw(measured: dict[str, Any], env_id: str, path: Path) -> None:
    """A figure for each diagnostic; dots are those of the first seed."""
    from mbrl_jax.analysis import model_plots

    parts = {words: measured[name] for name, words in PARTS.items()}
    fits = {
        words: (np.exp(np.mean(np.log(part["scale"]))), np.mean(part["growth"]))
        for words, part in parts.items()
    }
    k_step = {words: part["k_step"] for words, part in parts.items()}
    model_plots.error_growth(k_step, f"{path}_growth", fits=fits, title=env_id)
    pit = {words: part["pit"] for words, part in parts.items()}
    model_plots.calibration(pit, f"{path}_calibration", title=env_id)
    few = slice(400)
    dots = {
        words: (part["disagreement"][0, few], part["error"][0, few])
        for words, part in parts.items()
    }
    model_plots.disagreement_against_error(dots, f"{path}_disagreement", title=env_id)
    returns = {
        "random policy": [measured["returns"][name][0, few] for name in ("real", "imagined")]
    }
    model_plots.imagined_against_real(returns, f"{path}_returns", title=env_id)


if __name__ == "__main__":
    tyro.cli(main)
