"""MBPO's settings by environment: the paper's for MuJoCo, small ones for classic control."""

from __future__ import annotations

# of the paper and its code (jannerm/mbpo); entropies are for each dimension of the action
_PAPER = {"updates": 20, "sac": {"target_entropy": -0.5}}
_SAC = {
    "hidden": (64, 64),
    "critic_hidden": (64, 64),
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "temperature_learning_rate": 1e-3,
    "gamma": 0.98,
    "reward_scale": 0.1,
    "tau": 0.01,
    "target_entropy": -1.0,
    "layer_norm": True,
}
_SMALL = {
    "model": {"hidden": (128, 128), "weight_decay": (1e-5,)},
    "training": {"batch_size": 32},
    "sac": _SAC,
    "num_members": 5,
    "num_elites": 3,
    "model_period": 100,
    "rollouts_per_step": 100,
    "real_ratio": 0.1,
    "batch_size": 128,
    "buffer_size": 50_000,
    "warmup_steps": 200,
}
PRESETS = {
    "Pendulum-v1": {**_SMALL, "model_period": 50, "rollout_length": (10, 10), "updates": 40},
    "ContinuousCartPole-v0": {**_SMALL, "sac": {**_SAC, "gamma": 0.995, "learning_rate": 3e-4}},
    "MountainCarContinuous-v0": {
        **_SMALL,
        "sac": {**_SAC, "gamma": 0.99, "noise_correlation": 0.99},
        "warmup_steps": 1_000,
    },
    "Reacher-misc": _SMALL,
    "PointRobot-misc": _SMALL,
    "HalfCheetah-v5": _PAPER | {"updates": 40, "buffer_size": 400_000},
    "Hopper-v5": {
        "updates": 20,
        "sac": {"target_entropy": -1.0 / 3.0},
        "rollout_length": (1, 15),
        "buffer_size": 125_000,
    },
    "Walker2d-v5": _PAPER | {"buffer_size": 300_000},
    "Ant-v5": _PAPER
    | {
        "rollout_length": (1, 25),
        "rollout_growth": (20_000, 100_000),
        "buffer_size": 300_000,
    },
    "Humanoid-v5": {
        "model": {"hidden": (400, 400, 400, 400)},
        "updates": 20,
        "sac": {"target_entropy": -2.0 / 17.0},
        "model_period": 1_000,
        "retained": 5,
        "rollouts_per_step": 100,
        "rollout_length": (1, 25),
        "rollout_growth": (20_000, 300_000),
        "buffer_size": 300_000,
    },
    "InvertedPendulum-v5": {
        "updates": 10,
        "sac": {"target_entropy": -0.05},
        "retained": 1,
        "buffer_size": 20_000,
        "warmup_steps": 500,
    },
}
