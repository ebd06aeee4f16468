"""The processes of one launch: this one alone, or the ranks that torchrun started.

What a program's ranks tell each other beside the optimizer's own all-reduce are plain objects, in one kind of exchange:
every rank gives one and gets all. A rank that cannot go on says so in the launch's store before it ends; the others,
whose next exchange fails with it, find its word there and end as quietly as it ended loudly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
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

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.size, self.device = 0, 1, device
        self.group: Any = None
        self.patient: Any = None  # the same ranks: one that is gone is noticed, one that is slow may take its time
        self.launch, self.restarts = "", 0
        self.store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which shows progress and writes what all have found."""
        return self.rank == 0

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


def launched(device: str = "cpu", timeout: float = TIMEOUT) -> Team:
    """The team that torchrun's environment describes, in a group of its own; without torchrun this process alone.

    device: "cuda" gives each rank the GPU of its number on its machine. timeout: seconds that a rank waits for another.
    Raises RankError where the ranks do not find each other, ValueError for a device that several ranks cannot share.
    """
    team = Team(device)
    if not dist.is_torchelastic_launched():
        return team
    team.launch, team.restarts = os.environ["TORCHELASTIC_RUN_ID"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    team.rank, team.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if team.size == 1:
        return team
    where = torch.device(device)
    if where.type == "cuda":
        if where.index is not None:
            raise ValueError(f"--device {device}: every rank takes a GPU of its own; give --device cuda")
        team.device = f"cuda:{os.environ['LOCAL_RANK']}"
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda: rank {team.rank} finds no GPU of its own among {torch.cuda.device_count()} here; give "
                "torchrun --nproc-per-node as many as there are"
            )
        torch.cuda.set_device(team.device)
    wait = timedelta(seconds=timeout)
    with waiting_for_others(team.rank, team.size, "the start of the group"):
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        team.store = dist.PrefixStore(_this_start(store, rank, size, timeout), store)
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", team.store), rank=rank, world_size=size, timeout=wait
        )
        team.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    team.group = dist.group.WORLD
    team.restarts = max(team.gather(team.restarts))  # a machine whose ranks were well has not counted
    return team


def _this_start(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name that the ranks of this start agree on, and those of no other one.

    torchrun starts ranks anew with the store of those before them, and old keys would lead the new ranks to addresses
    where nobody is; how often it has done so is not the same number on all machines. So each rank says hello under a
    name that nobody had, and rank 0 tells each name that it finds what this start is called, until all have come.
    """
    name, end = uuid4().hex, time.monotonic() + timeout
    store.set(f"hello/{rank}", name)
    if rank > 0:
        start = store.get(f"welcome/{name}").decode()  # waits
        store.set(f"here/{start}/{rank}", "")
        return start
    missing, known = set(range(1, size)), set()
    while missing:
        for other in missing:
            found = store.get(f"hello/{other}").decode()
            if found not in known:  # it may be of a rank that is gone
                known.add(found)
                store.set(f"welcome/{found}", name)
        missing = {other for other in missing if not store.check([f"here/{name}/{other}"])}
        if missing and time.monotonic() > end:
            raise RuntimeError(f"rank {min(missing)} has not come within {timeout:g} seconds")
        time.sleep(0.01)
    return name


@contextmanager
def waiting_for_others(rank: int, size: int, what: str) -> Iterator[None]:
    """Raises RankError, which says what it means, where torch.distributed gives up."""
    try:
        yield
    except RuntimeError as lost:
        raise RankError(
            f"rank {rank} of {size}: {what} failed. Where another rank is gone, or did not come within "
            f"the group's timeout, start all of them again from their last checkpoint. ({lost})"
        ) from lost
