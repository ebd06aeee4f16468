"""``--suite folder``: every subfolder of the data root is a task; images lie in a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from cts_fast.data.cache import FOLDER, Storage, hold
from cts_fast.data.decode import EXTENSIONS, FORMATS
from cts_fast.data.errors import DamagedFile, MissingData
from cts_fast.data.images import Samples
from cts_fast.data.suite import ImageSet, Suite, Task, check_name, split_by_class

SIZES = (28, 32, 64, 84)  # the paper's; a task gets the one next to its images
LOOKED_AT = 50  # images that its size is told by
LAYOUT = "DIR/<task>/{train,test}/<class>/*.jpg, or DIR/<task>/<class>/*.jpg, which is split 80 to 20"


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are not counted. Raises DamagedFile if it is locked."""
    check_readable(folder)
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def check_readable(folder: Path) -> None:
    """Raises DamagedFile for a folder that is there and locked."""
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise _locked(folder, "Permission denied")


def images_below(folder: Path, seen: set[tuple[int, int]] | None = None) -> list[str]:
    """Paths of all image files in a folder and its subfolders, sorted; hidden ones do not count, linked folders do.

    seen: the folders that were walked so far, to be asked again for other classes. Raises DamagedFile that names what
    cannot be read and a folder that is walked twice: a link leads to it, or around it.
    """
    seen = set() if seen is None else seen
    found: list[str] = []
    for place, below, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        there = os.stat(place)
        if (there.st_dev, there.st_ino) in seen:
            raise DamagedFile(f"{place} is a link to a folder whose images are counted already: remove it")
        seen.add((there.st_dev, there.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths = [os.path.join(place, name) for name in names if not name.startswith(".")]
        found += [_usable(path) for path in paths if path.lower().endswith(EXTENSIONS)]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a class without a folder has no images
        raise _locked(error.filename, error.strerror) from None


def _locked(place: object, reason: object) -> DamagedFile:
    return DamagedFile(f"{place} cannot be read ({reason}): change that, or move it away")


def _usable(path: str) -> str:
    if not os.path.isfile(path):
        raise DamagedFile(f"{path} is no file, or a link that leads nowhere: remove it")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise DamagedFile(f"{ascii(path)}: the name is not UTF-8: rename it") from None
    return path


def by_class(folder: Path, classes: Iterable[str], seen: set[tuple[int, int]] | None = None) -> Samples:
    """The images of these class folders; a class that has no folder has no images. seen: see `images_below`."""
    seen = set() if seen is None else seen
    items, labels = [], []
    for label, name in enumerate(classes):
        found = images_below(folder / name, seen)
        items += found
        labels += [label] * len(found)
    return Samples(items, torch.tensor(labels, dtype=torch.int64))


class FolderSuite(Suite):
    """Tasks of one's own, from folders of images; all are for meta-training unless they are asked for as targets."""

    def roles(self, root: Path | None) -> dict[str, str]:
        if root is None:
            raise ValueError(f"the suite folder needs --data-root DIR with {LAYOUT}")
        if root.exists() and not root.is_dir():
            raise ValueError(f"the data root {root} is no folder; it must be one with {LAYOUT}")
        if not root.is_dir():
            raise MissingData(f"the data root {root} does not exist; it must hold {LAYOUT}")
        tasks = subfolders(root)
        if not tasks:
            raise MissingData(f"the data root {root} holds no folder; it must hold {LAYOUT}")
        for name in tasks:
            check_name(name)
        return dict.fromkeys(tasks, "train")

    def load(self, root: Path | None, names: Sequence[str], storage: Storage) -> dict[str, Task]:
        assert root is not None  # roles() has refused it
        found = {name: read_folder(root / name) for name in names}  # what is wrong is told before hours of decoding
        return {name: self._task(root, name, storage, *parts) for name, parts in found.items()}

    def _task(
        self, root: Path, name: str, storage: Storage, train: Samples, test: Samples, classes: Sequence[str]
    ) -> Task:
        size = storage.size or usual_size(train.items)
        sets = hold(name, (train, test), size, 3, storage.cache or root / FOLDER, storage.limit)
        parts = [ImageSet(images, labels) for images, labels in sets]
        return Task(name, parts[0], parts[1], tuple(classes), True, "train", name, str(root / name)).checked()


def read_folder(folder: Path) -> tuple[Samples, Samples, list[str]]:
    """Training images, test images and classes of a task; raises DamagedFile that names the folder which is wrong."""
    parts = subfolders(folder)
    if sorted(map(str.lower, parts)) == ["test", "train"] and parts != ["test", "train"]:  # no two classes
        raise DamagedFile(f"{folder} holds {' and '.join(parts)}: call them test and train: a task is {LAYOUT}")
    if _is_split(folder, parts):
        raise DamagedFile(
            f"{folder} holds {', '.join(parts)}, with the same folders in them: call them train and test, and move "
            f"others away, or if they are classes give them other names: a task is {LAYOUT}"
        )
    if "train" in parts or "test" in parts:
        lacking = [part for part in ("train", "test") if part not in parts]
        if lacking:
            raise DamagedFile(f"{folder} has no folder {lacking[0]!r} beside the other one: a task is {LAYOUT}")
        if len(parts) > 2:
            other = next(part for part in parts if part not in ("train", "test"))
            raise DamagedFile(f"{folder / other} lies beside train and test: a task is {LAYOUT}")
        classes = subfolders(folder / "train")
        unknown = [name for name in subfolders(folder / "test") if name not in classes]
        if unknown:
            raise DamagedFile(
                f"{folder / 'test' / unknown[0]} is a class that {folder / 'train'} has not: move it away"
            )
        seen: set[tuple[int, int]] = set()
        train, test = (by_class(folder / part, classes, seen) for part in ("train", "test"))
        if not len(test):
            raise DamagedFile(f"{folder / 'test'} holds no image: a task is {LAYOUT}")
    else:
        classes = parts
        both = by_class(folder, classes)
        kept, held = split_by_class(both.labels, 0.2, f"80/20/{folder.name}")
        train, test = both.select(kept), both.select(held)
        if len(both) and not len(test):
            raise DamagedFile(f"{folder} has one image a class, and needs another one to test on: {LAYOUT}")
    if len(classes) < 2:
        raise DamagedFile(f"{folder} holds images of {len(classes)} classes, and a task needs two: {LAYOUT}")
    empty = [name for label, name in enumerate(classes) if not bool((train.labels == label).any())]
    if empty:
        place = folder / "train" if "train" in parts else folder
        raise DamagedFile(f"{place / empty[0]} holds no image to train on ({', '.join(EXTENSIONS)}): fill or remove it")
    return train, test, classes


def _is_split(folder: Path, parts: Sequence[str]) -> bool:
    """Whether folders are splits of another name and no classes: one is called something with train, holds folders
    alone, and the other one or two some of the same.
    """
    training = [part for part in parts if "train" in part.lower() and part != "train"]
    if len(training) != 1 or not 2 <= len(parts) <= 3:
        return False
    inside = {part: {*subfolders(folder / part)} for part in parts}
    images = any(name.lower().endswith(EXTENSIONS) for part in parts for name in os.listdir(folder / part))
    return (
        not images
        and len(inside[training[0]]) > 1
        and all(own and own <= inside[training[0]] for own in inside.values())
    )


def usual_size(paths: Sequence[str]) -> int:
    """The paper's size next to the shorter side of the middle one of some images, looked at without decoding them."""
    from PIL import Image

    sides = []
    for path in paths[:: max(1, len(paths) // LOOKED_AT)]:
        try:
            with Image.open(path, formats=FORMATS) as picture:
                sides.append(min(picture.size))
        except Exception:  # Pillow raises nearly anything on damaged data
            continue  # the decoding names it
    middle = sorted(sides)[len(sides) // 2] if sides else SIZES[-1]
    return min(SIZES, key=lambda size: abs(size - middle))
