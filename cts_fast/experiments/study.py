"""What the small studies share: their arguments, a folder that keeps finished stages, and the files they leave."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from cts_fast.experiments import cli
from cts_fast.experiments.console import Progress
from cts_fast.experiments.files import save_tensors, write_csv, write_json
from cts_fast.experiments.run_folder import RunFolder
from cts_fast.experiments.signals import Stop

STAGE = "stage.pt"


class Study:
    """One run in the folder `out`: stages of tensors, each kept as soon as it is computed.

    config: what defines the run, ready for JSON; a resumed run must have the same. Raises CheckpointError if `out`
    holds a run and neither `resume` nor `overwrite` is given, or another run and `resume` is.
    """

    def __init__(
        self, out: Path, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False, device: str = "cpu"
    ) -> None:
        self.out, self.config, self.device = out, config, device
        self.folder = RunFolder(out, config, resume=resume, overwrite=overwrite)

    def stage(
        self, name: str, total: int, compute: Callable[[Callable[[], None]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `compute` returns, from the folder if it is there; it is given a function to call `total` times."""
        kept = self.folder.checkpoints(name)
        result: dict[str, Tensor] = {}
        if kept.load(lambda parts: result.update(parts[STAGE])):
            return {key: tensor.to(self.device) for key, tensor in result.items()}
        with Progress(name, total) as progress:
            result = compute(progress.advance)
        kept.save({STAGE: result}, "the end of the stage")
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
        save_tensors(self.out / "initialization.safetensors", initialization)
        write_json(self.out / "results.json", {"config": self.config, **results}, indent=1)


def main(
    module: str,
    description: str | None,
    config: Callable[[int], dict[str, Any]],
    run: Callable[[Study], str],
    argv: Sequence[str] | None = None,
) -> int:
    """The command line of a study; returns the exit status.

    config: from the seed to what defines the run; run: does all of it and returns the table to print.
    """
    p = cli.new_parser(module, description)
    cli.add_run_arguments(p, f"runs/{module.rpartition('.')[2]}")
    args = p.parse_args(argv)
    started = time.monotonic()

    def prepare() -> Study:
        cli.check_device(args.device)
        options = {"resume": args.resume, "overwrite": args.overwrite, "device": args.device}
        return Study(args.out, {**config(args.seed), "seed": args.seed}, **options)

    def whole(study: Study, stop: Stop) -> None:
        table = run(study)
        study.folder.finish()
        print(f"{table}\n\nEverything is in {args.out}. It took {time.monotonic() - started:.0f} seconds.")

    return cli.run_program(p, args, argv, lambda team: prepare(), whole, at_once=True)
