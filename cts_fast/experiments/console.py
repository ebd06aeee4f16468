"""Progress on a terminal as a bar, elsewhere as one line now and then; an output that has not all letters."""

import io
import sys
import time
from typing import Any

LINES = 10  # about so many in all where there is no terminal


def allow_any_output() -> None:
    """Where the encoding of standard output has no β or ±, print "?" for them: no run is to end in that."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


class Progress:
    """A context manager that counts to `total` from `done`; `advance` adds one and shows a note and the speed.

    tqdm draws the bar, at its own intervals. Where standard error is no terminal, plain lines go to standard output.
    shown: False counts and shows nothing.
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "step", shown: bool = True):
        self.title, self.total, self.done, self.unit, self.shown = title, total, done, unit, shown
        self.first, self.started = done, time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if self.shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, initial=self.done, desc=self.title, unit=self.unit, dynamic_ncols=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, note: str = "") -> None:
        """One more is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
        elif self.shown and (self.done % max(1, self.total // LINES) == 0 or self.done == self.total):
            speed = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
            note = note and f"{note}, "
            print(f"{self.title}: {self.done}/{self.total} {self.unit}s, {note}{speed:.2f} {self.unit}s/s", flush=True)
