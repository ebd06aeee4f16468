"""The suites "paper" (section 4.2) and "imagenet" (section 4.3), and what is there of their data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cts_fast.data.cache import FOLDER, Storage, hold
from cts_fast.data.errors import DamagedFile, MissingData
from cts_fast.data.folder import check_readable
from cts_fast.data.paper.base import DataSet
from cts_fast.data.paper.sets import SETS
from cts_fast.data.suite import ImageSet, Suite, Task

BY_NAME = {data.name: data for data in SETS}


class PaperSuite(Suite):
    """All data sets of the paper by name; those of one experiment have a role.

    size: of all tasks, None for each one's own in section 4.2.
    """

    def __init__(self, name: str, size: int | None = None) -> None:
        self.name, self.size = name, size

    def roles(self, root: Path | None) -> dict[str, str]:
        return {data.name: data.roles.get(self.name, "") for data in SETS}

    def load(self, root: Path | None, names: Sequence[str], storage: Storage) -> dict[str, Task]:
        root = checked_root(root, self.name)
        # all are looked for before any is decoded, which may take hours
        found = {name: BY_NAME[name].find(root, storage.partial, storage.download) for name in names}
        tasks = {}
        for name in names:
            data, splits = BY_NAME[name], found.pop(name)  # pixels that were read are let go one by one
            size = storage.size or self.size or data.size
            cache = storage.cache or root / FOLDER
            sets = hold(name, (splits.train, splits.test), size, data.channels, cache, storage.limit)
            train, test = (ImageSet(images, labels) for images, labels in sets)
            # section 4.2 flips every task's images, digits too
            tasks[name] = Task(
                name, train, test, splits.classes, True, data.roles.get(self.name, ""), data.title, data.terms
            )
        return tasks


def checked_root(root: Path | None, suite: str) -> Path:
    """The data root; raises ValueError if none was given, MissingData if it does not exist."""
    if root is None:
        raise ValueError(f"the suite {suite} needs --data-root DIR: the folder that holds its data sets")
    if root.exists() and not root.is_dir():
        raise ValueError(f"the data root {root} is no folder: give another --data-root")
    if not root.is_dir():
        raise MissingData(f"the data root {root} does not exist: make it, or give another --data-root")
    check_readable(root)
    return root


def listing(
    root: Path, names: Sequence[str] | None = None, storage: Storage | None = None
) -> Iterator[tuple[str, ...]]:
    """For every data set of the paper, or those of `names`: name, state, counts, what to do."""
    storage = storage or Storage()
    for data in SETS:
        if names is None or data.name in names:
            yield data.name, *state(data, root, storage)


def state(data: DataSet, root: Path, storage: Storage) -> tuple[str, str, str]:
    """State ("found", "partial", "missing" or "damaged"), counts, and what to do about it ("" for nothing)."""
    published = f"{data.train or data.least:,} / {data.test:,} / {data.classes}"
    if data.train is None:
        published = f">= {published}"
    try:
        splits = data.find(root, partial=True, download=storage.download)
    except DamagedFile as error:
        return "damaged", published, str(error)
    except OSError as error:  # not there, or not to be fetched
        return "missing", published, str(error)
    counts = f"{len(splits.train):,} / {len(splits.test):,} / {len(splits.classes)}"
    try:
        data.find(root)
    except DamagedFile as error:
        return "partial", f"{counts} of {published}", str(error)
    return "found", counts, ""
