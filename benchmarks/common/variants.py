"""Ways to take one step of continual trajectory shifting, in one registry; all start from a `Problem`.

A variant is made from a problem, takes `step()`, and shows `phi()` [P] and `theta()` [T, P]. `check` holds it against
the float64 reference. Every variant takes the same inner step: SGD with momentum and weight decay (`setups.HYPER`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.setups import BETA, CHECKED_STEPS, HYPER, SGD, Problem, Setup, flatten
from cts_fast import ShiftingMetaOptimizer
from cts_fast.engine.plan import Control
from cts_fast.engine.step import unavailable


class Replicas:
    """Base of variants that keep one tensor for each parameter and task."""

    def __init__(self, problem: Problem) -> None:
        self.tasks = problem.replicas()
        self.initialization = [tensor.clone() for tensor in problem.start]

    @staticmethod
    def unavailable(setup: Setup) -> str | None:
        """Why the variant cannot run this set-up; None if it can."""
        return None

    def phi(self) -> Tensor:
        """The initialization, [P]."""
        return flatten(self.initialization)

    def theta(self) -> Tensor:
        """Every task's parameters, [T, P]."""
        return torch.stack([flatten(task) for task in self.tasks])


class NaiveLoop(Replicas):
    """One SGD a task; then Python loops over named parameters: mean of the differences, meta-update, shift."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.named = [dict(zip(problem.names, task, strict=True)) for task in self.tasks]
        self.base = dict(zip(problem.names, self.initialization, strict=True))
        self.optimizers = [torch.optim.SGD(task, foreach=False, **SGD) for task in self.tasks]

    @torch.no_grad()
    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        shift_by_name(self.base, self.named)


@torch.no_grad()
def shift_by_name(base: dict[str, Tensor], tasks: list[dict[str, Tensor]]) -> None:
    """Meta-update and shift in loops over named parameters, in place.

    base: the initialization. tasks: each task's parameters.
    """
    for name, phi in base.items():
        delta = torch.zeros_like(phi)
        for task in tasks:
            delta += task[name] - phi
        delta *= BETA / len(tasks)
        phi += delta
        for task in tasks:
            task[name] += delta


class ReleasedForm(NaiveLoop):
    """The released script's form, its T processes taken one after the other in one.

    Every task keeps the initialization itself, steps it towards its own parameters by name, the copies are
    concatenated, averaged over the tasks and cut up again, and each task shifts by the difference to a clone.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.bases = [{name: phi.clone() for name, phi in self.base.items()} for _ in self.named]

    @classmethod
    def of(cls, optimizers: list[torch.optim.Optimizer], named: list[dict[str, Tensor]]) -> ReleasedForm:
        """The same update of any networks. optimizers: one a task; named: each task's shared parameters by name."""
        made = cls.__new__(cls)
        made.optimizers, made.named = optimizers, named
        made.bases = [{name: theta.detach().clone() for name, theta in named[0].items()} for _ in named]
        return made

    @torch.no_grad()
    def step(self) -> None:
        before = []
        for optimizer, task, base in zip(self.optimizers, self.named, self.bases, strict=True):
            optimizer.step()
            before.append({name: phi.clone() for name, phi in base.items()})
            for name, theta in task.items():
                base[name] -= BETA * (base[name] - theta)
        first = self.bases[0].values()
        mean = torch.zeros(sum(phi.numel() for phi in first), device=next(iter(first)).device)
        for base in self.bases:
            mean += flatten(list(base.values()))
        mean /= len(self.bases)
        for task, base, old in zip(self.named, self.bases, before, strict=True):
            at = 0
            for name, phi in base.items():
                phi.copy_(mean[at : at + phi.numel()].as_strided(phi.shape, phi.stride()))
                at += phi.numel()
                task[name] += phi - old[name]

    def phi(self) -> Tensor:
        return flatten(list(self.bases[0].values()))


class Foreach(Replicas):
    """One SGD over all tasks' tensors and torch._foreach ops for meta-update and shift."""

    sgd = {"foreach": True}

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.optimizer = torch.optim.SGD([tensor for task in self.tasks for tensor in task], **self.sgd, **SGD)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, tasks: list[list[Tensor]]) -> Foreach:
        """The same update of any networks. optimizer: of all of them; tasks: each one's shared parameters."""
        made = cls.__new__(cls)
        made.optimizer, made.tasks = optimizer, tasks
        made.initialization = [p.detach().clone() for p in tasks[0]]
        return made

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        phi = self.initialization
        delta = torch._foreach_sub(self.tasks[0], phi)
        for task in self.tasks[1:]:
            torch._foreach_add_(delta, torch._foreach_sub(task, phi))
        torch._foreach_mul_(delta, BETA / len(self.tasks))
        torch._foreach_add_(phi, delta)
        for task in self.tasks:
            torch._foreach_add_(task, delta)


class FusedForeach(Foreach):
    """torch's fused SGD, then torch._foreach ops."""

    sgd = {"fused": True}


class Flat:
    """Flat tensors theta, v [T, P] and gradients that are flat already: one torch op for each operation."""

    unavailable = staticmethod(Replicas.unavailable)

    def __init__(self, problem: Problem) -> None:
        self.initialization = flatten(problem.start)
        self.tasks = self.initialization.repeat(problem.setup.tasks, 1)
        self.momentum = torch.zeros_like(self.tasks)
        self.gradients = problem.flat_gradients

    @torch.no_grad()
    def step(self) -> None:
        self.update(self.initialization, self.tasks, self.momentum, self.gradients)

    @staticmethod
    def update(phi: Tensor, theta: Tensor, v: Tensor, g: Tensor) -> None:
        """The equations on whole tensors; g: [T, P] or T tensors."""
        v.mul_(HYPER.momentum).add_(g.add(theta, alpha=HYPER.weight_decay))
        theta.add_(v, alpha=-HYPER.lr)
        delta = BETA * (theta - phi).mean(0)
        phi.add_(delta)
        theta.add_(delta)

    def phi(self) -> Tensor:
        """The initialization, [P]."""
        return self.initialization

    def theta(self) -> Tensor:
        """Every task's parameters, [T, P]."""
        return self.tasks


class CompiledFlat(Flat):
    """torch.compile of the flat step."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        torch._dynamo.reset()  # one set-up's code at a time: no guard of another one is tried
        self.update = torch.compile(type(self).update, dynamic=False, fullgraph=True)


class CompiledFlatGathered(CompiledFlat):
    """The same, for gradients as autograd makes them: each copied to its place in [T, P] first."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.gradients = torch.empty_like(self.tasks)
        self.separate = [gradient for task in problem.gradients for gradient in task]
        self.places = []
        for row in self.gradients:
            at = 0
            for tensor in problem.start:
                self.places.append(row[at : at + tensor.numel()].as_strided(tensor.shape, tensor.stride()))
                at += tensor.numel()

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_(self.places, self.separate)
        super().step()


class CompiledUnrolledGathered(CompiledFlatGathered):
    """torch.compile of the step with its tasks written out one by one, which it fuses into one pass.

    The gradients are copied.
    """

    LARGEST = 32

    @staticmethod
    def unavailable(setup: Setup) -> str | None:
        if setup.tasks > CompiledUnrolledGathered.LARGEST:
            return f"code for more than {CompiledUnrolledGathered.LARGEST} tasks takes minutes to compile"
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        # rows as T separate arguments: written as rows of one tensor, the compiler keeps whole copies of it
        self.tasks, self.momentum, self.gradients = list(self.tasks), list(self.momentum), list(self.gradients)

    @staticmethod
    def update(phi: Tensor, theta: list[Tensor], v: list[Tensor], g: list[Tensor]) -> None:
        """The equations with a Python loop over the tasks; theta, v, g: T tensors [P]."""
        stepped = []
        for theta_t, v_t, g_t in zip(theta, v, g, strict=True):
            v_t.copy_(HYPER.momentum * v_t + (g_t + HYPER.weight_decay * theta_t))
            stepped.append(theta_t - HYPER.lr * v_t)
        total = stepped[0] - phi
        for theta_t in stepped[1:]:
            total = total + (theta_t - phi)
        delta = (BETA / len(stepped)) * total
        phi.add_(delta)
        for theta_t, stepped_t in zip(theta, stepped, strict=True):
            theta_t.copy_(stepped_t + delta)

    def theta(self) -> Tensor:
        return torch.stack(self.tasks)


class Ours(Replicas):
    """`ShiftingMetaOptimizer.step()`, all of it: reading gradients, checks, the launch, bookkeeping."""

    backend = "cpu"

    def __init__(self, problem: Problem, **options) -> None:
        self.tasks = problem.replicas()
        named = [zip(problem.names, task, strict=True) for task in self.tasks]
        options = dict(meta_lr=BETA, horizon=None, backend=self.backend, **SGD) | options
        self.optimizer = ShiftingMetaOptimizer(named, **options)

    @classmethod
    def unavailable(cls, setup: Setup) -> str | None:
        return unavailable(cls.backend, torch.device("cpu"), torch.float32)

    def step(self) -> None:
        self.optimizer.step()

    def phi(self) -> Tensor:
        return flatten(list(self.optimizer.initialization))


class OursTorch(Ours):
    """`ShiftingMetaOptimizer.step()` on the backend of large torch ops."""

    backend = "torch"


class OursReference(Ours):
    """`ShiftingMetaOptimizer.step()` on the reference equations."""

    backend = "reference"


class OursNative(Ours):
    """The native call alone: gradients collected beforehand, no bookkeeping after it. The first step is a whole one."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.call = None

    def step(self) -> None:
        if self.call is None:
            self.optimizer.step()  # momentum takes its first gradient, which `step()` books
            self.call = native_call(self.optimizer)
        else:
            self.call()


def native_call(optimizer: ShiftingMetaOptimizer) -> Callable[[], None]:
    """The launch of one plain step with the gradients as they are now, without what `step()` does around it."""
    engine = optimizer.engine
    gradients, hyper = engine.collectors[0](), optimizer.read_hyper()
    control = Control(meta_update=True, reset=False, reset_momentum=False, num_tasks=engine.num_tasks)
    return lambda: engine.backends[0].step_(gradients, hyper, control)


VARIANTS: dict[str, type] = {
    "released form": ReleasedForm,
    "naive loop": NaiveLoop,
    "foreach": Foreach,
    "fused + foreach": FusedForeach,
    "flat": Flat,
    "compiled flat": CompiledFlat,
    "compiled flat + copy": CompiledFlatGathered,
    "compiled unrolled + copy": CompiledUnrolledGathered,
    "step(), reference": OursReference,
    "step(), torch": OursTorch,
    "step(), cpu": Ours,
    "native call, cpu": OursNative,
}


def check(variant, problem: Problem) -> None:
    """Take `CHECKED_STEPS` steps with a fresh variant and compare with the float64 reference.

    Raises AssertionError that says where they differ.
    """
    for _ in range(CHECKED_STEPS):
        variant.step()
    for name, got, expected in zip(("phi", "theta"), (variant.phi(), variant.theta()), problem.expected, strict=True):
        where = f"{type(variant).__name__}, {problem.setup}, {name}"
        said = partial("{}: {}".format, where)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6, msg=said)
