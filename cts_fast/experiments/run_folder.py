"""A program's folder: one run, one program at a time, and a mark on what is finished."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cts_fast._version import __version__
from cts_fast.distributed.launch import ALONE, Team
from cts_fast.experiments.checkpoint import CheckpointError, Checkpoints, differences
from cts_fast.experiments.files import first_line, write_json, written

CONFIG, RESULTS, FINISHED, CHECKPOINTS = "config.json", "results.json", "finished.json", "checkpoints"
LOCK = ".lock"
LAUNCH = ".launch"  # what torchrun calls the launch that has begun the run, or gone on with it
TENSORBOARD = "tensorboard"
REPORTED = ("metrics.csv", "*.png", "*.safetensors", TENSORBOARD)  # what a run leaves beside checkpoints and results
SWEPT = "horizon-*"  # the runs of a sweep, each in a folder of its own
LEFT_BEHIND = ".*.[0-9]*-????????.tmp"  # by a write that was killed


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


class RunFolder:
    """The folder `path` of one run, which no other program may use until it is closed: a context manager.

    Args:
        config: what defines the run, ready for JSON; a resumed run must have the same.
        resume: go on from the checkpoints; overwrite: replace what is there.
        save_every: seconds between checkpoints; see `Checkpoints`.
        parts: patterns of what the run keeps beside its checkpoints and reports.
        team: the ranks that share it; rank 0 does all that has to be done once.

    Where torchrun has started the program anew, the run that this launch has begun is resumed, whatever was asked for.

    Raises:
        CheckpointError: another program uses the folder; it holds an interrupted or a finished run and neither `resume`
            nor `overwrite` is given; another run, or none, and `resume` is; or files of no run, and `overwrite` is.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        save_every: float | None = None,
        parts: Sequence[str] = (),
        team: Team = ALONE,
    ) -> None:
        self.path, self.config, self.save_every, self.parts, self.team = path, config, save_every, parts, team
        self.resume, self.lock = resume, None
        if team.is_first:
            self._take(overwrite)
        self.resume = team.gather(self.resume, patiently=True)[0]
        self.mine = _identity(path / LOCK)
        if self.mine is None:
            raise CheckpointError(
                f"rank {team.rank} finds no {path}, where rank 0 has made it: every rank writes into this folder, so "
                "give an --out that is the same on all machines"
            )

    def _take(self, overwrite: bool) -> None:
        """Make the folder this run's."""
        path, launch = self.path, self.path / LAUNCH
        begun = f"begun {path}"
        if self._is_begun():
            self.resume, overwrite = True, False
        elif self.team.restarts and self.team.has_noted(begun):
            raise CheckpointError(f"{path} has lost the run that this launch began there: start it anew")
        if self.resume and not (path / CONFIG).exists() and not (path / CHECKPOINTS).exists():
            raise CheckpointError(f"there is no run to resume: {path / CONFIG} is missing; start it without --resume")
        self._lock()
        try:
            if not self.team.restarts:  # a folder that is refused now is refused after a restart as well
                launch.unlink(missing_ok=True)
            if self.resume:
                self._check_config()
            else:
                self._check_unused(overwrite)
            if overwrite:
                self._empty()
            write_json(path / CONFIG, self.config, indent=1)
            (path / CHECKPOINTS).mkdir(exist_ok=True)
            for left in (*path.glob(LEFT_BEHIND), *path.glob(f"{CHECKPOINTS}/*/{LEFT_BEHIND}")):
                _remove(left)
            if self.team.launch:
                with written(launch, "w") as file:
                    file.write(self.team.launch)
                self.team.note(begun)
        except BaseException:
            self.close()
            raise

    def _is_begun(self) -> bool:
        """Whether torchrun has started the program anew, and this launch has had the folder before."""
        launch = self.path / LAUNCH
        return bool(self.team.restarts) and launch.exists() and launch.read_text("utf-8") == self.team.launch

    def _lock(self) -> None:
        from filelock import FileLock, Timeout

        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / LOCK)  # the system's, which ends with the process, however that ends
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            self.lock = None
            raise CheckpointError(
                f"another program is at work in {self.path}: wait for it, or choose another --out"
            ) from None

    def check(self) -> None:
        """Raises OSError where the folder was taken away, or another one stands in its place."""
        if _identity(self.path / LOCK) != self.mine:
            raise OSError(errno.ENOENT, "the folder was taken away while the program ran", str(self.path))

    def close(self) -> None:
        """Let other programs use the folder."""
        if self.lock is not None:
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
        except (ValueError, TypeError, AttributeError, FileNotFoundError) as error:
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
        names = (f"{CHECKPOINTS}/*", RESULTS, FINISHED, *self.parts)
        used = [file for name in names for file in self.path.glob(name)]
        if overwrite and used and not (self.path / CONFIG).exists():
            raise CheckpointError(
                f"{self.path} holds {used[0].name} and no {CONFIG}: that is no run; choose another --out"
            )
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
        if (self.path / CONFIG).exists():
            for pattern in (FINISHED, CHECKPOINTS, *self.parts, RESULTS, *REPORTED):
                for file in self.path.glob(pattern):
                    _remove(file)

    def checkpoints(self, name: str, team: Team = ALONE, **identity: Any) -> Checkpoints:
        """The checkpoints of one part of the run. team: who saves and loads together; identity: what they belong to,
        beside the run.
        """
        whole = {"cts_fast": __version__, "part": name, **self.config, **identity}
        return Checkpoints(self.path / CHECKPOINTS / name, whole, self.save_every, self.check, team)

    @property
    def finished(self) -> bool:
        """Whether all of the run is done, its results included."""
        return (self.path / FINISHED).exists()

    def finish(self) -> None:
        """Mark the run as finished: the last thing that a program writes."""
        if self.team.is_first:
            write_json(self.path / FINISHED, {"finished": True})
