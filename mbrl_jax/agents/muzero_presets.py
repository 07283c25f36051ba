"""MuZero's settings by environment, and the plain ones to start reading from."""

from __future__ import annotations

from typing import Any

from mbrl_jax.agents.muzero_config import Config

PLAIN = Config(
    search="puct", num_simulations=50, value_target="n_step", n_step=10,
    reanalyse_policies=0, reanalyse_values=0,
)  # fmt: skip
"""Schrittwieser et al. (2020): PUCT with root noise and temperature, n-step returns from the
values of the search that acted, policies by its visits."""

# networks and batches that two cores train at some hundred steps a second
_SMALL: dict[str, Any] = {
    "batch_size": 64,
    "num_simulations": 8,
    "hidden": (32,),
    "bins": 31,
    "decay_updates": 10_000.0,
}
# one reward at the end of an episode, which is shorter than its limit
_CATCH = _SMALL | {
    "value_limit": 1,
    "bins": 21,
    "learning_rate": 2e-3,
    "learning_rate_final": 2e-4,
    "decay_updates": 12_000.0,
    "value_scale": 0.05,
    "lam": 0.97,
    "gamma": 0.99,
}
# an end that random actions seldom reach, and values of some hundreds, whose last unit is noise
_SWING = _SMALL | {
    "n_step": 25,
    "lam": 0.97,
    "least_range": 3.0,
    "warmup_steps": 4_000,
    "warmup_repeat": 0.8,
    "decay_updates": 50_000.0,
}
# chance decides what comes of an action, so that returns are short and visits keep exploring
_LAKE = _SMALL | {
    "search": "puct",
    "num_simulations": 16,
    "temperature_steps": 40_000.0,
    "least_range": 0.1,
    "value_limit": 1,
    "bins": 21,
    "gamma": 0.99,
    "n_step": 3,
    "lam": 1.0,
    "updates": 4,
    "warmup_steps": 4_000,
    "learning_rate": 2e-3,
    "learning_rate_final": 2e-4,
    "decay_updates": 15_000.0,
}
_MINATAR = _SMALL | {
    "torso": "vector",
    "width": 128,
    "hidden": (64,),
    "num_envs": 16,
    "updates": 4,
    "learning_rate": 1e-3,
    "learning_rate_final": 1e-4,
    "decay_updates": 100_000.0,
    "warmup_steps": 5_000,
}
_GAMES = ("Asterix", "Breakout", "Freeway", "SpaceInvaders")
# The whole of a game is a return and nothing is discounted; policies are those of the searches that
# played. Vectors, since a convolution costs two cores many times as much.
_BOARD: dict[str, Any] = {
    "torso": "vector",
    "width": 128,
    "hidden": (64,),
    "bins": 21,
    "gamma": 1.0,
    "lam": 1.0,
    "num_simulations": 25,
    "num_envs": 64,
    "buffer_size": 98_304,
    "updates": 4,
    "batch_size": 256,
    "reanalyse_policies": 0,
    "reanalyse_values": 0,
    "learning_rate": 2e-3,
    "learning_rate_final": 2e-4,
    "decay_updates": 30_000.0,
    "warmup_steps": 4_096,
}
_LARGE_BOARD = _BOARD | {
    "width": 256,
    "num_envs": 128,
    "buffer_size": 393_216,
    "num_simulations": 32,
    "warmup_steps": 16_384,
    "decay_updates": 100_000.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": _SMALL | {"n_step": 25, "lam": 0.97},
    "Acrobot-v1": _SWING,
    "MountainCar-v0": _SWING,
    "Catch-bsuite": _CATCH,
    "DeepSea-bsuite": _CATCH | {"decay_updates": 50_000.0},
    "FrozenLake-misc": _LAKE,
    **{f"{game}-MinAtar": _MINATAR for game in _GAMES},
    "Seaquest-MinAtar": _MINATAR | {"reward_range": (-10.0, 10.0)},
    "Pendulum-v1": _SMALL
    | {
        "search": "sampled",
        "num_simulations": 16,
        "reward_range": (-17.0, 0.0),
        "gamma": 0.99,
        "bins": 51,
    },
    "TicTacToe-pgx": _BOARD | {"n_step": 9, "unroll": 4},
    "ConnectFour-pgx": _LARGE_BOARD | {"n_step": 42},
    "Othello-pgx": _LARGE_BOARD | {"n_step": 60},
    "Go9x9-pgx": _LARGE_BOARD | {"n_step": 81},
}
