"""The update's share of a whole training step: forward (in float32 and under bf16 autocast), backward, update."""

from __future__ import annotations

from time import perf_counter

import torch
from torch import nn

from benchmarks.common.measure import summary
from benchmarks.common.setups import BETA, NETWORKS, SGD
from benchmarks.common.variants import shift_by_name
from cts_fast import ShiftingMetaOptimizer
from cts_fast.experiments.meta_train import PRECISIONS, loss

WHOLE = {  # network → (features, images a task, side of the images)
    "resnet20": (64, 128, 32),
    "resnet18": (512, 32, 64),
}


class _Net(nn.Module):
    def __init__(self, network: str, features: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = NETWORKS[network](), nn.Linear(features, classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class _Loop:
    """The plain loop: one SGD a task, then mean of differences, meta-update and shift, parameter by parameter."""

    def __init__(self, nets: list[_Net]) -> None:
        self.optimizers = [torch.optim.SGD(net.parameters(), foreach=False, **SGD) for net in nets]
        self.bodies = [dict(net.body.named_parameters()) for net in nets]
        self.base = {name: p.detach().clone() for name, p in self.bodies[0].items()}

    @torch.no_grad()
    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        shift_by_name(self.base, self.bodies)


def whole_step(network: str, backend: str, repeats: int, tasks: int = 8, classes: int = 10) -> dict[str, object]:
    """Milliseconds of forward and backward of T tasks and of the update.

    The update: by `step()` and by the plain loop, on the same gradients.
    """
    features, batch, side = WHOLE[network]
    torch.manual_seed(0)
    nets, twins = ([_Net(network, features, classes) for _ in range(tasks)] for _ in range(2))
    for net in (*nets[1:], *twins):
        net.load_state_dict(nets[0].state_dict())
    bodies, heads = [net.body.named_parameters() for net in nets], [net.head.parameters() for net in nets]
    optimizer = ShiftingMetaOptimizer(bodies, heads=heads, meta_lr=BETA, horizon=None, backend=backend, **SGD)
    loop = _Loop(twins)
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,))
    passes = {"fp32": "forward and backward", "bf16": "forward and backward, bf16"}
    seconds: dict[str, list[float]] = {name: [] for name in (*passes.values(), "update, step()", "update, naive loop")}
    for _ in range(repeats + 1):
        for precision in reversed(PRECISIONS):  # the step takes the gradients of the last one, float32
            optimizer.zero_grad()
            start = perf_counter()
            for net in nets:
                loss(net, images, labels, precision).backward()
            seconds[passes[precision]].append(perf_counter() - start)
        start = perf_counter()
        optimizer.step()
        seconds["update, step()"].append(perf_counter() - start)
        for net, twin in zip(nets, twins, strict=True):
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                q.grad = p.grad
        start = perf_counter()
        loop.step()
        seconds["update, naive loop"].append(perf_counter() - start)
    rows = {name: summary(times[1:]) for name, times in seconds.items()}
    network_ms = rows["forward and backward"]["ms"]
    updates = {name: rows[name]["ms"] for name in ("update, step()", "update, naive loop")}
    shares = {name: ms / (ms + network_ms) for name, ms in updates.items()}
    return {"images": batch, "side": side, "tasks": tasks, "rows": rows, "share": shares}
