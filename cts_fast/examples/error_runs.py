"""The trajectories behind the approximation error: shifted ones, and the ones they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cts_fast import ShiftingMetaOptimizer

SIDE, CLASSES, WIDTHS, BATCH, IMAGES = 8, 5, (4, 8, 8), 16, 200
POOLED = 2  # of the convolutions, the first ones, are followed by pooling to half the side
INPUTS = (1, *WIDTHS[:-1])  # channels
CONVOLUTIONS = tuple(((width, 9 * inputs), (width,)) for inputs, width in zip(INPUTS, WIDTHS, strict=True))
LINEAR = ((CLASSES, WIDTHS[-1] * (SIDE // 2**POOLED) ** 2), (CLASSES,))
SHAPES = (*(shape for layer in CONVOLUTIONS for shape in layer), *LINEAR)  # weight and bias of each layer
WARM_UP, WARM_UP_LR = 100, 0.1  # joint training before the error is measured
ACTIVATIONS = {"softplus": F.softplus, "relu": F.relu}
POOLS = {"average": F.avg_pool2d, "max": F.max_pool2d}


@dataclass(frozen=True)
class Draw:
    """What one run is made of, for D draws: φ [D, P] and each task's images [D, T, IMAGES, SIDE²], labels and batches.

    batches: indices [WARM_UP + K, D, T, BATCH]; those behind the warm-up are the same for every trajectory of a draw
    and task.
    """

    phi: Tensor
    images: Tensor
    labels: Tensor
    batches: Tensor

    @classmethod
    def new(cls, seed: int, draws: int, tasks: int, steps: int, device: torch.device | str = "cpu") -> Draw:
        """Classes around random prototypes, other ones in every task, and a Kaiming-normal network; float64."""
        g = torch.Generator().manual_seed(seed)
        parts = []
        for shape in SHAPES:
            scale = math.sqrt(2 / shape[1]) if len(shape) == 2 else 0.0
            parts.append(torch.randn(draws, *shape, generator=g, dtype=torch.float64) * scale)
        labels = torch.randint(CLASSES, (draws, tasks, IMAGES), generator=g)
        prototypes = torch.randn(draws, tasks, CLASSES, SIDE * SIDE, generator=g, dtype=torch.float64)
        images = prototypes.gather(2, labels[..., None].expand(-1, -1, -1, SIDE * SIDE))
        images = images + torch.randn(images.shape, generator=g, dtype=torch.float64)
        batches = torch.randint(IMAGES, (WARM_UP + steps, draws, tasks, BATCH), generator=g)
        phi = torch.cat([part.flatten(1) for part in parts], 1)
        return cls(*(x.to(device) for x in (phi, images, labels, batches)))

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Images [D, T, BATCH, SIDE²] and labels [D, T, BATCH] of step k = 1, 2, …; of the warm-up where k ≤ 0."""
        index = self.batches[WARM_UP - 1 + k]
        return self.images.gather(2, index[..., None].expand(-1, -1, -1, SIDE * SIDE)), self.labels.gather(2, index)


class Networks:
    """Many small networks side by side: three 3×3 convolutions with activations, two poolings, a linear layer."""

    def __init__(self, activation: str, pool: str) -> None:
        self.activation, self.pool = ACTIVATIONS[activation], POOLS[pool]

    def losses(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of each network, [N]; theta: [N, P], x: [N, B, SIDE²], y: [N, B]."""
        n, b = y.shape
        parts = theta.split([math.prod(shape) for shape in SHAPES], 1)
        *layers, last, last_bias = (part.view(n, *shape) for part, shape in zip(parts, SHAPES, strict=True))
        x, side = x.reshape(n * b, 1, SIDE, SIDE), SIDE
        for i, (weight, bias) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            patches = F.unfold(x, 3, padding=1).view(n, b, -1, side * side)
            x = self.activation((weight[:, None] @ patches + bias[:, None, :, None]).view(n * b, -1, side, side))
            if i < POOLED:
                x, side = self.pool(x, 2), side // 2
        logits = x.view(n, b, -1) @ last.mT + last_bias[:, None]
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(n, b).mean(1)

    def gradients(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """∇ of each network's loss, [..., D, T, P]; theta: [..., D, T, P], x: [D, T, B, SIDE²], y: [D, T, B]."""
        flat = theta.detach().flatten(0, -2).requires_grad_()
        lead = theta.shape[: -x.dim() + 1]
        losses = self.losses(flat, x.expand(*lead, *x.shape).flatten(0, -3), y.expand(*lead, *y.shape).flatten(0, -2))
        return torch.autograd.grad(losses.sum(), flat)[0].view(theta.shape)


def warmed_up(networks: Networks, draw: Draw) -> Draw:
    """The draw with φ after a little joint training: meta-training spends its time there, not at random networks."""
    phi, tasks = draw.phi.clone(), draw.images.shape[1]
    for k in range(1 - WARM_UP, 1):
        phi -= WARM_UP_LR * networks.gradients(phi[:, None].expand(-1, tasks, -1), *draw.batch(k)).mean(1)
    return replace(draw, phi=phi)


def errors(
    networks: Networks,
    draw: Draw,
    settings: Sequence[tuple[float, float]],
    ks: Sequence[int],
    advance: Callable[[], None],
) -> Tensor:
    """‖ε‖ of Eq. (5), mean over tasks, [settings, len(ks), D].

        ε = U_k(φ + Δ_1 + … + Δ_{k−1}) − U_1(… U_1(U_1(φ) + Δ_1) … + Δ_{k−1})

    settings: (α, β) of each. ks: lengths k, ascending. Plain SGD on the same batches in both; `advance` is called 2
    max(ks) times.
    """
    tasks = draw.images.shape[1]
    theta = [[draw.phi.clone() for _ in settings] for _ in range(tasks)]
    groups = [
        {"params": [[own[s]] for own in theta], "lr": lr, "meta_lr": meta_lr}
        for s, (lr, meta_lr) in enumerate(settings)
    ]
    opt = ShiftingMetaOptimizer(groups, horizon=None)
    # for each k in ks: φ + Δ_1 + … + Δ_{k−1}, [settings, D, P], and θ_k before its own shift, [settings, D, T, P]
    starts, shifted = [], []
    for k in range(1, ks[-1] + 1):
        phi = torch.stack(opt.initialization)
        gradients = networks.gradients(torch.stack([torch.stack(own) for own in theta], 2), *draw.batch(k))
        for t, own in enumerate(theta):
            for s, param in enumerate(own):
                param.grad = gradients[s, :, t].contiguous()
        opt.step()
        if k in ks:
            delta = torch.stack(opt.initialization) - phi
            starts.append(phi)
            shifted.append(torch.stack([torch.stack(own) for own in theta], 2) - delta[:, :, None])
        advance()

    rate = torch.tensor([lr for lr, _ in settings], dtype=torch.float64, device=draw.phi.device).view(-1, 1, 1, 1)
    exact = torch.stack(starts)[:, :, :, None].expand(-1, -1, -1, tasks, -1).clone()  # [len(ks), settings, D, T, P]
    for k in range(1, ks[-1] + 1):
        running = sum(length < k for length in ks)
        exact[running:] -= rate * networks.gradients(exact[running:], *draw.batch(k))
        advance()
    return (exact - torch.stack(shifted)).norm(dim=-1).mean(-1).transpose(0, 1)
