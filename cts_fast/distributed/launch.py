"""The processes of one launch: this one alone, or the ranks that torchrun started.

What a program's ranks tell each other beside the optimizer's own all-reduce are plain objects, in one kind of exchange:
every rank gives one and gets all. A rank that cannot go on says so in the launch's store before it ends; the others,
whose next exchange fails with it, find its word there and end as quietly as it ended loudly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist

from cts_fast.distributed.agreement import RankError

T = TypeVar("T")

TIMEOUT = 1800.0  # seconds that a rank waits for another one: as long as torch.distributed does
PATIENCE = timedelta(days=30)
ENDED = "ended"  # key of the store: the first rank that ended otherwise than well, and its exit status


class Team:
    """The processes that run one program. Every rank makes the same exchanges in the same order.

    Attributes:
        rank, size: of this process among `size`; group: the torch.distributed group, None for one process alone.
        device: of this rank. launch: what tells this launch from another, "" without torchrun; restarts: how often
        torchrun has started the program anew.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.device = 0, 1, "cpu"
        self.group: Any = None
        self.patient: Any = None  # the same ranks: one that is gone is noticed, one that is slow may take its time
        self.launch, self.restarts = "", 0
        self.agents: dist.Store | None = None  # torchrun's own, which outlives this start
        self.store: dist.Store | None = None  # of this start

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which shows progress and writes what all have found."""
        return self.rank == 0

    def meet(self, device: str = "cpu", timeout: float = TIMEOUT) -> None:
        """Make the group of all ranks, and choose this one's device.

        device: "cuda" gives each rank the GPU of its number on its machine. timeout: seconds that a rank waits for
        another. Raises RankError where the ranks do not find each other, ValueError for a device that several ranks
        cannot share. Nothing to wait for is left to torch.distributed before all ranks are there: it takes no signal.
        """
        self.device = device
        if self.size == 1:
            return
        wait, end = timedelta(seconds=timeout), time.monotonic() + timeout
        with waiting_for_others(self.rank, self.size, "the start of the group"):
            self.agents, _, _ = next(dist.rendezvous("env://", timeout=wait))
            self._find_each_other(self.agents, end)
        self.device = self._own(device)
        with waiting_for_others(self.rank, self.size, "the start of the group"):
            assert self.store is not None  # they have found each other
            self.store.set(f"ready/{self.rank}", "")
            self._wait(self.store, "ready", end)
            backend = "cpu:gloo,cuda:nccl" if self.device.startswith("cuda") else "gloo"
            store = dist.PrefixStore("group", self.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=wait)
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.group = dist.group.WORLD
        self.restarts = max(self.gather(self.restarts))  # a machine whose ranks were well has not counted

    def _find_each_other(self, agents: dist.Store, end: float) -> None:
        """A store that the ranks of this start share, and those of no other one.

        torchrun starts ranks anew with the store of those before them, and old keys would lead the new ranks to
        addresses where nobody is; how often it has done so is not the same number on all machines. So each rank says
        hello under a name that nobody had, and rank 0 tells each name that it finds what this start is called, its own
        name, until all have come.
        """
        name = uuid4().hex
        agents.set(f"hello/{self.rank}", name)
        try:
            if self.is_first:
                self.store = dist.PrefixStore(name, agents)
                self._wait(self.store, "here", end, lambda: self._welcome(agents, name))
                return
            while not agents.check([f"welcome/{name}"]):
                self._named(agents, 0)
                _pause(end, "rank 0")
        except BaseException:
            agents.set(f"gone/{name}", str(self.restarts))
            raise
        self.store = dist.PrefixStore(agents.get(f"welcome/{name}").decode(), agents)
        self.store.set(f"here/{self.rank}", "")

    def _welcome(self, agents: dist.Store, start: str) -> None:
        for rank in range(1, self.size):
            if found := self._named(agents, rank):
                agents.set(f"welcome/{found}", start)

    def _named(self, agents: dist.Store, rank: int) -> str:
        """The name under which a rank says hello, of an earlier start maybe; "" if it has not come yet.

        Raises RuntimeError where it was there in this start and has gone.
        """
        if not agents.check([f"hello/{rank}"]):
            return ""
        found = agents.get(f"hello/{rank}").decode()
        if agents.check([f"gone/{found}"]) and agents.get(f"gone/{found}").decode() == str(self.restarts):
            raise RuntimeError(f"rank {rank} has gone")
        return found

    def _wait(self, store: dist.Store, what: str, end: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until all other ranks are ``here`` or ``ready``; raises RuntimeError where one has ended, or is late."""
        missing = {rank for rank in range(self.size) if rank != self.rank and (self.is_first or what == "ready")}
        while missing := {rank for rank in missing if not store.check([f"{what}/{rank}"])}:
            if store.check([ENDED]):
                raise RuntimeError(f"rank {store.get(ENDED).decode().split()[0]} has ended")
            meanwhile()
            _pause(end, f"rank {min(missing)}")

    def _own(self, device: str) -> str:
        """This rank's device."""
        try:
            where = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"--device {device} is none: {str(error).splitlines()[0]}") from None
        if where.type != "cuda":
            return device
        if where.index is not None:
            raise ValueError(f"--device {device}: every rank takes a GPU of its own; give --device cuda")
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ValueError(
                f"--device cuda: rank {self.rank} is number {local} on its machine and finds {count} GPUs there; every "
                "rank takes one of its own"
            )
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    def gather(self, value: T, patiently: bool = False) -> list[T]:
        """What every rank gives, in their order. patiently: behind work that may take one rank much longer than others.

        Raises RankError where one is gone, or does not come in time.
        """
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        with waiting_for_others(self.rank, self.size, "an exchange"):
            dist.all_gather_object(found, value, group=self.patient if patiently else self.group)
        return found

    def note(self, fact: str) -> None:
        """Remember a fact for as long as the launch lasts, however often torchrun starts ranks anew."""
        if self.agents is not None:
            self.agents.set(f"note/{fact}", "")

    def has_noted(self, fact: str) -> bool:
        """Whether a rank of this launch has noted this fact."""
        return self.agents is not None and self.agents.check([f"note/{fact}"])

    def end(self, status: int) -> tuple[int, int]:
        """This rank ends otherwise than well: which rank was the first to do so, and with what exit status."""
        own = self.rank, status
        if self.store is None:
            return own
        try:
            said = self.store.compare_set(ENDED, "", f"{self.rank} {status}").decode()
        except RuntimeError:  # the store went first
            return own
        rank, status = map(int, said.split())
        return rank, status

    def close(self) -> None:
        """Leave the group; when all of it is done."""
        if self.group is not None:
            dist.destroy_process_group()
            self.group = self.patient = None


ALONE = Team()


def launched() -> Team:
    """The team that torchrun's environment describes, whose ranks have not met yet; without it this process alone."""
    team = Team()
    if dist.is_torchelastic_launched():
        team.launch, team.restarts = os.environ["TORCHELASTIC_RUN_ID"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        team.rank, team.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return team


def _pause(end: float, missing: str) -> None:
    """A moment in which signals are taken; raises RuntimeError when it is too late."""
    if time.monotonic() > end:
        raise RuntimeError(f"{missing} has not come in time")
    time.sleep(0.02)


@contextmanager
def waiting_for_others(rank: int, size: int, what: str) -> Iterator[None]:
    """Raises RankError, which says what it means, where torch.distributed gives up."""
    try:
        yield
    except (RuntimeError, ValueError) as lost:  # ValueError: the group was destroyed
        raise RankError(
            f"rank {rank} of {size}: {what} failed. Where another rank is gone, or did not come within "
            f"the group's timeout, start all of them again from their last checkpoint. ({lost})"
        ) from lost
