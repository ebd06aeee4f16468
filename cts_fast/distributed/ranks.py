"""Tasks over the ranks of a process group: agreement, φ from rank 0, and the one all-reduce of a meta-update.

A step without a meta-update talks to nobody. One with a meta-update sums Σ_t (θ′_t − φ) over the ranks, P numbers in a
buffer for each device and precision; at the end of the first one lie the flags of `flags`, from which every rank reads
the same verdict. Where it is bad, all ranks tell each other what they know, and raise the same error.

A rank talks only in calls in which the others do, whatever happens to it, so that its collectives never meet those
that a program runs on the same group between two calls:

    it raises where the others sum or vote    it comes to that with a flag, and all of them raise in this call
    it raises where they talk to nobody       it raises at once, takes no further step, and comes with a flag in the
                                              call in which they sum next
    it loads, adds a group, or uses a         it comes with a flag to what a step would begin with, and goes on where
    GradScaler, or none, from now on          all of them meet there
    its parameters were exchanged             likewise in the next call with a sum
    its weights were loaded at a round's      it takes them for φ; at the next sum all ranks know of it, compare, and go
    start                                     back to the former φ where they differ

A step that broke off half-way, here or elsewhere, leaves ranks `torn`: none takes another step, or saves its state,
before a load or a new round has brought them together. On GPUs, where flags are read a step later, the others have by
then finished theirs, and φ and counters moved on without the tasks of the rank that raised: there only a load does. A
new round would be refused by what differs in its first sum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from cts_fast.distributed import flags as flagged
from cts_fast.distributed.agreement import (
    LAYOUT,
    PHI_DIGEST,
    NonFiniteOnRank,
    RankError,
    Report,
    Torn,
    digest,
    disagreement,
    in_words,
)
from cts_fast.distributed.flags import FAILED, FLAGS, FOUND_INF, LOADED, MEETING, MOVED, NONFINITE
from cts_fast.distributed.launch import waiting_for_others
from cts_fast.engine.plan import Control, Counters
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.engine.step import any_nonfinite, shifting_step_

if TYPE_CHECKING:
    from cts_fast.engine.backends.base import Backend
    from cts_fast.engine.engine import Engine
    from cts_fast.engine.gradients import Gradients

logger = logging.getLogger(__name__)

VOTE, SUM = "vote", "sum"  # what a step may come with
STEP = "step()"
WHOLE_AGAIN = (
    "no rank takes another step before load_state_dict() of a checkpoint on every rank has made them whole, or, on "
    "CPUs, reset_tasks() or load_initialization(), which begin the round anew and leave heads as they are"
)


@contextmanager
def together(ranks: Ranks | None, call: str) -> Iterator[Report]:
    """What runs inside succeeds on every rank or raises on every rank; it fills in this rank's report.

    Raises RanksDiffer where facts differ, RankError where another rank raised. ranks: None talks to nobody. call: its
    name, for messages.
    """
    report = Report(call)
    try:
        yield report
    except Exception as error:
        if ranks is not None:
            ranks.tell(Report(call, error=in_words(error)))
        raise
    if ranks is not None:
        ranks.agree(report)


class Ranks:
    """This process and the others of a group, each with local tasks of its own: any number, heads of any shape.

    Every rank makes the same calls in the same order: the optimizer's construction, steps, resets, loads and new
    groups. The collectives run on the group that was given, between those of the program; one that lets some ranks do
    collectives of its own which others leave out, after an error say, gives the optimizer a group of its own
    (torch.distributed.new_group()). Raises ValueError for what is no group, or a group without this process.
    """

    def __init__(self, group: Any) -> None:
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"process_group: {group!r} is no torch.distributed group; give dist.group.WORLD, after "
                "init_process_group(), or a group of new_group() that has this process"
            )
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.num_tasks = 0  # of all ranks
        self.torn = ""  # why this rank takes no step; "" if it does
        self.buffers: list[Tensor] = []  # one for each device and precision; flags at the end of the first
        self.totals: list[Tensor] = []  # [S] of each shared Flat: parts of the buffers
        self._flats: list = []  # what the buffers were laid out for
        self._layout: Any = None  # that part of the facts, as agreed
        self._votes = False  # whether every step begins with a vote, as agreed
        self._facts: Callable[[], dict[str, Any]] = dict
        self._step = 0  # the word of this step
        self._ahead: list[str] = []  # what of VOTE and SUM this step has still to come
        self._begun = self._moving = False  # whether a step has begun, and whether it has begun to write
        self._round_began = False  # since the last sum
        self._former: list[Tensor] | None = None  # φ before weights were loaded that the others do not know of yet
        self._after = Counters(0, 0, 0)  # this step
        self._position: Counters | None = None  # the others' counters, where this rank takes no step
        self._nonfinite = False  # the last sums came with gradients that were not finite
        self._late: tuple[Tensor, torch.cuda.Event, Callable[[], Report]] | None = None  # flags on their way from a GPU

    # Agreement --------------------------------------------------------------------------------------------------------

    def gather(self, report: Report) -> list[Report]:
        """The reports of all ranks, in their order."""
        found: list[Any] = [None] * self.size
        own = vars(report)
        with self._collective("an exchange of reports"):
            dist.all_gather_object(found, own, group=self.group)
        # a rank may be of another version, which its facts then say
        return [Report(**{name: given[name] for name in own if name in given}) for given in found]

    def agree(self, report: Report) -> None:
        """Raise the same error on every rank where one raised, is not here, or facts differ; else take the number of
        all tasks.
        """
        reports = self._meet(report)
        reason = disagreement(reports)
        if reason is not None:
            raise reason
        self.num_tasks = sum(report.tasks for report in reports)
        self._layout = report.facts.get(LAYOUT, self._layout)

    def tell(self, report: Report) -> None:
        """As `agree` where this rank is about to raise by itself."""
        try:
            self._meet(report)
        except RankError as told:
            logger.warning("rank %d: %s", self.rank, told)

    def _meet(self, report: Report) -> list[Report]:
        """The reports of all ranks; the same error on all of them where some are in another call."""
        if self.buffers:
            self._come(VOTE if self._votes else SUM, MEETING, report)
        return self.gather(report)

    def start_(self, engine: Engine) -> None:
        """φ ← rank 0's, and θ ← φ where that changes it; every rank has agreed to what is laid out."""
        self._lay_out(engine)
        self._former = None
        for _, flat in engine.shared:
            for segment in flat.start_at_(self._of_rank_0(flat.phi)):
                engine.differing = engine.differing or (
                    f"{segment.where(0)}: differs from rank 0; every task starts at rank 0's first task's parameters"
                )
            flat.note_write()
        engine.note_phi()

    def _of_rank_0(self, tensor: Tensor) -> Tensor:
        values = tensor.clone()
        with self._collective("the broadcast of the initialization"):
            dist.broadcast(values, dist.get_global_rank(self.group, 0), group=self.group)
        return values

    def _lay_out(self, engine: Engine) -> None:
        """Buffers for what is reduced."""
        self._flats = [flat for _, flat in engine.shared]
        columns: dict[tuple[torch.device, torch.dtype], int] = {}
        places = []
        for flat in self._flats:
            key = (flat.device, flat.work_dtype)
            first = columns.get(key, 0)
            columns[key] = first + flat.columns
            places.append((key, slice(first, first + flat.columns)))
        with torch.inference_mode(False):
            buffers = {
                key: torch.zeros(count + FLAGS * (i == 0), dtype=key[1], device=key[0])
                for i, (key, count) in enumerate(columns.items())
            }
            self.buffers, self.totals = list(buffers.values()), [buffers[key][at] for key, at in places]
            self._ballot = torch.zeros(FLAGS, dtype=torch.float32, device=self.buffers[0].device)

    def refuse_torn(self) -> None:
        """Raise Torn where a step broke off half-way."""
        if self._moving and not self.torn:  # what no except clause has seen
            self.torn = "an interrupt ended the last step half-way"
        if self.torn:
            raise Torn(f"{self.torn}; {WHOLE_AGAIN}")

    def mend(self, same_phi: bool = False) -> None:
        """A new round, or a load, has brought this rank where the others are. same_phi: φ is theirs by that."""
        self.torn, self._position, self._moving = "", None, False
        self._round_began = True  # the next sum compares φ
        if same_phi:
            self._former = None

    # A step -----------------------------------------------------------------------------------------------------------

    def begin(
        self,
        engine: Engine,
        facts: Callable[[], dict[str, Any]],
        counters: Sequence[int],
        planned: tuple[Control, Counters],
        settings: Sequence,
        votes: bool,
    ) -> None:
        """Before anything of a step moves: what this rank is about to do.

        planned: what it does, and the counters after it. settings: what must be the same on all ranks in every step.
        votes: whether they agree before it on doing it.
        """
        control, self._after = planned
        word = (*counters, control.meta_update, control.reset, control.reset_momentum, self.num_tasks, *settings)
        self._facts, self._step = facts, crc32(repr(word).encode())
        self._round_began = self._round_began or counters[0] == 0
        self._ahead = self._talks(control, self._votes)
        self._begun = True
        relaid = self._flats != [flat for _, flat in engine.shared]  # on this rank, or, edited, on all
        if relaid and self._ahead and facts()[LAYOUT] == self._layout:
            self._lay_out(engine)
            relaid = False
        if votes != self._votes or (relaid and self._ahead):
            self.agree(Report(STEP, engine.num_tasks, facts()))
            self._votes, self._ahead = votes, self._talks(control, votes)
            if relaid:
                self.start_(engine)

    @staticmethod
    def _talks(control: Control, votes: bool) -> list[str]:
        return [VOTE] * votes + [SUM] * control.meta_update

    def vote(self, engine: Engine, found_inf: Tensor | None, gradients: Sequence[Gradients]) -> tuple[bool, bool]:
        """Whether any rank's GradScaler found an infinity, and whether any of these gradients is not finite: then no
        rank steps.
        """
        bad = any_nonfinite(engine, gradients) if any(collected.present for collected in gradients) else None
        flags = self._ballot
        flagged.write(flags, {}, self._step)
        self._add(flags, NONFINITE, bad)
        self._add(flags, FOUND_INF, found_inf)
        self._all_reduce(flags)
        found = flags.tolist()
        self._judge(found, self._report)
        self._ahead.remove(VOTE)
        return found[FOUND_INF] > 0, found[NONFINITE] > 0

    def begin_round_(self, engine: Engine) -> None:
        """As the engine's where all tasks are here: weights that were loaded are φ until the next sum compares them."""

        def keep() -> None:
            self._former = self._former or [flat.phi.clone() for _, flat in engine.shared]

        engine.begin_round_(keep)

    def moves(self) -> None:
        """From here on an error leaves half a step."""
        self._moving = True

    def end(self, engine: Engine) -> None:
        """The step is done, or left out on all ranks. Raises as `report_nonfinite`."""
        self._begun = self._moving = False
        self.report_nonfinite(engine)

    def step_(self, engine: Engine, gradients: Sequence[Gradients], hyper: Sequence[Hyper], control: Control) -> None:
        """The step with its meta-update over the tasks of all ranks, as two passes with the all-reduce in between."""
        totals = {backend: total for (backend, _), total in zip(engine.shared, self.totals, strict=True)}

        def partial_(backend: Backend, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
            backend.partial_(gradients, hyper, control, totals[backend])

        def again_() -> None:
            for flat, total in zip(self._flats, self.totals, strict=True):
                torch.sum(flat.work_theta - flat.phi, 0, out=total)

        shifting_step_(engine, gradients, hyper, control._replace(after=None), partial_)
        self._sum_(engine, again_)
        for i, (backend, total) in enumerate(totals.items(), 1):
            own = control if i == len(totals) else control._replace(after=None)  # the last one ends the step
            backend.finish_(hyper, own, total)

    def summed(self, engine: Engine, values: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks of one tensor [S] for each shared buffer, valid until the next sums."""

        def fill_() -> None:
            for total, value in zip(self.totals, values, strict=True):
                total.copy_(value)

        fill_()
        self._sum_(engine, fill_)
        return self.totals

    @torch.no_grad()
    def _sum_(self, engine: Engine, again_: Callable[[], None]) -> None:
        """Totals ← their sums over the ranks. again_: makes this rank's anew, where φ goes back to what it was.

        On a CPU, and everywhere in a round's first sum, a bad verdict raises at once; on a GPU else at the next step.
        By then the ranks that did not raise have finished theirs, without the tasks of the one that did.
        """
        flags = self.buffers[0][-FLAGS:]
        while True:
            flagged.write(flags, {MOVED: True, LOADED: self._former is not None}, self._step)
            if self._round_began:
                flagged.write_digest(flags, digest([flat.phi for flat in self._flats], flags.device))
            self._add(flags, NONFINITE, engine.any_flagged())
            for buffer in self.buffers:
                self._all_reduce(buffer)
            self._ahead = []
            if flags.is_cuda and not self._round_began:
                self._send(flags, self._report)
                return
            if not self._read(flags.tolist(), self._report):
                self._round_began = False
                return
            self._settle_(engine)
            again_()

    def _settle_(self, engine: Engine) -> None:
        """Weights were loaded on some ranks at the round's start: φ is what all of them hold, or else the former."""
        given = [self._of_rank_0(flat.phi) for flat in self._flats]
        places = [
            (flat, phi, segment) for flat, phi in zip(self._flats, given, strict=True) for segment in flat.segments
        ]
        own = [not flat.phi[segment.columns].equal(phi[segment.columns]) for flat, phi, segment in places]
        reports = [report.found for report in self.gather(Report(STEP, found=own))]
        former = dict(zip(self._flats, self._former or [flat.phi for flat in self._flats], strict=True))
        self._former = None
        for (flat, phi, segment), differs in zip(places, zip(*reports, strict=True), strict=True):
            values = former[flat] if any(differs) else phi
            flat.phi[segment.columns] = values[segment.columns].clone()
            if any(differs):
                engine.differing = engine.differing or (
                    f"rank {differs.index(True)}, parameter {segment.name!r}: its tasks began this round elsewhere "
                    "than rank 0's, so φ stays; load the same weights into every task, or call reset_tasks()"
                )

    # What is wrong ----------------------------------------------------------------------------------------------------

    def check(self, engine: Engine) -> None:
        """At the start of a step: read the flags of the last one that are still on their way from a GPU."""
        self._read_late()
        self.refuse_torn()
        self.report_nonfinite(engine)

    def report_nonfinite(self, engine: Engine) -> None:
        """Raise NonFiniteOnRank on every rank if the last sums came with a gradient that was not finite."""
        if self._nonfinite:
            self._nonfinite = False
            own = engine.find_nonfinite()
            reports = self.gather(Report(STEP, found=own and (own.task, own.parameter)))
            raise next(NonFiniteOnRank(r, *report.found) for r, report in enumerate(reports) if report.found)

    def share(self, error: Exception, engine: Engine, plan: Callable[[Counters], tuple[Control, Counters]]) -> None:
        """This rank raised in a step: where the others talk in this call it comes with a flag, and all of them raise;
        else it is torn, and will.
        """
        try:
            if isinstance(error, RankError) and not isinstance(error, Torn):  # all of them know
                if self._moving and not self.torn:
                    self.torn = f"the last step broke off half-way: {error}"
                return
            if not self._begun:
                position = self._position or Counters(*engine.counters.read()[:3])
                self._round_began = self._round_began or position.inner_step == 0
                try:
                    control, self._after = plan(position)
                    self._ahead = self._talks(control, self._votes)
                except Exception:  # maybe the very error; where the others sum is not known, but they will
                    self._ahead = [VOTE if self._votes else SUM]
            if self._ahead:
                self._tell_in_step(self._ahead[0], self.torn or in_words(error))
            else:
                self.torn = self.torn or f"a step of this rank raised, and the others took theirs: {in_words(error)}"
                self._position = self._after
            if self.torn and not isinstance(error, Torn):
                logger.warning("rank %d: %s; %s", self.rank, self.torn, WHOLE_AGAIN)
        finally:
            self._ahead, self._begun, self._moving = [], False, False

    def _tell_in_step(self, form: str, error: str) -> None:
        try:
            self._come(form, FAILED, Report(STEP, error=error))
        except RankError as told:
            if error not in str(told):
                logger.warning("rank %d: %s", self.rank, told)
            if self._moving and not self.torn:
                self.torn = f"a step of this rank broke off half-way: {error}"

    def _come(self, form: str, flag: int, report: Report) -> None:
        """To the others' next vote or sum with a flag and nothing to add: raises on all of them unless all meet."""
        self._read_late()
        for total in self.totals if form == SUM else ():
            total.zero_()
        flags = self._ballot if form == VOTE else self.buffers[0][-FLAGS:]
        flagged.write(flags, {flag: True, MOVED: bool(self.torn) or self._moving}, None)
        for buffer in [self._ballot] if form == VOTE else self.buffers:
            self._all_reduce(buffer)
        if flags.is_cuda and form == SUM and flag == FAILED and not self._round_began:
            self._send(flags, lambda: report)  # as the others read them
        else:
            self._read(flags.tolist(), lambda: report)

    def _report(self) -> Report:
        """What this rank is doing, in a step."""
        phi = int(digest([flat.phi for flat in self._flats], self.buffers[0].device))
        return Report(STEP, facts={**self._facts(), PHI_DIGEST: phi})

    def _send(self, flags: Tensor, report: Callable[[], Report]) -> None:
        """Flags of a GPU are on their way, and nobody waits for them."""
        host = torch.empty(FLAGS, dtype=flags.dtype, device="cpu", pin_memory=True).copy_(flags, non_blocking=True)
        self._late = (host, torch.cuda.Event(), report)
        self._late[1].record(torch.cuda.current_stream(flags.device))

    def _read_late(self) -> None:
        if self._late is not None:
            (flags, arrived, report), self._late = self._late, None
            arrived.synchronize()
            self._read(flags.tolist(), report)

    def _read(self, flags: Sequence[float], report: Callable[[], Report]) -> bool:
        """Whether weights were loaded on some ranks at this round's start; raises as `_judge`."""
        self._judge(flags, report)
        self._nonfinite = self._nonfinite or flags[NONFINITE] > 0
        return flags[LOADED] > 0

    def _judge(self, flags: Sequence[float], report: Callable[[], Report]) -> None:
        """Raise on every rank where the flags say that one raised or is elsewhere, or that the ranks are apart."""
        at_one_step, same_phi = flagged.same_words(flags, self.size)
        meets = flags[MEETING] == self.size
        differ = flags[MEETING] or not at_one_step or not (same_phi or flags[LOADED])
        if not flags[FAILED] and (meets or not differ):
            return
        reason = disagreement(self.gather(report()))
        reason = reason or RankError("the ranks are not at the same step; every rank makes the same calls in one order")
        if flags[MOVED]:
            self.torn = self.torn or f"a step broke off half-way: {reason}"
            reason = type(reason)(f"{reason}. That broke a step off half-way: {WHOLE_AGAIN}")
        raise reason

    @staticmethod
    def _add(flags: Tensor, place: int, value: Any) -> None:
        if value is not None:
            flags[place] = torch.as_tensor(value, device=flags.device).reshape(())  # a GradScaler's may be a number

    def _all_reduce(self, tensor: Tensor) -> None:
        with self._collective("an all-reduce"):
            dist.all_reduce(tensor, group=self.group)

    def _collective(self, what: str) -> AbstractContextManager[None]:
        return waiting_for_others(self.rank, self.size, what)


def check_over_ranks(ranks: Ranks | None, method: str, reason: str, capturable: bool) -> None:
    """Raise ValueError for what cannot run over ranks. reason: why the method does not; "" if it does."""
    if ranks is None:
        return
    if reason:
        raise ValueError(f"process_group: {method} runs in one process: {reason}; give process_group=None")
    if capturable:
        raise ValueError(
            "process_group: capturable=True leaves no decision to the host, and ranks agree on the host; "
            "use capturable=False"
        )
