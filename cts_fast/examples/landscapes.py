"""Eight two-dimensional tasks: one template with four minima, moved and rotated (Shin et al., 2021, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

C0, C2 = 0.73845121, 0.9954126
ANGLES = (0.91924315, 1.11506543, 4.41522871, 5.9905629, 3.90302512, 4.01772722, 3.13728475, 0.28030319)  # radians
MIDDLE, RADIUS, SCALE = 5.0, 7.0, 3.0


def centres(device: torch.device | str = "cpu") -> Tensor:
    """Where the template stands in each task: (5, 5) + 7 (sin, cos)(2πt/8), [8, 2], float64."""
    turn = 2 * math.pi * torch.arange(len(ANGLES), dtype=torch.float64, device=device) / len(ANGLES)
    return MIDDLE + RADIUS * torch.stack((turn.sin(), turn.cos()), -1)


def template(u: Tensor, w: Tensor) -> Tensor:
    """c0 (u² + w − 11)² + c2 (u + w² − 7)²: four minima, all 0."""
    return C0 * (u.square() + w - 11).square() + C2 * (u + w.square() - 7).square()


class Landscape:
    """The losses of the eight tasks at the same or at different points.

    (u, w) = R(angle)(x − centre) / 3, loss = template(u, w). The division by 3 is not in the paper's formula; without
    it, SGD with the paper's α = 0.05 diverges on the whole plotted square, and with it the paper's picture results.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        angles = torch.tensor(ANGLES, dtype=torch.float64, device=device)
        rotation = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), -1).view(-1, 2, 2)
        self.device, self.num_tasks = angles.device, len(angles)
        self.matrix = rotation.mT / SCALE  # points are rows
        self.offset = -(centres(device)[:, None] @ self.matrix)

    def losses(self, points: Tensor) -> Tensor:
        """The tasks' losses, [8, S], at points [8, S, 2] or at [S, 2] for every task."""
        u, w = torch.baddbmm(self.offset, points.expand(self.num_tasks, -1, -1), self.matrix).unbind(-1)
        return template(u, w)

    def gradients_(self, points: Tensor, out: Tensor) -> None:
        """∇ of each task's loss by its own points, [8, S, 2], into `out`; by hand, as small graphs are slow."""
        u, w = torch.baddbmm(self.offset, points, self.matrix).unbind(-1)
        first, second = 2 * C0 * (u.square() + w - 11), 2 * C2 * (u + w.square() - 7)
        local = torch.stack((2 * u * first + second, first + 2 * w * second), -1)
        torch.bmm(local, self.matrix.mT, out=out)

    def quality(
        self, points: Tensor, steps: int = 100, lr: float = 0.1, on_step: Callable[[Tensor], None] = lambda theta: None
    ) -> Tensor:
        """How good an initialization each of the points [S, 2] is: its task-average loss after Adam, [S].

        on_step: called after each of them with the tasks' parameters, [8, S, 2].
        """
        theta = points.detach().to(torch.float64).repeat(self.num_tasks, 1, 1)
        theta.grad = torch.empty_like(theta)
        adam = torch.optim.Adam([theta], lr=lr)
        for _ in range(steps):
            self.gradients_(theta, theta.grad)
            adam.step()
            on_step(theta)
        return self.losses(theta).mean(0)


def meta_train(
    landscape: Landscape, make: Callable, starts: Tensor, meta_updates: int, on_update: Callable[[], None] | None = None
) -> tuple[Tensor, int]:
    """φ after 0 … `meta_updates` meta-updates from every start, [updates + 1, S, 2], and a task's inner steps.

    make: tasks → optimizer. starts: [S, 2]. One optimizer serves all starts, as a step computes each coordinate by
    itself.
    """
    tasks = [starts.to(torch.float64).clone() for _ in range(landscape.num_tasks)]
    opt = make([[task] for task in tasks])
    (phi,) = opt.initialization
    gradients = torch.empty(landscape.num_tasks, *starts.shape, dtype=torch.float64, device=starts.device)
    for task, gradient in zip(tasks, gradients, strict=True):
        task.grad = gradient
    path, steps = [phi.clone()], 0
    while len(path) <= meta_updates:
        landscape.gradients_(torch.stack(tasks), gradients)
        opt.step()
        steps += 1
        if opt.meta_updates == len(path):
            path.append(phi.clone())
            if on_update is not None:
                on_update()
    return torch.stack(path), steps


def attractors(path: Tensor, low: float, high: float, radius: float = 0.5, still: float = 0.05) -> Tensor:
    """The points at which trajectories come to rest within the square low … high, [A, 2], most of them first.

    path: [updates + 1, S, 2]. At rest: the last tenth of the trajectory stays within `still` of its end. Ends closer
    than `radius` to a group's first member are one group; its median is the attractor.
    """
    end, tail = path[-1], path[-max(2, len(path) // 10) :]
    rest = (tail - end).norm(dim=-1).amax(0) <= still
    ends = list(end[rest & (end >= low).all(-1) & (end <= high).all(-1)])
    groups: list[list[Tensor]] = []
    for point in ends:
        near = [group for group in groups if (group[0] - point).norm() < radius]
        near[0].append(point) if near else groups.append([point])
    groups.sort(key=len, reverse=True)
    return torch.stack([torch.stack(group).median(0).values for group in groups]) if groups else end.new_zeros(0, 2)
