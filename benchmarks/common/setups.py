"""The factory of set-ups, which speed, memory and correctness share.

Parameters of real networks, T tasks, random gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor, nn

from cts_fast.engine.backends.reference import reference_step_
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.models.resnet20 import ResNet20

SGD = dict(lr=0.01, momentum=0.9, weight_decay=5e-4)
BETA = 0.01
HYPER = Hyper(**SGD, dampening=0.0, nesterov=False, maximize=False, meta_lr=BETA, shift=1.0)
TASKS = (1, 2, 8, 32, 128)
CHECKED_STEPS = 3


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    net = resnet18()
    net.fc = nn.Identity()
    return net


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(d_model=256, nhead=4, dim_feedforward=1024, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)


NETWORKS: dict[str, Callable[[], nn.Module]] = {  # bodies: the part that tasks share
    "resnet20": lambda: ResNet20(1).body,
    "resnet18": _resnet18,
    "mlp": _mlp,
    "transformer": _transformer,
}


@cache
def parameter_layout(network: str) -> tuple[tuple[str, torch.Size, tuple[int, ...]], ...]:
    """(name, shape, strides) of every parameter of a network of `NETWORKS`."""
    with torch.device("meta"):
        return tuple((name, p.shape, p.stride()) for name, p in NETWORKS[network]().named_parameters())


@dataclass(frozen=True)
class Setup:
    """A network's parameters in T replicas. `floor_bytes`: what a step must move, (5T + 2) P numbers of 4 bytes."""

    network: str
    tasks: int

    @property
    def parameters(self) -> int:
        """P: numbers of one task."""
        return sum(shape.numel() for _, shape, _ in parameter_layout(self.network))

    @property
    def floor_bytes(self) -> int:
        """Read g, read and write v and theta of T tasks, read and write phi."""
        return (5 * self.tasks + 2) * self.parameters * 4

    def __str__(self) -> str:
        return f"{self.network}-T{self.tasks}"


class Problem:
    """Start values and gradients of a set-up; all variants share the gradients, which no step writes.

    start: N tensors. gradients: T lists of N tensors, each with memory of its own, as autograd makes them.
    names: the N parameters' names.
    """

    def __init__(self, setup: Setup, seed: int = 0, device: str = "cpu") -> None:
        self.setup = setup
        generator = torch.Generator(device).manual_seed(seed)
        layout = parameter_layout(setup.network)

        def draw() -> list[Tensor]:
            tensors = [torch.empty_strided(shape, stride, device=device) for _, shape, stride in layout]
            return [tensor.normal_(0, 0.1, generator=generator) for tensor in tensors]

        self.names = [name for name, _, _ in layout]
        self.start = draw()
        self.gradients = [draw() for _ in range(setup.tasks)]

    def replicas(self) -> list[list[Tensor]]:
        """Start values once more for every task, as parameters with the shared gradients in `.grad`."""
        tasks = []
        for gradients in self.gradients:
            task = [nn.Parameter(tensor.clone()) for tensor in self.start]
            for parameter, gradient in zip(task, gradients, strict=True):
                parameter.grad = gradient
            tasks.append(task)
        return tasks

    @cached_property
    def flat_gradients(self) -> Tensor:
        """The gradients as one tensor [T, P]."""
        return torch.stack([flatten(task) for task in self.gradients])

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """phi [P] and theta [T, P] in float64 after `CHECKED_STEPS` steps of the reference equations."""
        phi = flatten(self.start).double()
        theta = phi.repeat(self.setup.tasks, 1)
        control = Control(meta_update=True, reset=False, reset_momentum=False, num_tasks=self.setup.tasks)
        for begin in range(0, phi.numel(), 1 << 20):  # coordinates are independent: blocks keep the copies small
            block = slice(begin, begin + (1 << 20))
            g = list(self.flat_gradients[:, block].double())
            v = [torch.zeros_like(x) for x in g]
            for step in range(CHECKED_STEPS):
                started = [step > 0] * self.setup.tasks
                reference_step_(phi[block], list(theta[:, block]), v, g, started, HYPER, control)
        return phi, theta


def flatten(tensors: list[Tensor]) -> Tensor:
    """Tensors in memory order, one after the other: [P]."""
    return torch.cat([tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors])
