"""mbrl-lib's MBPO as a worker of bench_mbpo.py: `mbpo.train` as its example calls it.

mbrl-lib updates the policy only once a model was trained, at the end of the first period, so the
clock starts there; it stops when `train` returns, whose one evaluation is an episode of one step.
It speaks as peer_process.py tells.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import omegaconf
import torch
from mbrl.algorithms import mbpo
from peer_process import serve


class Linear(gym.Env):
    """Observations that drift linearly, as in bench_mbpo.py."""

    def __init__(self, obs: int, act: int):
        self.observation_space = gym.spaces.Box(-10.0, 10.0, (obs,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (act,), np.float32)

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        self.state, self.steps = np.zeros(self.observation_space.shape, np.float32), 0
        return self.state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        push = np.resize(action, self.state.shape)
        self.state = (0.95 * self.state + 0.1 * push).astype(np.float32)
        self.steps += 1
        return self.state, -float(np.square(self.state).sum()), False, self.steps == 1000, {}


class Clocked(gym.Wrapper):
    """Notes when step number `after` begins; ends every episode at once where `short`."""

    def __init__(self, env: gym.Env, after: int = 0, short: bool = False):
        super().__init__(env)
        self.after, self.short, self.taken, self.began = after, short, 0, 0.0

    def step(self, action: np.ndarray) -> Any:
        if self.taken == self.after:
            self.began = time.perf_counter()
        self.taken += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated or self.short, info


def box(low: Any, high: Any, shape: Any) -> gym.spaces.Box:
    """The action space from lists, as mbrl-lib's configuration holds them."""
    return gym.spaces.Box(np.float32(list(low)), np.float32(list(high)), dtype=np.float32)


def config(request: dict[str, Any], steps: int) -> omegaconf.DictConfig:
    s = request["settings"]
    return omegaconf.OmegaConf.create({
        "seed": 0, "device": "cpu", "log_frequency_agent": 10**9,
        "algorithm": {
            "name": "mbpo", "normalize": True, "normalize_double_precision": False,
            "target_is_delta": True, "learned_rewards": True, "freq_train_model": s["period"],
            "real_data_ratio": s["real_ratio"], "sac_samples_action": True,
            "initial_exploration_steps": s["warmup"], "random_initial_explore": True,
            "num_eval_episodes": 1, "dataset_size": s["warmup"] + steps,
            "agent": {
                "_target_": "mbrl.third_party.pytorch_sac_pranz24.sac.SAC", "num_inputs": "???",
                "action_space": {
                    "_target_": "peer_mbpo.box", "low": "???", "high": "???", "shape": "???",
                },
                "args": {
                    "gamma": 0.99, "tau": 0.005, "alpha": 0.2, "policy": "Gaussian",
                    "target_update_interval": 1, "automatic_entropy_tuning": True,
                    "target_entropy": -1.0, "hidden_size": s["sac_hidden"], "device": "cpu",
                    "lr": 3e-4,
                },
            },
        },
        "dynamics_model": {
            "_target_": "mbrl.models.GaussianMLP", "_recursive_": False, "device": "cpu",
            "num_layers": s["model_layers"], "ensemble_size": s["members"],
            "hid_size": s["model_hidden"], "in_size": "???", "out_size": "???",
            "deterministic": False, "propagation_method": "random_model",
            "learn_logvar_bounds": False, "activation_fn_cfg": {"_target_": "torch.nn.SiLU"},
        },
        "overrides": {
            "num_steps": steps, "epoch_length": steps, "num_elites": s["elites"],
            "num_epochs_train_model": s["epochs"], "patience": s["epochs"] + 1,
            "model_lr": 1e-3, "model_wd": 5e-5, "model_batch_size": s["model_batch"],
            "validation_ratio": 0.2, "freq_train_model": s["period"],
            "effective_model_rollouts_per_step": s["rollouts"],
            "rollout_schedule": [1, 2, 1, 1], "num_sac_updates_per_step": s["updates"],
            "sac_updates_every_steps": 1, "num_epochs_to_retain_sac_buffer": 1,
            "sac_batch_size": s["batch"],
        },
    })  # fmt: skip


def load(request: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    def make() -> gym.Env:
        if request["env"] == "linear":
            return Linear(*request["shape"])
        return gym.make(request["env"])

    def never(act: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(next_obs), 1, dtype=torch.bool)

    period = request["settings"]["period"]

    def train(steps: int) -> float:
        env = Clocked(make(), after=request["settings"]["warmup"] + period)
        with tempfile.TemporaryDirectory() as folder:
            mbpo.train(env, Clocked(make(), short=True), never, config(request, period + steps),
                       silent=True, work_dir=folder)  # fmt: skip
        return time.perf_counter() - env.began

    tried = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        tried[threads] = train(max(period // 4, 1))
    torch.set_num_threads(min(tried, key=lambda threads: tried[threads]))
    info = {"threads": torch.get_num_threads(), "tried": tried}
    versions = {"torch": torch.__version__}
    return {**info, "versions": versions}, lambda: train(request["steps"])


if __name__ == "__main__":
    serve(load)
