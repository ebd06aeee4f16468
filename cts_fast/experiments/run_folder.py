"""A program's folder: one run, one program at a time, and a mark on what is finished."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from cts_fast._version import __version__
from cts_fast.experiments.checkpoint import CheckpointError, Checkpoints, differences
from cts_fast.experiments.files import first_line, write_json

CONFIG, RESULTS, FINISHED, CHECKPOINTS = "config.json", "results.json", "finished.json", "checkpoints"
REPORTED = ("metrics.csv", "*.png", "*.safetensors")  # what a run leaves beside its checkpoints and results


class RunFolder:
    """The folder `path` of one run, which no other program may use until it is closed: a context manager.

    Args:
        config: what defines the run, ready for JSON; a resumed run must have the same.
        resume: go on from the checkpoints; overwrite: replace what is there.
        save_every: seconds between checkpoints; see `Checkpoints`.

    Raises:
        CheckpointError: another program uses the folder; it holds an interrupted or a finished run and neither `resume`
            nor `overwrite` is given; or another run, or none, and `resume` is.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        save_every: float | None = None,
    ) -> None:
        self.path, self.config, self.save_every = path, config, save_every
        if resume and not (path / CONFIG).exists() and not (path / CHECKPOINTS).exists():
            raise CheckpointError(f"there is no run to resume: {path / CONFIG} is missing; start it without --resume")
        self._lock()
        try:
            if resume:
                self._check_config()
            else:
                self._check_unused(overwrite)
            if overwrite:
                self._empty()
            write_json(path / CONFIG, config, indent=1)
            (path / CHECKPOINTS).mkdir(exist_ok=True)
            for left in (*path.glob(".*.tmp"), *path.glob(f"{CHECKPOINTS}/*/.*.tmp")):  # of a save that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / ".lock")  # the system's, which ends with the process, however that ends
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise CheckpointError(
                f"another program is at work in {self.path}: wait for it, or choose another --out"
            ) from None

    def close(self) -> None:
        """Let other programs use the folder."""
        with contextlib.suppress(OSError):  # the folder may be gone
            self.lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_config(self) -> None:
        path = self.path / CONFIG
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            other = differences(saved, self.config)
        except (ValueError, AttributeError, FileNotFoundError) as error:
            print(
                f"warning: {path} is missing or damaged ({first_line(error)}) and is written anew: the checkpoints say "
                "as well what run they are of",
                file=sys.stderr,
            )
            return
        if other:
            raise CheckpointError(
                f"{self.path} holds another run ({other}): give the same arguments, or another --out without --resume; "
                f"should {CONFIG} itself be damaged, delete it and resume"
            )

    def _check_unused(self, overwrite: bool) -> None:
        used = [file for name in (f"{CHECKPOINTS}/*", RESULTS, FINISHED) for file in self.path.glob(name)]
        if not used or overwrite:
            return
        if self.finished:
            raise CheckpointError(
                f"{self.path} holds a finished run: choose another --out, or add --resume to see its results again, "
                "or --overwrite to replace it"
            )
        raise CheckpointError(
            f"{self.path} holds a run that was interrupted: add --resume to go on with it, or choose another --out, "
            "or add --overwrite to replace it"
        )

    def _empty(self) -> None:
        """Take away an older run, its mark first: what is half gone is not finished."""
        (self.path / FINISHED).unlink(missing_ok=True)
        if (self.path / CHECKPOINTS).exists():
            shutil.rmtree(self.path / CHECKPOINTS)
        for pattern in (RESULTS, *REPORTED):
            for file in self.path.glob(pattern):
                file.unlink()

    def checkpoints(self, name: str, **identity: Any) -> Checkpoints:
        """The checkpoints of one part of the run. identity: what they belong to, beside the run."""
        whole = {"cts_fast": __version__, "part": name, **self.config, **identity}
        return Checkpoints(self.path / CHECKPOINTS / name, whole, self.save_every)

    @property
    def finished(self) -> bool:
        """Whether all of the run is done, its results included."""
        return (self.path / FINISHED).exists()

    def finish(self) -> None:
        """Mark the run as finished: the last thing that a program writes."""
        write_json(self.path / FINISHED, {"finished": True})
