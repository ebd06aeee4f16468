"""Ranks that die: the others end with a clear error within the group's timeout."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.ranks import PROCESSES, init
from support.step_cases import Case, build, set_gradients

TIMEOUT = 8.0  # of the group, in seconds
CASE = Case(1, ((5, 3),), options=dict(lr=0.1, momentum=0.9, meta_lr=0.3, horizon=4))


class Dies(torch.autograd.Function):
    """A backward pass in which the process is killed, as by a machine that is out of memory."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        os.kill(os.getpid(), signal.SIGKILL)


def step_until(rank: int, size: int, store: str, how: str, pipe) -> None:
    """Steps; the last rank ends in its third one, in some way. Says what the others raise, and after how long."""
    torch.set_num_threads(1)
    init(rank, size, store)
    dist.barrier()  # all have started, which may take long
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    opt, params = build(CASE, "auto", process_group=group)
    began = 0.0
    try:
        for step in range(4):
            set_gradients(CASE, params, step)
            began = time.monotonic()
            if step == 2 and rank == size - 1:
                if how == "killed":
                    opt.step(lambda: Dies.apply(params[0][0]).backward())
                time.sleep(3 * TIMEOUT)  # stuck
            opt.step()
        pipe.send(("", 0.0))
    except RuntimeError as error:
        pipe.send((str(error), time.monotonic() - began))


@pytest.mark.parametrize("how", ["killed", pytest.param("stuck", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_others_end_with_a_clear_error_in_time(tmp_path, size, how):
    pipes = [PROCESSES.Pipe() for _ in range(size)]
    given = (size, str(tmp_path / "store"), how)
    ranks = [
        PROCESSES.Process(target=step_until, args=(rank, *given, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    try:
        for rank, (ours, _) in enumerate(pipes[:-1]):
            assert ours.poll(120), "it waits for ever"
            error, seconds = ours.recv()
            assert error.startswith(f"rank {rank} of {size}: an all-reduce failed. Where another rank is gone")
            assert seconds < TIMEOUT + 5
        if how == "killed":
            ranks[-1].join(30)
            assert ranks[-1].exitcode == -signal.SIGKILL
    finally:
        for process in ranks:
            process.kill()
