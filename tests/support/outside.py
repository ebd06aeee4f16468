"""What tests of outside changes share: small nets with an optimizer, and SGDs that each task has to follow."""

import copy

import pytest
import torch
from support.nets import assert_same
from support.step_cases import places
from torch import nn

from cts_fast import ShiftingMetaOptimizer

BACKENDS = [*dict.fromkeys(backend for backend, device in places() if device == "cpu"), "reference"]
DTYPES = [torch.float32, torch.bfloat16]
everywhere = pytest.mark.parametrize("backend", BACKENDS)
in_both = pytest.mark.parametrize("dtype", DTYPES, ids=str)
KINDS = ["shared", "head"]


class Problem:
    """Three small nets with heads and their optimizer; with meta_lr 0 each task follows its own torch.optim.SGD."""

    def __init__(self, backend="auto", dtype=torch.float32, **options):
        torch.manual_seed(0)
        base = nn.ModuleDict({"body": nn.Linear(4, 3), "head": nn.Linear(3, 2)}).to(dtype)
        self.nets = [copy.deepcopy(base) for _ in range(3)]
        self.options = {"lr": 0.125, "momentum": 0.5, "meta_lr": 0.0, "horizon": None, **options}
        self.opt = ShiftingMetaOptimizer(
            [net["body"].named_parameters() for net in self.nets],
            heads=[net["head"].parameters() for net in self.nets],
            backend=backend,
            **self.options,
        )
        self.draw = torch.Generator().manual_seed(1)

    def twins(self):
        """Copies of the nets with a torch.optim.SGD each, in the state that they are in now."""
        nets = copy.deepcopy(self.nets)
        sgds = [torch.optim.SGD(net.parameters(), lr=0.125, momentum=0.5) for net in nets]
        for net, twin, sgd in zip(self.nets, nets, sgds, strict=True):
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                entry = self.opt.state.get(p, {})
                if entry.get("momentum_started") and isinstance(entry.get("momentum_buffer"), torch.Tensor):
                    sgd.state[q]["momentum_buffer"] = entry["momentum_buffer"].clone()
        return nets, sgds

    def gradients(self, *others):
        for params in zip(self.params(), *(self.params(nets) for nets in others), strict=True):
            gradient = torch.randint(-4, 5, params[0].shape, generator=self.draw).to(params[0].dtype) / 8
            for param in params:
                param.grad = gradient.clone()

    def params(self, nets=None):
        return [p for net in nets or self.nets for p in net.parameters()]

    def step(self, count=1):
        for _ in range(count):
            self.gradients()
            self.opt.step()

    def values(self):
        states = [self.opt.state[p] for p in self.params()]
        return [v.clone() for v in (*self.params(), *self.opt.initialization, *(s["momentum_buffer"] for s in states))]

    def param(self, kind, t=1):
        return self.nets[t]["body" if kind == "shared" else "head"].weight

    def assert_follows_sgd(self, steps=3):
        """From here on every task moves as its own SGD does."""
        twins, sgds = self.twins()
        for _ in range(steps):
            self.gradients(twins)
            self.opt.step()
            for sgd in sgds:
                sgd.step()
            close = 0.0 if self.params()[0].dtype == torch.float32 else 0.02  # SGD has no master
            for p, q in zip(self.params(), self.params(twins), strict=True):
                torch.testing.assert_close(p, q, rtol=close, atol=close)

    def assert_refused(self, message, kind=ValueError):
        """The step raises, names what is wrong, and nothing has moved."""
        self.gradients()
        before, count = [p.detach().clone() for p in self.params()], self.opt.inner_step
        with pytest.raises(kind, match=message):
            self.opt.step()
        assert_same(before, [p.detach() for p in self.params()])
        assert self.opt.inner_step == count


def exchange_all(opt):
    for param in list(opt.state):
        opt.state[param] = {name: value.clone() for name, value in opt.state[param].items()}


def exchange_tensors(opt):
    for entry in opt.state.values():
        for name, value in entry.items():
            entry[name] = value.clone()


def exchange_data(opt):
    for entry in opt.state.values():
        for value in entry.values():
            value.data = value.data.clone()
