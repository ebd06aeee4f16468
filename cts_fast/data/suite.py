"""Tasks of a suite: what a program trains and tests on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.data import archive

BUILTIN_FILE = "builtin.bin"


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: ``images`` uint8 [N, C, H, W] with C in {1, 3}, ``labels`` int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()


@dataclass(frozen=True)
class Task:
    """One classification task.

    ``flip`` says whether a horizontal flip keeps the label; ``role`` is "train" (meta-train) or "target" (held out);
    ``title`` is one readable line, ``source`` says where the images are from and their licence.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    flip: bool
    role: str
    title: str
    source: str


def stratified_order(labels: Tensor) -> Tensor:
    """Indices that put the classes in turn: the first image of each, then the second; a prefix is balanced."""
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(labels.numel()) - starts[labels[by_class]]
    return rank.argsort(stable=True)


def _image_set(images: Tensor, labels: Tensor) -> ImageSet:
    """A split with its classes in turn, so that any prefix of it is balanced."""
    order = stratified_order(labels)
    return ImageSet(images[order], labels[order])


def _builtin(root: str | Path | None, names: list[str] | None) -> dict[str, Task]:
    path = (Path(root) if root is not None else Path(__file__).parent / "builtin") / BUILTIN_FILE
    remedy = "install cts_fast again, or make it anew with `python -m cts_fast.data.build --out FILE`"
    if not path.is_file():
        raise FileNotFoundError(f"the built-in suite {path} is missing: {remedy}")
    try:
        header, start = archive.read_header(path)
    except archive.DamagedFile as error:
        raise archive.DamagedFile(f"the built-in suite {path} is damaged: {error}; {remedy}") from None
    entries = {entry["name"]: entry for entry in header["tasks"]}
    tasks = {}
    for name in _chosen(names, list(entries), "builtin"):
        entry = entries[name]
        try:
            images, labels = archive.unpack(entry, archive.read_member(path, start, entry))
        except archive.DamagedFile as error:
            message = f"task {name!r} of the built-in suite {path} is damaged: {error}; {remedy}"
            raise archive.DamagedFile(message) from None
        train, test = (
            _image_set(images[part], labels[part])
            for part in (slice(None, entry["train"]), slice(entry["train"], None))
        )
        tasks[name] = Task(
            name, train, test, tuple(entry["classes"]), entry["flip"], entry["role"], entry["title"], entry["source"]
        )
    return tasks


def _chosen(names: list[str] | None, known: list[str], suite: str) -> list[str]:
    """``names`` in the order asked for (None: all); raises ValueError that lists what exists."""
    if names is None:
        return known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"suite {suite!r} has no task {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    return list(dict.fromkeys(names))


SUITES: dict[str, Callable[[str | Path | None, list[str] | None], dict[str, Task]]] = {"builtin": _builtin}
"""Suite name to its loader(root, names); a further suite adds itself here."""


def load_suite(
    name: str = "builtin", root: str | Path | None = None, names: Iterable[str] | None = None
) -> dict[str, Task]:
    """Load the tasks of a suite, by name; only the tasks asked for are decoded.

    Args:
        name: the suite; "builtin" comes with the package.
        root: folder that holds the suite's data; None means its own place (the package itself for "builtin").
        names: tasks wanted, returned in this order; None means all, those for meta-training first.

    Raises:
        ValueError: no such suite or task; the message lists what exists.
        FileNotFoundError: the data are not there; the message says how to get them.
        cts_fast.data.DamagedFile: the file or a task in it does not match its checksum.
    """
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}; there are: {', '.join(SUITES)}")
    if isinstance(names, str):
        raise ValueError(f"names must be a list of task names, not the string {names!r}")
    return SUITES[name](root, None if names is None else list(names))
