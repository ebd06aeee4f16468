"""One method's meta-training within a run: to its last step, saved on the way, and gone on with exactly."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cts_fast.distributed.launch import Team
from cts_fast.engine.gradients import NonFiniteGradient
from cts_fast.experiments.checkpoint import Checkpoints
from cts_fast.experiments.console import Progress
from cts_fast.experiments.meta_train import MetaTrainer
from cts_fast.experiments.parallel import Meetings
from cts_fast.experiments.signals import Stop

POINTS = 2000  # a method's curve has at most twice as many points
SHARED = "shared.pt"  # the part of a checkpoint that is the same for all ranks


class Diverged(ArithmeticError):
    """A gradient is not finite; the message names method, step, task and parameter."""


@dataclass
class Curve:
    """Training losses of one method: `losses[i][t]` is the mean of task t over the steps up to `steps[i]`.

    Of this rank's `own` tasks are `closed`, points that the other ranks do not have yet, and `pending`, losses of the
    steps after the last point, one tensor a step, still on the device.
    """

    tasks: tuple[str, ...]
    own: tuple[str, ...]
    steps: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    closed: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)

    def close_point(self, step: int) -> None:
        """Make a point of the pending losses; waits for the device."""
        losses = torch.stack(self.pending).mean(0).tolist()
        self.closed.append((step, dict(zip(self.own, losses, strict=True))))
        self.pending.clear()

    def take(self, closed: Iterable[Sequence[tuple[int, dict[str, float]]]]) -> None:
        """The points that all ranks have closed, each of its own tasks."""
        for point in zip(*closed, strict=True):
            losses = {task: loss for _, of_rank in point for task, loss in of_rank.items()}
            self.steps.append(point[0][0])
            self.losses.append([losses[task] for task in self.tasks])
        self.closed.clear()

    @property
    def last(self) -> float:
        """The newest task-average loss; NaN before the first."""
        return sum(self.losses[-1]) / len(self.losses[-1]) if self.losses else math.nan

    @property
    def mean(self) -> list[float]:
        """Task-average losses."""
        return [sum(losses) / len(losses) for losses in self.losses]


class Training:
    """A method in training over the ranks of a team.

    Args:
        name: the method's; trainer: of this rank's tasks; kept: the checkpoints of all ranks.
        spread: the names of each rank's tasks; tasks: of all, in their order.
        steps: the last one; snapshot_steps: those at which phi is kept in `snapshots`, step to name to tensor.
        rates: what a message about gradients that are not finite says of its step sizes; None where they may be.
        shown: whether this rank shows progress.
    """

    def __init__(
        self,
        name: str,
        trainer: MetaTrainer,
        kept: Checkpoints,
        team: Team,
        *,
        tasks: Sequence[str],
        spread: Sequence[Sequence[str]],
        steps: int,
        snapshot_steps: Collection[int],
        rates: str | None,
        shown: bool,
    ) -> None:
        self.name, self.trainer, self.kept, self.team, self.spread = name, trainer, kept, team, spread
        self.steps, self.snapshot_steps, self.rates, self.shown = steps, snapshot_steps, rates, shown
        self.curve = Curve(tuple(tasks), trainer.tasks)
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.optimizer_state: dict[str, Any] = {}

    def run(self, stop: Stop, writer: Any = None) -> None:
        """To the last step; raises `Interrupted` where `stop` was requested on any rank, after a save.

        writer: of TensorBoard. Raises Diverged when a gradient or a parameter is not finite; what was saved before
        stays.
        """
        trainer, curve = self.trainer, self.curve
        steps_per_point = max(1, self.steps // POINTS)
        meetings = Meetings(self.team, trainer.step, self.kept.every)
        with Progress(f"meta-train {self.name}", self.steps, trainer.step, shown=self.shown) as progress:
            while trainer.step < self.steps:
                curve.pending.append(self._step())
                last = trainer.step == self.steps
                if trainer.step in self.snapshot_steps:
                    self.snapshots[trainer.step] = trainer.initialization
                if len(curve.pending) == steps_per_point or last:
                    curve.close_point(trainer.step)
                if trainer.step == meetings.next or last:
                    told = meetings.exchange(trainer.step, (stop.asked(), self.kept.due, curve.closed))
                    asked, due, closed = zip(*told, strict=True)
                    self._take(closed, writer)
                    if any(asked) or last or due[0]:
                        self._save()
                        stop.check(self.team)  # before anything is printed: a hang-up closes the output too
                progress.advance(f"loss {curve.last:.3f}")

    def _step(self) -> Tensor:
        try:
            return self.trainer.train_step()
        except NonFiniteGradient as error:
            interval = 1 if self.team.size == 1 else self.trainer.optimizer.param_groups[0]["meta_interval"]
            exact = self.trainer.device.type == "cpu" and interval == 1  # ranks tell it in a meta-update
            raise self._of_gradient(error, self.trainer.step + 1, exact) from error

    def _take(self, closed: Iterable[Sequence], writer: Any) -> None:
        count = len(self.curve.steps)
        self.curve.take(closed)
        if writer:
            for step, losses in zip(self.curve.steps[count:], self.curve.losses[count:], strict=True):
                writer.add_scalar("meta-train/loss", sum(losses) / len(losses), step)

    # Gradients that are not finite ------------------------------------------------------------------------------------

    def _of_gradient(self, error: NonFiniteGradient, step: int, exact: bool = False) -> Diverged:
        task = self.spread[getattr(error, "rank", 0)][error.task]
        what = f"the gradient of task {task!r}, parameter {error.parameter!r}"
        return self._diverged(f"step {step}" if exact else f"at or before step {step}", what)

    def _diverged(self, at: str, what: str) -> Diverged:
        good = f"the last good checkpoint is {self.kept.newest}" if self.kept.newest else "nothing was saved yet"
        return Diverged(f"{self.name}, {at}: {what} is not finite; {self.rates}; {good}")

    def _check_finite(self) -> None:
        """Raises Diverged where a parameter is not finite: held-out gradients, too large rates and the last step show
        in no gradient that a step looks at.
        """
        if self.rates is None:
            return
        for what, tensor in self._parameters():
            if not tensor.isfinite().all():
                raise self._diverged(f"at or before step {self.trainer.step}", what)

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        trainer = self.trainer
        for name, phi in trainer.optimizer.initialization_state_dict().items():
            yield f"the initialization's {name!r}", phi
        for task, net in zip(trainer.tasks, trainer.nets, strict=True):
            for name, param in net.named_parameters():
                yield f"task {task!r}, parameter {name!r}", param

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        try:
            state, curve = self.trainer.state_dict(), self.curve
        except NonFiniteGradient as error:  # of a GPU's last step, which nobody has waited for, or of a replay
            raise self._of_gradient(error, self.trainer.step) from error
        self._check_finite()  # after the optimizer has named a gradient, which says more
        pending = torch.stack(curve.pending).cpu() if curve.pending else torch.empty(0, len(curve.own))
        for of_task, losses in zip(state["own"]["tasks"].values(), pending.unbind(1), strict=True):
            of_task["pending"] = losses.clone(memory_format=torch.contiguous_format)
        shared = {"steps": curve.steps, "losses": curve.losses, "snapshots": self.snapshots}
        shared |= {"spread": [list(names) for names in self.spread], **state["shared"]}
        parts = {part_of(self.team.rank): state["own"]}
        if self.team.is_first:
            parts |= {SHARED: shared, "initialization.safetensors": self.trainer.initialization}
        self.kept.save(parts, f"step {self.trainer.step} of {self.steps}")

    def resume(self) -> str | None:
        """Goes on from the newest checkpoint; where that stands, None if there is none."""
        return self.kept.load(self._load, lambda _: self.trainer.optimizer.load_state_dict(self.optimizer_state))

    def _load(self, parts: Mapping[str, Any]) -> None:
        """All but the optimizer, which the ranks load together. The state is on the CPU, where generators and data
        orders live; what belongs on the device is copied there.
        """
        shared, rank, curve = parts[SHARED], self.team.rank, self.curve
        as_saved = shared["spread"] == [list(names) for names in self.spread]
        if as_saved:
            own = [parts[part_of(rank)]]
        else:  # rank 0 goes on with what each rank has summed over its tasks
            saved = enumerate(shared["spread"])
            own = [parts[part_of(r)] for r, names in saved if rank == 0 or {*names} & {*self.spread[rank]}]
        self.optimizer_state = self.trainer.load_own(shared, own, as_saved=as_saved, sums_up=rank == 0)
        curve.steps, curve.losses = shared["steps"], shared["losses"]
        by_name = {name: saved for part in own for name, saved in part["tasks"].items()}
        pending = torch.stack([by_name[name]["pending"] for name in curve.own], 1)
        curve.pending = list(pending.to(self.trainer.device))
        curve.closed.clear()
        self.snapshots.clear()  # of a damaged checkpoint
        self.snapshots.update(shared["snapshots"])


def part_of(rank: int) -> str:
    """The file of what belongs to a rank."""
    return f"rank-{rank}.pt"
