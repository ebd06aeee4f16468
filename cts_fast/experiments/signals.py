"""Signals that ask a program to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cts_fast.distributed.launch import ALONE, Team


class Interrupted(BaseException):  # as KeyboardInterrupt: no library is to take it for an error of its own
    """The user or the system asked to stop; everything is saved. status: the exit status, which names the signal."""

    def __init__(self, status: int = 130) -> None:
        super().__init__(f"stopped by signal {status - 128}")
        self.status = status


class Stop:
    """Whether a signal asked to stop: ``stop()``; `status` says which, as an exit status."""

    def __init__(self) -> None:
        self.requested, self.status = False, 130  # no lock guards them: one signal may come while another is handled

    def __call__(self) -> bool:
        return self.requested

    def asked(self) -> int:
        """The exit status that it asks for, 0 if none did."""
        return self.status if self() else 0

    def check(self, team: Team = ALONE) -> None:
        """Raises `Interrupted` if one did, on any rank of the team."""
        if asked := max(team.gather(self.asked())):
            raise Interrupted(asked)


@contextmanager
def on_signals(handler: Callable[[int, Any], None], names: Sequence[str] = ("SIGINT", "SIGTERM", "SIGHUP")) -> Iterator:
    """`handler` for these signals; those that are ignored stay so (nohup). Threads but the main one change nothing."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def stop_on_signals(at_once: bool = False) -> Iterator[Stop]:
    """Ctrl-C, SIGTERM and SIGHUP ask to stop; a second one, after a second, stops at once, and so does the first where
    nobody can ask in between (at_once).
    """
    stop, first = Stop(), 0.0

    def handler(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        if not stop():
            first, stop.status = now, 128 + number
            stop.requested = True
            if at_once:
                stop.check()
        elif now - first > 1:  # a wrapper may pass one Ctrl-C on twice
            raise Interrupted(128 + number)

    with on_signals(handler):
        yield stop
