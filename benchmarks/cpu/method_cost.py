"""Cost of a step of each first-order method.

Against the fused inner step, the held-out gradients, and the bytes that the method's definition adds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common.measure import Budget, paired, summary
from benchmarks.common.setups import BETA, SGD, Problem, Setup
from benchmarks.cpu.ceiling import CacheFlush, Read3Write2
from cts_fast.baselines import METHODS

# Numbers beside the inner step's 5 T P that the terms of a method's definition read and write, each term once, as (per
# task and coordinate, per coordinate): first a step within a round, then one that ends it (K = 1).
# phi: 2, read and written. A held-out gradient: read once a task. A meta-update whose gradient needs θ after the inner
# step cannot share its pass, so its reset writes θ and v once more (2 a task).
# Leap: θ and the point before it for the norm (2 a task); then both again, both gradients, and the point kept (6 a
# task), of which the native pass shares θ and its gradient with the inner step; a round of one step has no segment, so
# it has no second entry.
# Random shift: θ read and written once more (2 a task); its direction is computed where it is needed. At a round's end
# φ replaces θ, so nothing is drawn.
# Held-out gradients are autograd's work, as the training gradients are: what it takes for those of all tasks is
# measured beside and allowed.
ADDED: dict[str, tuple[tuple[int, int], ...]] = {
    "cts": ((0, 2), (0, 2)),
    "no-shift": ((0, 2), (0, 2)),
    "random-shift": ((2, 2), (0, 2)),
    "mtl": ((0, 2), (0, 2)),
    "reptile": ((0, 0), (0, 2)),
    "fomaml": ((0, 0), (3, 2)),
    "fomaml++": ((1, 2), (3, 6)),
    "leap": ((8, 2),),
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


def inner_step(problem: Problem, begins: bool) -> Callable[[], object]:
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
    and a time is the mean of both: where memory lies makes up to a tenth of a difference. Bytes are priced at the
    ceiling, which takes turns with the methods.
    """
    problem = Problem(setup)
    rows, tasks, columns = {}, setup.tasks, setup.parameters
    for kind, horizon in enumerate((LONG, 1)):
        added_now = {name: both[kind] for name, both in ADDED.items() if len(both) > kind}
        makers = {"inner step": partial(inner_step, problem, begins=horizon == 1)}
        makers |= {name: partial(make_step, name, problem, horizon) for name in added_now}
        makers["held-out gradients"] = lambda: heldout_gradients(problem)
        steps = {name: make() for name, make in makers.items()}
        steps |= {f"{name} again": make() for name, make in reversed(makers.items())}
        ceiling = Read3Write2(shape[0], tasks * columns // shape[0], *shape[1:])
        run = paired({**steps, "ceiling": ceiling.step}, budget, flush)
        del steps  # before the next ones are made
        seconds = {
            name: [(a + b) / 2 for a, b in zip(run.seconds[name], run.seconds[f"{name} again"], strict=True)]
            for name in makers
        }
        per_byte = [t / ceiling.bytes for t in run.seconds["ceiling"]]
        for name, (per_task, once) in added_now.items():
            added = 4 * columns * (per_task * tasks + once)
            evaluates = EVALUATES.get(name, (False, False))[kind]
            evaluations = seconds["held-out gradients"] if evaluates else [0.0] * len(per_byte)
            allowed = [t + added * p + e for t, p, e in zip(seconds["inner step"], per_byte, evaluations, strict=True)]
            ratios = sorted(a / b for a, b in zip(seconds[name], allowed, strict=True))
            rows[f"{name}, {('within a round', 'that ends a round')[kind]}"] = {
                **summary(seconds[name]),
                "inner_ms": summary(seconds["inner step"])["ms"],
                "added_bytes": added,
                "heldout_ms": summary(evaluations)["ms"],
                "ratio": ratios[len(ratios) // 2],
            }
    return {"setup": str(setup), "allowance": ALLOWANCE, "rows": rows}
