"""Cost of a step of each first-order method.

Against the fused inner step, the held-out gradients, and the bytes that the method's definition adds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.common.measure import Budget, paired, summary
from benchmarks.common.setups import BETA, SGD, Problem, Setup
from benchmarks.cpu.ceiling import CacheFlush, Fill, Read3Write2
from cts_fast.baselines import METHODS


class Traffic(NamedTuple):
    """Numbers read and written, per task and coordinate, then per coordinate."""

    read_each: int
    written_each: int
    read: int
    written: int

    def moved(self, setup: Setup) -> tuple[float, float, float]:
        """(bytes in the step's own proportion, three read for two written; read beyond it; written beyond it)."""
        read = 4 * setup.parameters * (self.read_each * setup.tasks + self.read)
        written = 4 * setup.parameters * (self.written_each * setup.tasks + self.written)
        reads, writes = max(0.0, read - written * 3 / 2), max(0.0, written - read * 2 / 3)
        return read + written - reads - writes, reads, writes


# What the terms of a method's definition read and write beside the inner step's 5 T P, each term once: first a step
# within a round, then one that ends it (K = 1).
# φ is read and written. A held-out gradient is read. A meta-update whose gradient needs θ after the inner step cannot
# share its pass, so its reset writes θ and v once more.
# Leap: θ and the point before it are read for the norm; then both again and both gradients, and the point is kept, with
# its gradient. A round of one step has no segment, so there is no second entry.
# Random shift: θ is read and written once more; its direction is computed where it is needed. At a round's end φ
# replaces θ, so nothing is drawn.
# Held-out gradients are autograd's work, as the training gradients are: what it takes for those of all tasks is
# measured beside and allowed.
NOTHING, PHI = Traffic(0, 0, 0, 0), Traffic(0, 0, 1, 1)
ADDED: dict[str, tuple[Traffic, ...]] = {
    "cts": (PHI, PHI),
    "no-shift": (PHI, PHI),
    "random-shift": (Traffic(1, 1, 1, 1), PHI),
    "mtl": (PHI, PHI),
    "reptile": (NOTHING, PHI),
    "fomaml": (NOTHING, Traffic(1, 2, 1, 1)),
    "fomaml++": (Traffic(1, 0, 1, 1), Traffic(1, 2, 3, 3)),
    "leap": (Traffic(6, 2, 1, 1),),
}
# whether it takes held-out gradients in these two kinds of step
EVALUATES = {"fomaml": (False, True), "fomaml++": (True, True)}
ALLOWANCE = 1.1
LONG = 10**9


class _Given(torch.autograd.Function):
    """A loss whose gradient is there already, so that a held-out loss costs nothing but its place in the step."""

    @staticmethod
    def forward(ctx, gradients: list[Tensor], *params: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple:
        return (None, *ctx.gradients)


def heldout_losses(problem: Problem, tasks: list[list[Tensor]]) -> list[Callable[[], Tensor]]:
    """T functions that return a held-out loss at each task's parameters; its gradients are the problem's."""
    return [
        lambda task=task, gradients=gradients: _Given.apply(gradients, *task)
        for task, gradients in zip(tasks, problem.gradients, strict=True)
    ]


def heldout_gradients(problem: Problem) -> Callable[[], object]:
    """What autograd does for the held-out gradients of all tasks, and nothing else."""
    tasks = problem.replicas()
    losses = heldout_losses(problem, tasks)

    def run() -> list:
        pairs = zip(losses, tasks, strict=True)
        return [torch.autograd.grad(loss(), task, allow_unused=True) for loss, task in pairs]

    return run


def inner_update_alone(problem: Problem, begins: bool) -> Callable[[], object]:
    """`step` with no meta-update due. begins: after the look at a round's first step, whether θ is φ."""
    step = make_step("cts", problem, LONG, meta_interval=LONG)
    if not begins:
        return step
    at_start = METHODS["cts"](problem.replicas(), **SGD)  # it never steps, so that all of it is looked at
    ((backend, _),) = at_start.engine.shared

    def run() -> None:
        backend.is_at_phi()
        step()

    return run


def make_step(method: str, problem: Problem, horizon: int, **options) -> Callable[[], object]:
    """`step` of a method of `METHODS` with all that it needs at hand; horizon 1: every step ends a round."""
    tasks = problem.replicas()
    kind = METHODS[method]
    named = [zip(problem.names, task, strict=True) for task in tasks]
    optimizer = kind(named, meta_lr=BETA, horizon=horizon, **SGD, **options)
    needs, given = getattr(kind, "needs", frozenset()), {}
    if "losses" in needs:
        given["losses"] = [torch.tensor(1.0 + t) for t in range(len(tasks))]
    if "heldout" in needs:
        given["heldout"] = heldout_losses(problem, tasks)
    return lambda: optimizer.step(**given)


def method_cost(setup: Setup, budget: Budget, flush: CacheFlush | None, shape: tuple[int, int, int]) -> dict:
    """One row a method and kind of step.

    ms, bytes added, and the ratio to the inner step, the time of those bytes and the held-out gradients.

    The inner step is `step()` with no meta-update due; where every step ends a round it also begins one, and looks
    whether weights were loaded, as those of the methods do. Everything is made twice, the second time in reverse order,
    and a time is the mean of both: where memory lies makes up to a tenth of a difference. Bytes that a method adds are
    priced at the ceiling, which takes turns with the methods; what it reads beyond three reads for two writes at what
    reads alone get in the same repeats, and what it writes beyond that at what writes alone get: where reads and writes
    have lanes of their own, the three differ.
    """
    problem = Problem(setup)
    rows, tasks, columns = {}, setup.tasks, setup.parameters
    for kind, horizon in enumerate((LONG, 1)):
        added_now = {name: both[kind] for name, both in ADDED.items() if len(both) > kind}
        makers = {"inner step": partial(inner_update_alone, problem, begins=horizon == 1)}
        makers |= {name: partial(make_step, name, problem, horizon) for name in added_now}
        makers["held-out gradients"] = lambda: heldout_gradients(problem)
        steps = {name: make() for name, make in makers.items()}
        steps |= {f"{name} again": make() for name, make in reversed(makers.items())}
        ceiling = Read3Write2(shape[0], tasks * columns // shape[0], *shape[1:])
        reads = CacheFlush(4 * 3 * tasks * columns)
        prices = {"ceiling": ceiling.step, "reads": reads, "writes": Fill(torch.empty_like(reads.buffer))}
        priced_bytes = (ceiling.bytes, reads.buffer.nbytes, reads.buffer.nbytes)
        run = paired({**steps, **prices}, budget, flush)
        del steps  # before the next ones are made
        seconds = {
            name: [(a + b) / 2 for a, b in zip(run.seconds[name], run.seconds[f"{name} again"], strict=True)]
            for name in makers
        }
        for name, traffic in added_now.items():
            added = traffic.moved(setup)
            shares = [size / whole for size, whole in zip(added, priced_bytes, strict=True)]
            priced = [
                sum(share * t for share, t in zip(shares, turn, strict=True))
                for turn in zip(*(run.seconds[name] for name in prices), strict=True)
            ]
            evaluates = EVALUATES.get(name, (False, False))[kind]
            evaluations = seconds["held-out gradients"] if evaluates else [0.0] * len(priced)
            allowed = [t + p + e for t, p, e in zip(seconds["inner step"], priced, evaluations, strict=True)]
            ratios = sorted(a / b for a, b in zip(seconds[name], allowed, strict=True))
            rows[f"{name}, {('within a round', 'that ends a round')[kind]}"] = {
                **summary(seconds[name]),
                "inner_ms": summary(seconds["inner step"])["ms"],
                "added_bytes": sum(added),
                "added_ms": summary(priced)["ms"],
                "heldout_ms": summary(evaluations)["ms"],
                "ratio": ratios[len(ratios) // 2],
            }
    return {"setup": str(setup), "allowance": ALLOWANCE, "rows": rows}
