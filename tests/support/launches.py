"""The image program on ranks as torchrun starts them, with faults; forked from one process that has imported all."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from support.image_tasks import make_suite

from cts_fast.data import suite
from cts_fast.examples import resnet20
from cts_fast.experiments import training
from cts_fast.experiments.signals import Interrupted

LIMIT = 240  # seconds that a launch may take, on a busy machine
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__, "torch._dynamo", "scipy.stats"])  # which it imports when it needs them


class Launch:
    """`size` ranks that run the program, and the store that torchrun's agent has.

    name: the launch's; restarts: how often it was started anew. fault: called in each rank, with its number, before the
    program. An argument {rank} becomes a rank's number.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        *arguments: str,
        name: str = "launch",
        restarts: int = 0,
        fault: Callable[[int], None] | None = None,
    ) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "WORLD_SIZE": str(size),
            "TORCHELASTIC_RUN_ID": name,
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        folder.mkdir(exist_ok=True)
        self.said = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(size)]
        self.ranks = []
        for rank in range(size):
            given = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            own = [argument.format(rank=rank) for argument in arguments]
            self.ranks.append(CONTEXT.Process(target=run_rank, args=(given, self.said[rank], own, fault), daemon=True))
        for process in self.ranks:
            process.start()

    def wait(self, limit: float = LIMIT) -> list[int]:
        """The exit statuses of all ranks, which are killed after so many seconds."""
        end = time.monotonic() + limit
        try:
            for rank, process in enumerate(self.ranks):
                process.join(max(0, end - time.monotonic()))
                assert process.exitcode is not None, f"rank {rank} hangs; the ranks say: {self.errors}"
            return [process.exitcode for process in self.ranks]
        finally:
            for process in self.ranks:
                process.kill()

    @property
    def out(self) -> list[str]:
        """What each rank has printed."""
        return [out.read_text() for out, _ in self.said]

    @property
    def errors(self) -> list[str]:
        """The lines that all ranks have written as errors, but warnings."""
        lines = [line for _, err in self.said for line in err.read_text().splitlines() if line.strip()]
        return [line for line in lines if "Warning" not in line and not line.startswith("  ")]


def run_rank(environment: dict[str, str], said: tuple[Path, Path], arguments: list[str], fault) -> None:
    """The program, as one rank."""
    os.environ.update(environment)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    suite.SUITES["tiny"] = make_suite
    replace("cts_fast.experiments.report:drawings", lambda whole: lambda *given: [])  # most of such a run's time
    if fault is not None:
        fault(int(environment["RANK"]))
    sys.exit(resnet20.main(arguments))


# Faults, each of which a launch gives to all its ranks

TRAIN_STEP = "cts_fast.experiments.meta_train:MetaTrainer.train_step"
LOSS = "cts_fast.experiments.meta_train:loss"
ALL_REDUCE = "cts_fast.distributed.ranks:Ranks._all_reduce"
WRITE_PART = "cts_fast.experiments.checkpoint:write_part"
DATA = "cts_fast.experiments.cli:choose_tasks"
FINE_TUNING = "cts_fast.experiments.meta_test:MetaTester.accuracy"
FINE_TUNING_LOSS = "cts_fast.experiments.meta_test:loss"


class At:
    """On one rank something happens in the n-th call of a function, before it does anything."""

    def __init__(self, rank: int, function: str, call: int, what: Callable[[], None]) -> None:
        self.rank, self.function, self.call, self.what = rank, function, call, what

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            replace(self.function, self._replacement)

    def _replacement(self, whole: Callable) -> Callable:
        calls = [0]

        def function(*given, **options):
            calls[0] += 1
            if calls[0] == self.call:
                self.what()
            return whole(*given, **options)

        return function


def replace(function: str, by: Callable[[Callable], Callable]) -> None:
    """Put by(function) in the place of "module:function" or "module:class.function"."""
    module, _, name = function.partition(":")
    *path, last = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, by(getattr(owner, last)))


def killed() -> None:
    """As by a machine that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def asked_to_stop() -> None:
    """By somebody who knows one rank alone."""
    os.kill(os.getpid(), signal.SIGTERM)


def out_of_memory() -> None:
    """More than there is."""
    torch.empty(1 << 50, dtype=torch.uint8)


def slow() -> None:
    """A rank that the others have to wait for."""
    time.sleep(3)


class Late:
    """One rank comes when the launch's store says that it is to go on with it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
            store.wait(["on with it"])


class Poisoned:
    """The loss of one rank's n-th batch is not a number."""

    def __init__(self, rank: int, call: int) -> None:
        self.rank, self.call = rank, call

    def __call__(self, rank: int) -> None:
        if rank == self.rank:
            replace(LOSS, self._replacement)

    def _replacement(self, whole: Callable) -> Callable:
        calls = [0]

        def loss(*given, **options):
            calls[0] += 1
            return whole(*given, **options) * (float("nan") if calls[0] == self.call else 1.0)

        return loss


def saved_again(rank: int) -> None:
    """What was loaded is saved before a step is taken, and the program stops."""

    def run(self, stop, writer=None):
        self._save()
        raise Interrupted(143)

    training.Training.run = run
