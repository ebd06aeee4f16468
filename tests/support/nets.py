"""Small networks in training, for tests of the optimizer."""

import copy

import torch
from torch import nn

from cts_fast import ShiftingMetaOptimizer
from cts_fast.models.task_net import TaskNet


class SmallNet(TaskNet):
    """A body with batch norm and a head, for programs that take many steps in a test."""

    def __init__(self, num_classes):
        body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        super().__init__(body, 24, num_classes)


def make_nets(count=3, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)).to(dtype)
    return [copy.deepcopy(net) for _ in range(count)]


def make_optimizer(nets, **options):
    options = {"lr": 0.05, "momentum": 0.9, "meta_lr": 0.1, "horizon": 4, **options}
    return ShiftingMetaOptimizer(
        [net[:2].named_parameters() for net in nets], heads=[net[4].parameters() for net in nets], **options
    )


def backward(nets, step=0, scale=1.0, first=0):
    """first: of these tasks among all, whose data depend on it."""
    for t, net in enumerate(nets, first):
        draw = torch.Generator().manual_seed(1000 * step + t)
        dtype = net[0].weight.dtype
        x = torch.randn(4, 3, 6, 6, generator=draw).to(dtype)
        y = torch.randint(5, (4,), generator=draw)
        (nn.functional.cross_entropy(net(x).float(), y) * scale).backward()


def train(nets, opt, steps, start=0):
    for step in range(start, start + steps):
        opt.zero_grad()
        backward(nets, step)
        opt.step()


def values(nets, opt):
    return [p.detach().clone() for net in nets for p in net.parameters()] + [phi.clone() for phi in opt.initialization]


def assert_same(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
