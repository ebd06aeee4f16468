"""Tasks with known answers for the tests of the methods: quadratic losses, and what a method needs beside gradients."""

import torch


class Quadratics:
    """L_t(θ) = ½ (θ − c_t)ᵀ A_t (θ − c_t) and the held-out L_t^held with a centre of its own.

    θ is a vector [3] and a matrix [2, 2]. Training losses of all tasks are convex; everything is float64 and the same
    for the same seed.
    """

    def __init__(self, seed=0, tasks=3, start=3.0):
        g = torch.Generator().manual_seed(seed)
        roots = torch.randn(tasks, 7, 7, generator=g, dtype=torch.float64) / 3
        self.a = roots @ roots.mT + 0.3 * torch.eye(7, dtype=torch.float64)
        self.c = torch.randn(tasks, 7, generator=g, dtype=torch.float64)
        self.held = self.c + 0.1 * torch.randn(tasks, 7, generator=g, dtype=torch.float64)
        self.params = [
            [torch.nn.Parameter(torch.full(shape, start, dtype=torch.float64)) for shape in ((3,), (2, 2))]
            for _ in range(tasks)
        ]

    def theta(self, t):
        return torch.cat([p.flatten() for p in self.params[t]])

    def value(self, theta, t, centre):
        d = theta - centre[t]
        return d @ self.a[t] @ d / 2

    def loss(self, t):
        return self.value(self.theta(t), t, self.c)

    def heldout(self, t):
        return self.value(self.theta(t), t, self.held)

    def step(self, opt, order=None, gradient_scale=1.0):
        """One step on all tasks, in whatever order; the losses before it."""
        order = range(len(self.params)) if order is None else order
        opt.zero_grad()
        losses = [self.loss(t) for t in order]
        for loss in losses:
            (loss * gradient_scale).backward()
        heldout = [lambda t=t: self.heldout(t) for t in order]
        opt.step(**given(opt, [loss.detach() for loss in losses], heldout))
        return [loss.item() for loss in losses]

    def mean_loss_at(self, phi):
        return sum(self.value(phi, t, self.c) for t in range(len(self.c))).item() / len(self.c)


def given(opt, losses, heldout):
    """What of it the method needs, as arguments of `step`."""
    return {name: value for name, value in (("losses", losses), ("heldout", heldout)) if name in opt.needs}


def phi_of(opt):
    """φ as one vector."""
    return torch.cat([p.detach().flatten() for p in opt.initialization])


def assert_a_new_start(opt, tasks, other, fresh):
    """After the same initialization was loaded into both, `opt` goes on exactly as `other`.

    `other` is an optimizer of the tasks `fresh` that has not stepped yet.
    """
    start = [torch.ones_like(p) for p in opt.initialization]
    for one in (opt, other):
        one.load_initialization(start)
    opt.engine.counters.tensor[2] = 0  # a random shift's direction i belongs to meta-update i
    for _ in range(7):
        tasks.step(opt)
        fresh.step(other)
    assert torch.equal(phi_of(opt), phi_of(other))
