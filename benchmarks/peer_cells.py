"""What bench_model_free.py compares: settings that ours and rejax both understand.

Environment steps and gradient updates follow from a cell alone; the benchmark checks them against
the counters of both sides.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A setting that both sides understand; the defaults are rejax's where it has one."""

    name: str
    agent: str
    env: str
    steps: tuple[int, int]  # of each seed: one seed, 16 seeds and more; fewer seeds take more
    hidden: tuple[int, ...] = (64, 64)
    activation: str = "swish"
    num_envs: int = 1
    learning_rate: float = 3e-4
    gamma: float = 0.99
    max_grad_norm: float = 10.0
    # dqn and sac; `updates` after each batched step, then one move of the target network
    buffer_size: int = 10_000
    warmup_steps: int = 256  # environment steps without updates
    batch_size: int = 256
    updates: int = 1
    tau: float = 0.02
    # ppo
    num_steps: int = 1
    epochs: int = 4
    minibatches: int = 4
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.01

    def total_steps(self, seeds: int, quick: bool) -> int:
        """Environment steps of each seed, a whole number of rounds."""
        first = 0 if self.agent == "ppo" else self.warmup_steps
        many = self.steps[1] * 16 // min(seeds, 16)
        steps = self.steps[0] if seeds == 1 else min(self.steps[0], many)
        block = self.num_envs * self.num_steps
        return first + block * (2 if quick else max(2, (steps - first) // block))

    def num_updates(self, total_steps: int) -> int:
        """Gradient updates of each seed."""
        if self.agent == "ppo":
            rounds = total_steps // (self.num_envs * self.num_steps)
            return rounds * self.epochs * self.minibatches
        return (total_steps - self.warmup_steps) // self.num_envs * self.updates

    def fields(self, total_steps: int) -> dict[str, Any]:
        """Our config."""
        names = ("hidden", "activation", "learning_rate", "gamma", "num_envs")
        if self.agent == "ppo":
            names += ("num_steps", "epochs", "minibatches", "gae_lambda", "clip_eps")
            names += ("value_coef", "entropy_coef", "max_grad_norm")
        else:
            names += ("buffer_size", "warmup_steps", "batch_size", "updates", "tau")
        fields = {name: getattr(self, name) for name in names}
        if self.agent == "dqn":
            plain = {"duelling": False, "prioritised": False, "n_step": 1, "loss": "square"}
            fields |= plain | {"double": True, "steps_per_update": 1}
            fields |= {"target_period": self.updates, "max_grad_norm": self.max_grad_norm}
            fields |= {"epsilon_final": 0.05, "epsilon_steps": 0.5 * total_steps}
        if self.agent == "sac":
            rates = ("critic_learning_rate", "temperature_learning_rate")
            fields |= dict.fromkeys(rates, self.learning_rate)
            fields |= {"critic_hidden": self.hidden, "num_critics": 2, "target_subset": 2}
        return fields

    def flops(self, spec: Any) -> int:
        """Of the dense layers in one gradient update; a backward pass counts as two forward."""
        obs, actions = spec.obs_shape[0], spec.num_actions or spec.action_shape[0]

        def net(size: int, out: int) -> int:
            widths = (size, *self.hidden, out)
            return sum(2 * a * b for a, b in itertools.pairwise(widths))

        if self.agent == "dqn":  # trained, target, and the choice of double Q-learning
            return self.batch_size * 5 * net(obs, actions)
        if self.agent == "ppo":
            batch = self.num_envs * self.num_steps // self.minibatches
            return batch * 3 * (net(obs, actions) + net(obs, 1))
        # actor: at the successors, and trained through both critics, whose weights stay
        return self.batch_size * (4 * net(obs, 2 * actions) + 12 * net(obs + actions, 1))


# rejax's configs are those of its repository; step sizes and discounts, which cost nothing, aside
CARTPOLE = {"env": "CartPole-v1", "learning_rate": 1e-3}
CELLS = (
    Cell("dqn, 1 env", "dqn", **CARTPOLE, steps=(12_000, 3_000), activation="relu",
         batch_size=128, warmup_steps=1_000),
    Cell("dqn, 16 envs", "dqn", **CARTPOLE, steps=(160_000, 32_000), activation="relu",
         num_envs=16, batch_size=128, warmup_steps=1_024),
    # its cartpole.yaml, less duelling heads and 4,000 of its 5,000 steps without updates
    Cell("dqn, rejax's config", "dqn", **CARTPOLE, steps=(20_000, 5_000), num_envs=10,
         buffer_size=50_000, warmup_steps=1_000, batch_size=100, updates=5),
    Cell("ppo CartPole, 32 x 128", "ppo", **CARTPOLE, steps=(409_600, 40_960), activation="tanh",
         num_envs=32, num_steps=128, max_grad_norm=0.5),
    # its cartpole.yaml
    Cell("ppo CartPole, rejax's config", "ppo", **CARTPOLE, steps=(250_000, 50_000),
         activation="tanh", num_envs=5, num_steps=100, epochs=5, minibatches=5, max_grad_norm=0.5),
    Cell("ppo Pendulum, 64 x 64", "ppo", "Pendulum-v1", (409_600, 40_960), num_envs=64,
         num_steps=64, entropy_coef=0.0, max_grad_norm=0.5),
    # its pendulum.yaml, less the normalisation of observations
    Cell("sac 64 x 64, rejax's config", "sac", "Pendulum-v1", (4_000, 600)),
    Cell("sac 256 x 256", "sac", "Pendulum-v1", (1_000, 320), hidden=(256, 256), activation="relu"),
)  # fmt: skip
