"""mbrl-lib as a worker of bench_models.py, used as its examples use it. Speaks as peer_process.py.

`OneDTransitionRewardModel` around its `GaussianMLP`: all members in one batched tensor, frozen
bounds of the log-variance, normalised inputs; data in its own iterators; CEM by its own agent.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import omegaconf
import torch
from mbrl import models, planning
from mbrl.types import TransitionBatch
from mbrl.util.replay_buffer import BootstrapIterator, TransitionIterator
from peer_process import faster_threads, serve


def make_model(sizes: dict[str, Any], members: int, propagation: str, learned_rewards: bool):
    obs, act = sizes["obs"], sizes["act"]
    mlp = models.GaussianMLP(
        obs + act, obs + learned_rewards, "cpu", num_layers=len(sizes["hidden"]),
        ensemble_size=members, hid_size=sizes["hidden"][0], propagation_method=propagation,
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    )  # fmt: skip
    return models.OneDTransitionRewardModel(
        mlp, normalize=True, learned_rewards=learned_rewards,
        num_elites=min(sizes["elites"], members),
    )  # fmt: skip


def random_rows(sizes: dict[str, Any], count: int) -> TransitionBatch:
    rng = np.random.default_rng(0)
    obs, next_obs = rng.normal(size=(2, count, sizes["obs"])).astype(np.float32)
    act = rng.uniform(-1, 1, (count, sizes["act"])).astype(np.float32)
    reward = rng.normal(size=count).astype(np.float32)
    flags = np.zeros(count, bool)
    return TransitionBatch(obs, act, obs + 0.1 * next_obs, reward, flags, flags)


def training(request: dict[str, Any]) -> Callable[[], None]:
    """So many epochs of `ModelTrainer`, which looks at the validation rows after each."""
    sizes = request["sizes"]
    rows = random_rows(sizes, request["rows"])
    held = request["held"]
    model = make_model(sizes, sizes["members"], "random_model", True)
    model.update_normalizer(rows)
    trainer = models.ModelTrainer(model, optim_lr=1e-3, weight_decay=5e-5)

    def run() -> None:
        train = BootstrapIterator(
            rows[held:], sizes["batch"], sizes["members"], shuffle_each_epoch=True,
            permute_indices=False, rng=np.random.default_rng(1),
        )  # fmt: skip
        steps = len(train) * request["epochs"]
        if steps != request["steps"]:
            raise SystemExit(f"mbrl-lib makes {steps} gradient steps, not {request['steps']}")
        validation = TransitionIterator(rows[:held], sizes["batch"])
        trainer.train(train, validation, num_epochs=request["epochs"], silent=True)

    return run


def world(request: dict[str, Any], members: int, propagation: str, reward: Any = None):
    """A `ModelEnv` of a task without end."""
    sizes = request["sizes"]
    model = make_model(sizes, members, propagation, reward is None)
    model.update_normalizer(random_rows(sizes, 1_000))
    model.set_elite(list(range(min(sizes["elites"], members))))
    box = gym.spaces.Box(-1.0, 1.0, (sizes["act"],), np.float32)
    spaces = SimpleNamespace(
        observation_space=gym.spaces.Box(-10.0, 10.0, (sizes["obs"],), np.float32), action_space=box
    )

    def never(act: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(next_obs), 1, dtype=torch.bool)

    return models.ModelEnv(spaces, model, never, reward)


def rollouts(request: dict[str, Any]) -> Callable[[], None]:
    """The whole batch, step by step, TS1 over the elites, under random actions."""
    sizes, count = request["sizes"], request["states"]
    env = world(request, sizes["members"], "random_model")
    start = random_rows(sizes, count).obs
    rng = np.random.default_rng(0)

    def run() -> None:
        state = env.reset(start, return_as_np=True)
        kept = []
        for _ in range(request["length"]):
            action = rng.uniform(-1, 1, (count, sizes["act"])).astype(np.float32)
            next_obs, reward, done, state = env.step(action, state, sample=True)
            kept.append((action, next_obs, reward, done))

    return run


def plan(request: dict[str, Any]) -> Callable[[], None]:
    """One action by CEM with particles of a fixed member."""
    cem = request["cem"]

    def reward(act: torch.Tensor, next_obs: torch.Tensor) -> torch.Tensor:
        return -next_obs.square().sum(1, keepdim=True) - 0.1 * act.square().sum(1, keepdim=True)

    env = world(request, request["members"], "fixed_model", reward)
    optimiser = {
        "_target_": "mbrl.planning.CEMOptimizer", "num_iterations": cem["iterations"],
        "elite_ratio": cem["elites"] / cem["samples"], "population_size": cem["samples"],
        "alpha": 0.1, "lower_bound": "???", "upper_bound": "???", "return_mean_elites": True,
        "device": "cpu",
    }  # fmt: skip
    agent = planning.create_trajectory_optim_agent_for_model(
        env,
        omegaconf.OmegaConf.create({
            "_target_": "mbrl.planning.TrajectoryOptimizerAgent", "_recursive_": False,
            "action_lb": "???", "action_ub": "???", "planning_horizon": cem["horizon"],
            "optimizer_cfg": optimiser,
        }),
        num_particles=cem["particles"],
    )  # fmt: skip
    obs = np.zeros(request["sizes"]["obs"], np.float32)
    return lambda: agent.act(obs)


PARTS = {"training": training, "rollouts": rollouts, "planning": plan}


def load(request: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    torch.manual_seed(0)
    work = PARTS[request["part"]](request)

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    tried = faster_threads(torch, run)
    info = {"threads": torch.get_num_threads(), "tried": tried}
    return {**info, "versions": {"torch": torch.__version__}}, run


if __name__ == "__main__":
    serve(load)
