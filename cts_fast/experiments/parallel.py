"""Work side by side: over the threads of a CPU, where one thread a task beats many threads on one small network, and
over ranks.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from cts_fast.distributed.launch import Team

T = TypeVar("T")
MEETING_SECONDS = 1.0  # seconds of training between two exchanges of the ranks, at most


@contextmanager
def task_map(device: torch.device | str, *, in_turn: bool = False) -> Iterator[Callable[..., list]]:
    """Yields `map` as a list: on a CPU as many calls at a time as torch has threads, each computing on one thread.

    Every call computes the same on one thread as on any machine's number of threads, so results do not depend on how
    many run at a time. in_turn: run calls one after the other on a CPU too, each still on one thread; for networks
    that draw random numbers while they train (dropout), which all come from torch's one generator: side by side, which
    call gets which would be chance. On other devices calls run one after the other. torch's thread count is restored at
    the end.
    """
    if torch.device(device).type != "cpu":
        yield _in_turn
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if in_turn:
            yield _in_turn
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield lambda function, *arguments: list(pool.map(function, *arguments))
    finally:
        torch.set_num_threads(threads)


def _in_turn(function: Callable[..., T], *arguments: Sequence) -> list[T]:
    return list(map(function, *arguments))


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The numbers of each rank's share of what costs so much, ascending: the most expensive first, each to the
    rank that has least; ranks that get nothing have an empty one.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += costs[i]
    return [sorted(share) for share in shares]


class Meetings:
    """When the ranks of a team that train together exchange news: at the same steps on all of them.

    One process alone does after every step. Ranks do about every second, or every `every` seconds if that is less: rank
    0 says at each meeting after how many steps the next one is, so that nobody has to ask in between.
    """

    def __init__(self, team: Team, step: int, every: float | None) -> None:
        self.team, self.every = team, MEETING_SECONDS if every is None else min(every, MEETING_SECONDS)
        self.step, self.next, self.time = step, step + 1, time.monotonic()

    def exchange(self, step: int, news: T) -> list[T]:
        """The news of all ranks, in their order."""
        now = time.monotonic()
        each = (now - self.time) / (step - self.step)
        ahead = 1 if self.team.size == 1 else max(1, int(self.every / max(each, 1e-6)))
        told = self.team.gather((ahead, news))
        self.step, self.next, self.time = step, step + told[0][0], time.monotonic()
        return [news for _, news in told]
