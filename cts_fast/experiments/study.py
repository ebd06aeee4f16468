"""What the small studies share: their arguments, a folder that keeps finished stages, and the files they leave."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cts_fast.experiments import cli
from cts_fast.experiments.console import Progress
from cts_fast.experiments.run_folder import (
    CheckpointError,
    RunFolder,
    load_state,
    mark_finished,
    on_signals,
    reading,
    save_state,
    save_tensors,
    write_csv,
    write_json,
)


class Study:
    """One run in the folder `out`: stages of tensors, each kept as soon as it is computed.

    config: what defines the run, ready for JSON; a resumed run must have the same. Raises CheckpointError if `out`
    holds a run and neither `resume` nor `overwrite` is given, or another run and `resume` is.
    """

    def __init__(
        self, out: Path, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False, device: str = "cpu"
    ) -> None:
        self.out, self.config, self.device = out, config, device
        self.folder = RunFolder(out, config, ("stage-*.pt",), resume=resume, overwrite=overwrite)

    def stage(
        self, name: str, total: int, compute: Callable[[Callable[[], None]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `compute` returns, from the folder if it is there; it is given a function to call `total` times."""
        path = self.out / f"stage-{name}.pt"
        if path.exists():
            with reading(path):
                return load_state(path, self.device)
        with Progress(name, total) as progress:
            result = compute(progress.advance)
        save_state(path, result)
        return result

    def write(
        self,
        results: dict[str, Any],
        columns: Sequence[str],
        rows: Iterable[Sequence],
        initialization: Mapping[str, Tensor],
    ) -> None:
        """results.json, metrics.csv and initialization.safetensors."""
        write_csv(self.out / "metrics.csv", columns, rows)
        save_tensors(self.out / "initialization.safetensors", dict(initialization))
        write_json(self.out / "results.json", {"config": self.config, **results}, indent=1)


def main(
    module: str, description: str | None, run: Callable[[argparse.Namespace], str], argv: Sequence[str] | None = None
) -> int:
    """The command line of a study; returns the exit status. run: does all of it and returns the table to print."""
    p = cli.new_parser(module, description)
    cli.add_run_arguments(p, f"runs/{module.rpartition('.')[2]}")
    args = p.parse_args(argv)
    started = time.monotonic()
    try:
        cli.check_device(args.device)
    except ValueError as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    try:
        with on_signals(("SIGTERM", "SIGHUP"), _interrupt):  # as Ctrl-C: what is finished is kept
            table = run(args)
            mark_finished(args.out)
    except KeyboardInterrupt as stopped:
        print(cli.stopped_note(args.out, argv, module), file=sys.stderr)
        return stopped.args[0] if stopped.args else 130
    except (CheckpointError, OSError) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    print(f"{table}\n\nEverything is in {args.out}. It took {time.monotonic() - started:.0f} seconds.")
    return 0


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(128 + number)
