"""A plain PyTorch SAC as a worker of bench_model_free.py: sampling and gradient updates alone.

Two critics and their targets, a squashed Gaussian actor, a learned temperature, Adam (fused) and a
replay in preallocated tensors, run eagerly. It speaks as peer_process.py tells.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from peer_process import faster_threads, serve
from torch import Tensor, nn
from torch.nn import functional


def mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(sizes):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    def __init__(self, obs_size: int, action_size: int, hidden: list[int]):
        super().__init__()
        self.net = mlp([obs_size, *hidden, 2 * action_size])

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Actions in (-1, 1) [B, D] and their log-densities [B]."""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-20.0, 2.0)
        noise = torch.randn_like(mean)
        before = mean + log_std.exp() * noise
        normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        squash = 2.0 * (math.log(2.0) - before - functional.softplus(-2.0 * before))
        return before.tanh(), (normal - squash).sum(dim=-1)


class Critics(nn.Module):
    def __init__(self, obs_size: int, action_size: int, hidden: list[int]):
        super().__init__()
        sizes = [obs_size + action_size, *hidden, 1]
        self.first, self.second = mlp(sizes), mlp(sizes)

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([obs, action], dim=-1)
        return self.first(x).squeeze(-1), self.second(x).squeeze(-1)


class Replay:
    """Transitions in one tensor each, full from the start."""

    def __init__(self, capacity: int, obs_size: int, action_size: int):
        self.capacity = capacity
        self.obs = torch.randn(capacity, obs_size)
        self.action = torch.rand(capacity, action_size) * 2.0 - 1.0
        self.reward = -torch.rand(capacity)
        self.next_obs = torch.randn(capacity, obs_size)
        self.terminated = torch.zeros(capacity)

    def sample(self, batch_size: int) -> tuple[Tensor, ...]:
        index = torch.randint(self.capacity, (batch_size,))
        columns = (self.obs, self.action, self.reward, self.next_obs, self.terminated)
        return tuple(column[index] for column in columns)


class SAC:
    def __init__(self, obs_size: int, action_size: int, hidden: list[int], gamma: float,
                 tau: float, learning_rate: float):  # fmt: skip
        self.gamma, self.tau, self.target_entropy = gamma, tau, -float(action_size)
        self.actor = Actor(obs_size, action_size, hidden)
        self.critics = Critics(obs_size, action_size, hidden)
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_temperature = torch.zeros((), requires_grad=True)

        def adam(parameters: Any) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, lr=learning_rate, fused=True)

        self.actor_opt = adam(self.actor.parameters())
        self.critic_opt = adam(self.critics.parameters())
        self.temperature_opt = adam([self.log_temperature])

    def update(self, batch: tuple[Tensor, ...]) -> None:
        """One gradient step of the critics, the actor and the temperature."""
        obs, action, reward, next_obs, terminated = batch
        temperature = self.log_temperature.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = self.actor(next_obs)
            next_q = torch.minimum(*self.targets(next_obs, next_action))
            next_value = next_q - temperature * next_log_prob
            target = reward + self.gamma * (1.0 - terminated) * next_value
        first, second = self.critics(obs, action)
        errors = functional.mse_loss(first, target) + functional.mse_loss(second, target)
        critic_loss = 0.5 * errors
        self.critic_opt.zero_grad()
        critic_loss.backward()
        self.critic_opt.step()

        self.critics.requires_grad_(False)  # the actor's loss needs no gradients of theirs
        new_action, log_prob = self.actor(obs)
        q = torch.minimum(*self.critics(obs, new_action))
        actor_loss = (temperature * log_prob - q).mean()
        self.actor_opt.zero_grad()
        actor_loss.backward()
        self.actor_opt.step()
        self.critics.requires_grad_(True)

        error = log_prob.detach().mean() + self.target_entropy
        self.temperature_opt.zero_grad()
        (-self.log_temperature * error).backward()
        self.temperature_opt.step()

        with torch.no_grad():
            for old, new in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
                old.lerp_(new, self.tau)


def load(request: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], float]]:
    """Builds the learner, and takes one thread or all of them, whichever is faster."""
    torch.manual_seed(0)
    cell, num_updates = request["cell"], request["updates"]
    replay = Replay(cell["buffer_size"], request["obs_size"], request["action_size"])
    sac = SAC(
        request["obs_size"], request["action_size"], cell["hidden"], cell["gamma"], cell["tau"],
        cell["learning_rate"],
    )  # fmt: skip

    def run(count: int = num_updates) -> float:
        start = time.perf_counter()
        for _ in range(count):
            sac.update(replay.sample(cell["batch_size"]))
        return time.perf_counter() - start

    tried = faster_threads(torch, lambda: run(max(1, num_updates // 2)))
    best = torch.get_num_threads()
    info = {"mode": f"{best} thread" + "s" * (best > 1), "tried": tried}
    return {**info, "versions": {"torch": torch.__version__}}, run


if __name__ == "__main__":
    serve(load)
