"""Real processes with gloo between them, started once, that run one check after the other."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

TIMEOUT = 180  # seconds that a check may take, on a busy machine
# Processes of their own, forked from one that has imported what takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed", "torch._dynamo"])


class Outcome(NamedTuple):
    """What a check came to on one rank: a value, or what it raised."""

    value: Any
    error: str = ""  # "ValueError: …"
    trace: str = ""


class RankPool:
    """`most` processes; a check runs on the first few of them, in a new group of theirs."""

    def __init__(self, most: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        pipes = [PROCESSES.Pipe() for _ in range(most)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            PROCESSES.Process(target=_serve, args=(theirs, rank, most, store), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, size: int, check: Callable, *given: Any) -> list[Outcome]:
        """check(group, *given) on `size` ranks; what came of it on each."""
        for pipe in self.pipes:
            pipe.send((size, check, given))
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                self.close()
                raise AssertionError(f"rank {rank} of {size} hangs in {check.__name__}")
            outcomes.append(pipe.recv())
        return outcomes[:size]

    def values(self, size: int, check: Callable, *given: Any) -> list[Any]:
        """What the check returns on each rank; none may raise."""
        outcomes = self.run(size, check, *given)
        for rank, outcome in enumerate(outcomes):
            assert not outcome.error, f"rank {rank} of {size}: {outcome.trace}"
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(pipe, rank: int, size: int, store: str) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    init(rank, size, store)
    while True:
        wanted, check, given = pipe.recv()
        group = dist.new_group(list(range(wanted)), timeout=timedelta(seconds=TIMEOUT / 2))
        outcome = Outcome(None)
        try:
            if rank < wanted:
                outcome = Outcome(check(group, *given))
        except Exception as error:
            outcome = Outcome(None, f"{type(error).__name__}: {error}", traceback.format_exc())
        pipe.send(outcome)


def init(rank: int, size: int, store: str) -> None:
    """The default group of this process and the others that name the same file."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # wherever this machine's name leads to
    method = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=method, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
