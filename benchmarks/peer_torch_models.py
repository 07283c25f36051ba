"""The plain PyTorch of textbooks as a worker of bench_models.py: networks one after another.

Five separate probabilistic networks, each trained on a bootstrap of its own and judged on the
held-out rows after each pass, and a rollout that takes one state at a time. Run eagerly, with
PyTorch's defaults; it speaks as peer_process.py tells.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from peer_process import faster_threads, serve
from torch import Tensor, nn
from torch.nn import functional


class Network(nn.Module):
    """Mean and bounded log-variance of a step."""

    def __init__(self, sizes: dict[str, Any]):
        super().__init__()
        self.outputs = sizes["obs"] + 1
        widths = [sizes["obs"] + sizes["act"], *sizes["hidden"], 2 * self.outputs]
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.net(x).chunk(2, dim=-1)
        logvar = 0.5 - functional.softplus(0.5 - logvar)
        return mean, -10.0 + functional.softplus(logvar + 10.0)


def training(request: dict[str, Any]) -> Callable[[], None]:
    sizes, count = request["sizes"], request["rows"] - request["held"]
    x = torch.randn(count, sizes["obs"] + sizes["act"])
    y = torch.randn(count, sizes["obs"] + 1)
    held_x = torch.randn(request["held"], x.shape[1])
    held_y = torch.randn(request["held"], y.shape[1])
    networks = [Network(sizes) for _ in range(request["members"])]
    optimisers = [
        torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=5e-5) for net in networks
    ]

    def run() -> None:
        for net, optimiser in zip(networks, optimisers, strict=True):
            rows = torch.randint(count, (count,))
            for step in range(request["steps"]):
                index = rows[torch.randint(count, (sizes["batch"],))]
                mean, logvar = net(x[index])
                loss = ((mean - y[index]).square() * (-logvar).exp() + logvar).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if (step + 1) % (request["steps"] // request["epochs"]) == 0:
                    with torch.no_grad():
                        float((net(held_x)[0] - held_y).square().mean())

    return run


def rollouts(request: dict[str, Any]) -> Callable[[], None]:
    """Each state by itself: a random network, its sample, a random action."""
    sizes = request["sizes"]
    networks = [Network(sizes) for _ in range(sizes["elites"])]
    states = torch.randn(request["states"], sizes["obs"])

    @torch.no_grad()
    def run() -> None:
        kept = []
        for obs in states:
            for _ in range(request["length"]):
                net = networks[int(torch.randint(len(networks), ()))]
                action = 2.0 * torch.rand(sizes["act"]) - 1.0
                mean, logvar = net(torch.cat([obs, action]))
                step = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
                next_obs = obs + step[:-1]
                kept.append((obs, action, step[-1], next_obs))
                obs = next_obs

    return run


PARTS = {"training": training, "rollouts": rollouts}


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
