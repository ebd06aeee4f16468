"""Checkpoints that can be trusted: parts, and a manifest of their SHA-256 digests that is written last.

    checkpoints/cts/000012/  shared.pt  rank-0.pt  initialization.safetensors  manifest.json

A folder appears under its number when all of it is on the disk; the two newest are kept. Over ranks each one writes
parts of its own, and rank 0 the manifest. Loading verifies every byte before anything is unpickled, and unpickles
tensors and plain values alone. torch.distributed.checkpoint is not used: it keeps no digests, and its metadata are a
pickle that may run code when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cts_fast.distributed.launch import ALONE, Team
from cts_fast.experiments.files import first_line, naming, read_part, sha256_of, sync_folder, temporary, write_part

FORMAT = 3
MANIFEST = "manifest.json"
SAVE_EVERY = 60.0  # seconds between checkpoints, where nothing else is asked for
SHARE = 0.02  # of a run's time that saving may then take

# what the reading of a file and the use of what it holds raise where it is cut, damaged or of something else
DAMAGE = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError)
NOT_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run; the message names the file and says what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on the device or in this process."""
    no_memory = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, no_memory) or isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two identities, in words: "seed was 1, now 2"; empty where nothing does."""
    return ", ".join(_differences(saved, json.loads(json.dumps(now)), ""))


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], inside: str) -> Iterator[str]:
    for key in sorted({*saved, *now}):
        was, is_now = saved.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_now, dict):
            yield from _differences(was, is_now, f"{inside}{key}.")
        elif was != is_now:
            yield f"{inside}{key} was {was!r}, now {is_now!r}"


class Parts(Mapping[str, Any]):
    """The parts of a checkpoint by their names, each read when it is asked for."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self.folder, self.names = folder, names

    def __getitem__(self, name: str) -> Any:
        if name not in self.names:
            raise KeyError(name)
        return read_part(self.folder / name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Fault(NamedTuple):
    """Why a checkpoint is not loaded. damaged: it is passed over, because the one before it may do."""

    text: str
    damaged: bool


class Checkpoints:
    """The checkpoints of one thing, as numbered folders of `path`.

    Args:
        identity: what they belong to, ready for JSON; one of another identity is refused.
        every: seconds between two saves that are `due`; None: a minute, and longer where saving takes more than 2 % of
            the time.
        guard: called before each save; raises OSError where the place is no longer this run's.
        team: the ranks that save and load together, in one folder that all of them see.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        every: float | None = None,
        guard: Callable[[], None] = lambda: None,
        team: Team = ALONE,
    ) -> None:
        self.path, self.identity, self.every, self.guard, self.team = path, identity, every, guard, team
        self.newest: Path | None = None  # the last one that this process saved or loaded
        self.saved, self.cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for the next save, by this rank's clock."""
        every = max(SAVE_EVERY, self.cost / SHARE) if self.every is None else self.every
        return time.monotonic() - self.saved >= every

    def save(self, parts: Mapping[str, Any], note: str) -> None:
        """A new checkpoint. parts: this rank's, file name to content, of the kinds that `write_part` knows; note: where
        it stands.

        Raises OSError that names the checkpoint; those that were there stay as they were.
        """
        started = time.monotonic()
        self.guard()
        self.newest = self._put_together(parts, note) if self.team.is_first else self._add(parts)
        self.saved = time.monotonic()
        self.cost = self.saved - started

    def _put_together(self, parts: Mapping[str, Any], note: str) -> Path:
        """Rank 0's part in a save: the folder and the manifest."""
        before = self._folders()
        number = 1 + max((int(folder.name) for folder in before), default=0)
        folder = self.path / f"{number:06}"
        with temporary(folder, lambda left: shutil.rmtree(left, ignore_errors=True)) as beside:
            self.path.mkdir(exist_ok=True)  # not its parents: a folder that was taken away is no place to go on in
            beside.mkdir()
            self.team.gather((folder, beside))
            digests = self._write(beside, parts)
            content = {"format": FORMAT, "identity": self.identity, "note": note, "parts": digests}
            write_part(beside / MANIFEST, {"content": content, "sha256": _digest(content)})
            sync_folder(beside)
        for old in before:
            if old != self.newest:  # the newest before this one, unless it was damaged
                shutil.rmtree(old, ignore_errors=True)
        return folder

    def _add(self, parts: Mapping[str, Any]) -> Path:
        """Another rank's."""
        folder, beside = self.team.gather((Path(), Path()))[0]
        with naming(folder):
            self._write(beside, parts)
        return folder

    def _write(self, folder: Path, parts: Mapping[str, Any]) -> dict[str, str]:
        """Write this rank's parts; the digests of all ranks' when all are written."""
        own = {name: write_part(folder / name, content) for name, content in parts.items()}
        return {name: digest for found in self.team.gather(own) for name, digest in found.items()}

    def load(self, *uses: Callable[[Parts], None]) -> str | None:
        """Gives the newest whole checkpoint to `uses`, one after the other; returns where it stands, None where there
        is none.

        Over ranks each of the uses comes when the one before it is through on all of them. A damaged checkpoint is
        passed over with a warning, and so is one that a use cannot read. Raises CheckpointError where none is whole,
        for one of another run, and for one that cannot be read now.
        """
        try:
            folders = self.team.gather(self._folders())[0]
        except OSError as error:
            raise CheckpointError(self._not_now(self.path, error)) from error
        damaged: list[str] = []
        for folder in reversed(folders):
            note, fault = self._try(folder, uses)
            if fault is None:
                for text in damaged if self.team.is_first else ():
                    print(f"warning: {text}; going on from {folder} ({note})", file=sys.stderr)
                self.newest = folder
                return note
            damaged.append(fault.text)
            if not fault.damaged:
                raise CheckpointError("; ".join(damaged))
        if damaged:
            raise CheckpointError(
                f"{'; '.join(damaged)}: no whole checkpoint is left; delete {self.path} to begin this part of the run "
                "anew, then resume"
            )
        return None

    def _try(self, folder: Path, uses: Sequence[Callable[[Parts], None]]) -> tuple[str, Fault | None]:
        """Where a checkpoint stands, and the first fault of any rank in verifying and using it."""
        content: dict[str, Any] = {}

        def verify() -> None:
            content.update(self._verified(folder))

        steps = [verify, *(lambda use=use: use(Parts(folder, content["parts"])) for use in uses)]
        for step in steps:
            faults = [fault for fault in self.team.gather(self._fault(folder, step)) if fault]
            if faults:
                return "", faults[0]
        return content["note"], None

    def _fault(self, folder: Path, step: Callable[[], None]) -> Fault | None:
        """What is wrong with a checkpoint by what a step of its loading raises; None if nothing is."""
        try:
            step()
        except CheckpointError as error:
            return Fault(str(error), damaged=False)
        except (*DAMAGE, *NOT_A_FILE) as error:
            if is_out_of_memory(error):
                return Fault(self._not_now(folder, error), damaged=False)
            return Fault(f"{folder} is damaged ({first_line(error)})", damaged=True)
        except (OSError, MemoryError) as error:
            return Fault(self._not_now(folder, error), damaged=False)
        return None

    @staticmethod
    def _not_now(folder: Path, error: BaseException) -> str:
        return f"{folder} cannot be read now ({first_line(error)}); nothing is lost: resume when that is repaired"

    def _folders(self) -> list[Path]:
        """Those that took their place, the oldest first; raises OSError where they cannot be listed."""
        try:
            names = [name for name in os.listdir(self.path) if name.isdecimal()]
        except FileNotFoundError:
            return []
        return [self.path / name for name in sorted(names, key=int)]

    def _verified(self, folder: Path) -> dict[str, Any]:
        """What the manifest holds, when every byte of every part is as it was written and the run is this one.

        Each rank reads its share of the parts.
        """
        manifest = read_part(folder / MANIFEST)
        content = manifest["content"]
        if manifest["sha256"] != _digest(content):
            raise ValueError(f"{MANIFEST} is not what was written")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{folder} is of format {content['format']}, and this version reads {FORMAT}")
        if other := differences(content["identity"], self.identity):
            raise CheckpointError(f"{folder} is of another run ({other}): give the same, or another --out")
        for name, digest in list(content["parts"].items())[self.team.rank :: self.team.size]:
            if sha256_of(folder / name) != digest:
                raise ValueError(f"{name} is not what was written")
        return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
