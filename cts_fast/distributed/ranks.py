"""Tasks over the ranks of a process group: agreement, φ from rank 0, and the one all-reduce of a meta-update.

A step without a meta-update talks to nobody. One with a meta-update sums Σ_t (θ′_t − φ) over the ranks, P numbers in a
buffer for each device and precision; at the end of the first one lie a few flags, small whole numbers whose sums are
exact, from which every rank reads the same verdict:

    FAILED, NONFINITE, FOUND_INF    on how many ranks
    two words of 32 bits            what step this is (counters, hyper-parameters), and once a round a digest of φ

A word travels in pieces d of four bits, each with its square: R ranks have the same one exactly where R Σd² = (Σd)².
Where a verdict is bad, all ranks tell each other what they know, and raise the same error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from cts_fast.distributed.agreement import (
    LAYOUT,
    PHI,
    NonFiniteOnRank,
    RankError,
    Report,
    digest,
    disagreement,
    in_words,
)
from cts_fast.distributed.launch import waiting_for_others
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper
from cts_fast.engine.step import any_nonfinite, shifting_step_

if TYPE_CHECKING:
    from cts_fast.engine.backends.base import Backend
    from cts_fast.engine.engine import Engine
    from cts_fast.engine.gradients import Gradients

logger = logging.getLogger(__name__)

FAILED, NONFINITE, FOUND_INF = range(3)
SHIFTS = range(0, 32, 4)  # of a word's pieces
WORD = 2 * len(SHIFTS)
FLAGS = 3 + 2 * WORD


@contextmanager
def together(ranks: Ranks | None) -> Iterator[Report]:
    """What runs inside succeeds on every rank or raises on every rank; it fills in this rank's report.

    Raises RanksDiffer where facts differ, RankError where another rank raised. ranks: None talks to nobody.
    """
    report = Report()
    try:
        yield report
    except Exception as error:
        if ranks is not None:
            ranks.gather(Report(error=in_words(error)))
        raise
    if ranks is not None:
        ranks.agree(report)


class Ranks:
    """This process and the others of a group, each with local tasks of its own: any number, heads of any shape.

    Every rank makes the same calls in the same order: the optimizer's construction, steps, resets, loads and new
    groups. Raises ValueError for what is no group, or a group without this process.
    """

    def __init__(self, group: Any) -> None:
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"process_group: {group!r} is no torch.distributed group; give dist.group.WORLD, after "
                "init_process_group(), or a group of new_group() that has this process"
            )
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.num_tasks = 0  # of all ranks
        self.buffers: list[Tensor] = []  # one for each device and precision; flags at the end of the first
        self.totals: list[Tensor] = []  # [S] of each shared Flat: parts of the buffers
        self._flats: list = []  # what the buffers were laid out for
        self._facts: Callable[[], dict[str, Any]] = dict
        self._layout: Any = None  # that part of the facts, as agreed
        self._identity = 0  # of this step
        self._digest_due = False
        self._error = ""  # what this rank raised, while it tells the others
        self._due = self._voted = (
            False  # whether this step has a meta-update, and whether its vote is through but not that
        )
        self._nonfinite = False  # the last sums came with gradients that were not finite
        self._late: tuple[Tensor, torch.cuda.Event] | None = None  # flags on their way from a GPU

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
        """Raise the same error on every rank where one raised or facts differ; else take the number of all tasks."""
        reports = self.gather(report)
        reason = disagreement(reports)
        if reason is not None:
            raise reason
        self.num_tasks = sum(report.tasks for report in reports)
        self._layout = report.facts.get(LAYOUT, self._layout)

    def start_(self, engine: Engine) -> None:
        """φ ← rank 0's, and θ ← φ where that changes it; every rank has agreed to what is laid out."""
        self._lay_out(engine)
        source = dist.get_global_rank(self.group, 0)
        for _, flat in engine.shared:
            phi = flat.phi.clone()
            with self._collective("the broadcast of the initialization"):
                dist.broadcast(phi, source, group=self.group)
            for segment in flat.start_at_(phi):
                engine.differing = engine.differing or (
                    f"{segment.where(0)}: differs from rank 0; every task starts at rank 0's first task's parameters"
                )
            flat.note_write()

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
            self._votes = torch.zeros(FLAGS, dtype=torch.float32, device=self.buffers[0].device)

    # A step -----------------------------------------------------------------------------------------------------------

    def begin(
        self,
        engine: Engine,
        facts: Callable[[], dict[str, Any]],
        counters: Sequence[int],
        control: Control,
        hyper: Sequence[Hyper],
    ) -> None:
        """Before anything of a step moves: what this rank is about to do."""
        self._facts = facts
        if self._flats != [flat for _, flat in engine.shared]:  # laid out anew: on this rank, or, edited, on all
            if facts()[LAYOUT] == self._layout:
                self._lay_out(engine)
            else:
                self.agree(Report(engine.num_tasks, facts()))
                self.start_(engine)
        groups = dict.fromkeys(segment.group for flat in self._flats for segment in flat.segments)
        planned = (*counters, control.meta_update, control.reset, control.reset_momentum, self.num_tasks)
        self._identity = crc32(repr((*planned, *(hyper[group] for group in groups))).encode())
        self._digest_due = self._digest_due or counters[0] == 0
        self._due, self._voted = control.meta_update, False

    def vote(self, engine: Engine, found_inf: Tensor | None, gradients: Sequence[Gradients]) -> tuple[bool, bool]:
        """Whether any rank's GradScaler found an infinity, and whether any of these gradients is not finite: then no
        rank steps.
        """
        bad = any_nonfinite(engine, gradients) if any(collected.present for collected in gradients) else None
        self._write_flags(self._votes, bad, found_inf)
        self._all_reduce(self._votes)
        flags = self._votes.tolist()
        self._judge(flags)
        self._voted = not flags[FOUND_INF] and not flags[NONFINITE]
        return flags[FOUND_INF] > 0, flags[NONFINITE] > 0

    def step_(self, engine: Engine, gradients: Sequence[Gradients], hyper: Sequence[Hyper], control: Control) -> None:
        """The step with its meta-update over the tasks of all ranks, as two passes with the all-reduce in between."""
        totals = {backend: total for (backend, _), total in zip(engine.shared, self.totals, strict=True)}

        def partial_(backend: Backend, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
            backend.partial_(gradients, hyper, control, totals[backend])

        shifting_step_(engine, gradients, hyper, control._replace(after=None), partial_)
        self.sum_(engine)
        for i, (backend, total) in enumerate(totals.items(), 1):
            own = control if i == len(totals) else control._replace(after=None)  # the last one ends the step
            backend.finish_(hyper, own, total)

    def summed(self, engine: Engine, values: Iterable[Tensor]) -> list[Tensor]:
        """Sums over the ranks of one tensor [S] for each shared buffer, valid until the next sums."""
        for total, value in zip(self.totals, values, strict=True):
            total.copy_(value)
        self.sum_(engine)
        return self.totals

    @torch.no_grad()
    def sum_(self, engine: Engine) -> None:
        """Totals ← their sums over the ranks. On a CPU a bad verdict raises at once, on a GPU at the next step."""
        flags = self.buffers[0][-FLAGS:]
        seen = None if engine.flags is None else [one.any().to(flags.device) for one in engine.flags]
        phis = [flat.phi for flat in self._flats] if self._digest_due and not self._error else []
        self._write_flags(flags, None if seen is None else torch.stack(seen).any(), None, phis)
        for buffer in self.buffers:
            self._all_reduce(buffer)
        self._voted = self._digest_due = False
        if flags.is_cuda:
            host = torch.empty(FLAGS, dtype=flags.dtype, pin_memory=True).copy_(flags, non_blocking=True)
            self._late = (host, torch.cuda.Event())
            self._late[1].record(torch.cuda.current_stream(flags.device))
        else:
            self._read(flags.tolist())

    def _read(self, flags: Sequence[float]) -> None:
        self._judge(flags)
        self._nonfinite = flags[NONFINITE] > 0

    def check(self, engine: Engine) -> None:
        """At the start of a step: read the flags of the last one that are still on their way from a GPU."""
        if self._late is not None:
            (flags, event), self._late = self._late, None
            event.synchronize()
            self._read(flags.tolist())
        self.report_nonfinite(engine)

    def report_nonfinite(self, engine: Engine) -> None:
        """Raise NonFiniteOnRank on every rank if the last sums came with a gradient that was not finite."""
        if self._nonfinite:
            self._nonfinite = False
            own = engine.find_nonfinite()
            reports = self.gather(Report(nonfinite=own and (own.task, own.parameter)))
            raise next(NonFiniteOnRank(r, *report.nonfinite) for r, report in enumerate(reports) if report.nonfinite)

    def share(self, error: Exception, engine: Engine, votes: bool) -> None:
        """This rank raised in a step: join the others' next collective with a flag, so that all of them raise.

        votes: whether every step begins with a vote. Where the others raise too, nothing is done.
        """
        next_is_vote, self._voted = votes and not (self._voted and self._due), False
        if isinstance(error, RankError):
            return
        self._error = in_words(error)
        if not next_is_vote and self.size > 1:
            logger.warning("rank %d waits for the others' next meta-update to tell: %s", self.rank, self._error)
        try:
            self.check(engine)
            if next_is_vote:
                self.vote(engine, None, ())
            else:
                for total in self.totals:
                    total.zero_()
                self.sum_(engine)
                self.check(engine)
        except RankError as told:
            if self._error not in str(told):
                logger.warning("rank %d: %s", self.rank, told)
        finally:
            self._error, self._voted = "", False

    # Flags ------------------------------------------------------------------------------------------------------------

    def _write_flags(
        self, flags: Tensor, nonfinite: Tensor | None, found_inf: Tensor | None, phis: Sequence[Tensor] = ()
    ) -> None:
        pieces = [self._identity >> shift & 15 for shift in SHIFTS]
        word = [0] * WORD if self._error else [*pieces, *(d * d for d in pieces)]
        on_host = [bool(self._error), 0, 0, *word, *[0] * WORD]
        flags.copy_(torch.tensor(on_host, dtype=flags.dtype, device="cpu"), non_blocking=True)
        for place, value in ((NONFINITE, nonfinite), (FOUND_INF, found_inf)):
            if value is not None:
                flags[place] = torch.as_tensor(value, device=flags.device).reshape(())  # a GradScaler's may be a number
        if phis:
            d = digest(phis, flags.device) >> torch.arange(0, 32, 4, device=flags.device) & 15
            flags[-WORD:] = torch.cat([d, d * d])

    def _judge(self, flags: Sequence[float]) -> None:
        """Raise on every rank where the flags say that one raised, or that the ranks are apart."""
        pieces = zip(*(iter(flags[3:]),) * len(SHIFTS), strict=True)  # d, d², d, d²
        identity, squares, phi, phi_squares = pieces
        same = all(
            self.size * square == total * total
            for total, square in zip((*identity, *phi), (*squares, *phi_squares), strict=True)
        )
        if same and not flags[FAILED]:
            return
        phi = int(digest([flat.phi for flat in self._flats], self.buffers[0].device))
        reason = disagreement(self.gather(Report(facts={**self._facts(), PHI: phi}, error=self._error)))
        raise reason or RankError("the ranks are not at the same step; every rank makes the same calls in one order")

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
