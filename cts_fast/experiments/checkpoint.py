"""Checkpoints that can be trusted: parts, and a manifest of their SHA-256 digests that is written last.

    checkpoints/cts/000012/  rank-0.pt  initialization.safetensors  manifest.json

A folder appears under its number when all of it is on the disk; the two newest are kept. Loading verifies every byte
before anything is unpickled, and unpickles tensors and plain values alone. torch.distributed.checkpoint is not used: it
keeps no digests, and its metadata are a pickle that may run code when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cts_fast.experiments.files import first_line, read_part, sha256_of, sync_folder, temporary, write_part

FORMAT = 1
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


class Checkpoints:
    """The checkpoints of one thing, as numbered folders of `path`.

    Args:
        identity: what they belong to, ready for JSON; one of another identity is refused.
        every: seconds between two saves that are `due`; None: a minute, and longer where saving takes more than 2 % of
            the time.
        guard: called before each save; raises OSError where the place is no longer this run's.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        every: float | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.identity, self.every, self.guard = path, identity, every, guard
        self.newest: Path | None = None  # the last one that this process saved or loaded
        self.saved, self.cost = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for the next save."""
        every = max(SAVE_EVERY, self.cost / SHARE) if self.every is None else self.every
        return time.monotonic() - self.saved >= every

    def save(self, parts: Mapping[str, Any], note: str) -> None:
        """A new checkpoint. parts: file name to content, of the kinds that `write_part` knows; note: where it stands.

        Raises OSError that names the checkpoint; those that were there stay as they were.
        """
        started = time.monotonic()
        self.guard()
        before = self._folders()
        number = 1 + max((int(folder.name) for folder in before), default=0)
        folder = self.path / f"{number:06}"
        with temporary(folder, lambda left: shutil.rmtree(left, ignore_errors=True)) as beside:
            self.path.mkdir(exist_ok=True)  # not its parents: a folder that was taken away is no place to go on in
            beside.mkdir()
            digests = {name: write_part(beside / name, content) for name, content in parts.items()}
            content = {"format": FORMAT, "identity": self.identity, "note": note, "parts": digests}
            write_part(beside / MANIFEST, {"content": content, "sha256": _digest(content)})
            sync_folder(beside)
        for old in before:
            if old != self.newest:  # the newest before this one, unless it was damaged
                shutil.rmtree(old, ignore_errors=True)
        self.newest = folder
        self.saved = time.monotonic()
        self.cost = self.saved - started

    def load(self, use: Callable[[dict[str, Any]], None]) -> str | None:
        """Gives the parts of the newest whole checkpoint to `use`; returns where it stands, None where there is none.

        A damaged one is passed over with a warning, and so is one that `use` cannot read. Raises CheckpointError where
        none is whole, for one of another run, and for one that cannot be read now.
        """
        damaged: list[str] = []
        try:
            folders = self._folders()
        except OSError as error:
            raise self._not_now(self.path, error) from error
        for folder in reversed(folders):
            try:
                content = self._verified(folder)
                use({name: read_part(folder / name) for name in content["parts"]})
            except CheckpointError as error:
                raise CheckpointError("; ".join([*damaged, str(error)])) from error
            except (*DAMAGE, *NOT_A_FILE) as error:
                if is_out_of_memory(error):
                    raise self._not_now(folder, error) from error
                damaged.append(f"{folder} is damaged ({first_line(error)})")
                continue
            except (OSError, MemoryError) as error:
                raise self._not_now(folder, error) from error
            for text in damaged:
                print(f"warning: {text}; going on from {folder} ({content['note']})", file=sys.stderr)
            self.newest = folder
            return content["note"]
        if damaged:
            raise CheckpointError(
                f"{'; '.join(damaged)}: no whole checkpoint is left; delete {self.path} to begin this part of the run "
                "anew, then resume"
            )
        return None

    @staticmethod
    def _not_now(folder: Path, error: BaseException) -> CheckpointError:
        return CheckpointError(
            f"{folder} cannot be read now ({first_line(error)}); nothing is lost: resume when that is repaired"
        )

    def _folders(self) -> list[Path]:
        """Those that took their place, the oldest first; raises OSError where they cannot be listed."""
        try:
            names = [name for name in os.listdir(self.path) if name.isdecimal()]
        except FileNotFoundError:
            return []
        return [self.path / name for name in sorted(names, key=int)]

    def _verified(self, folder: Path) -> dict[str, Any]:
        """What the manifest holds, when every byte of every part is as it was written and the run is this one."""
        manifest = read_part(folder / MANIFEST)
        content = manifest["content"]
        if manifest["sha256"] != _digest(content):
            raise ValueError(f"{MANIFEST} is not what was written")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{folder} is of format {content['format']}, and this version reads {FORMAT}")
        if other := differences(content["identity"], self.identity):
            raise CheckpointError(f"{folder} is of another run ({other}): give the same, or another --out")
        for name, digest in content["parts"].items():
            if sha256_of(folder / name) != digest:
                raise ValueError(f"{name} is not what was written")
        return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
