"""What a data set of the paper is: where it lies, how many images it has, how to get it; checks of what is found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.data.download import Archive, md5_of, obtain
from cts_fast.data.errors import DamagedFile, MissingData
from cts_fast.data.folder import check_readable, subfolders
from cts_fast.data.images import Samples, fingerprint

PARTIAL = "or add --partial to use what is there"


@dataclass(frozen=True)
class Splits:
    """Training and test images before they are decoded, and the names of the classes."""

    train: Samples
    test: Samples
    classes: tuple[str, ...]

    @staticmethod
    def of(parts: Iterable[Samples], classes: Iterable[str]) -> Splits:
        """Of training and test images, in this order."""
        train, test = parts
        return Splits(train, test, tuple(classes))


Reader = Callable[[Path, bool], Splits]  # (folder of the data set, partial)


@dataclass(frozen=True)
class DataSet:
    """A task of the paper's experiments.

    classes, train, test: the published numbers, train None where only the other two are known; size: side length in
    section 4.2; roles: by suite; places: folders under the data root in which it may lie; needs: patterns of what must
    be in there; layout, manual: for a reader, what that is and how to get it where no archive can be fetched.
    """

    name: str
    title: str
    terms: str
    classes: int
    train: int | None
    test: int
    size: int
    roles: Mapping[str, str]
    places: tuple[str, ...]
    needs: tuple[str, ...]
    read: Reader
    layout: str
    archives: tuple[Archive, ...] = ()
    manual: str = ""
    channels: int = 3
    least: int = 0  # training images, where `train` is None

    def find(self, root: Path, partial: bool = False, download: bool = False) -> Splits:
        """What lies under the data root.

        Raises:
            MissingData: nothing of it is there; the message names folder, layout and command.
            DamagedFile: a part is missing or wrong, or, unless `partial`, a number is not the published one.
        """
        if download and self.place(root) in (None, root / self.places[0]):  # where archives are unpacked to
            for archive in self.archives:
                obtain(archive, root)
        place = self.place(root)
        if place is None:
            raise MissingData(self.missing(root))
        for need in self.needs:
            if next(place.glob(need), None) is None:
                raise DamagedFile(f"{place / need} is missing; expected is {self.layout}: {self.remedy(place)}")
        try:
            splits = self.read(place, partial)
        except (DamagedFile, ImportError, MemoryError):
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise DamagedFile(
                f"{self.name} in {place} cannot be read ({type(error).__name__}: {reason}): {self.remedy(place)}"
            ) from error
        self.check(splits, place, partial)
        remedy = f"replace it by a whole one, or {self.remedy(place)}"
        parts = (replace(part, remedy=remedy) for part in (splits.train, splits.test))
        return Splits.of(parts, splits.classes)

    def place(self, root: Path) -> Path | None:
        """The folder that it lies in: the first that holds something of what is needed.

        Raises DamagedFile for one that cannot be read.
        """
        folders = [root / place for place in self.places]
        for folder in folders:
            check_readable(folder)
        return next((f for f in folders if any(next(f.glob(need), None) is not None for need in self.needs)), None)

    def check(self, splits: Splits, place: Path, partial: bool) -> None:
        """Raises DamagedFile for numbers that were not published; with `partial` only for what cannot be used."""
        for what, part, published in (("training", splits.train, self.train), ("test", splits.test, self.test)):
            found = len(part)
            if not found:
                raise DamagedFile(f"{self.name} in {place} has no {what} images: {self.remedy(place)}")
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= len(splits.classes):
                raise DamagedFile(
                    f"{self.name} in {place} has {what} labels {low}..{high} for {len(splits.classes)} classes: "
                    f"{self.remedy(place)}"
                )
            wrong = found < self.least if published is None and what == "training" else published not in (None, found)
            if wrong and not partial:
                wanted = f"{published:,} were published" if published else f"{self.least:,} are needed"
                numbers = f"{self.name} in {place} has {found:,} {what} images where {wanted}"
                raise DamagedFile(f"{numbers}: {self.remedy(place)}, {PARTIAL}")
        if len(splits.classes) != self.classes and not partial:
            raise DamagedFile(
                f"{self.name} in {place} has {len(splits.classes)} classes where {self.classes} were published: "
                f"{self.remedy(place)}, {PARTIAL}"
            )

    def remedy(self, place: Path) -> str:
        """What to do about damage."""
        again = "run again with --download" if self.archives else f"get it again ({self.manual})"
        return f"move {place} away and {again}"

    def missing(self, root: Path) -> str:
        """What to say when nothing of it is there."""
        places = " or ".join(str(root / place) for place in self.places)
        how = "add --download to fetch it" if self.archives else self.manual
        also = f" ({self.manual})" if self.archives and self.manual else ""
        return f"{self.name} is not in {places}; expected is {self.layout}; {how}{also}"


def of_files(paths: Sequence[str | os.PathLike], labels: Sequence[int], partial: bool) -> Samples:
    """Images in files; raises DamagedFile for one that is missing, or leaves it out where `partial`."""
    paths = [os.fspath(path) for path in paths]
    there = [os.path.isfile(path) for path in paths]
    if not all(there) and not partial:
        first = paths[there.index(False)]
        raise DamagedFile(
            f"{there.count(False):,} images are missing, the first is {first}: unpack them again, {PARTIAL}"
        )
    kept = [path for path, is_there in zip(paths, there, strict=True) if is_there]
    return Samples(
        kept, torch.tensor([label for label, is_there in zip(labels, there, strict=True) if is_there]).long()
    )


@contextmanager
def reading(*files: Path) -> Iterator[str]:
    """What is raised names the files that are read; gives their `fingerprint` before, the version of what is read."""
    with naming(" or ".join(map(str, files))):
        yield fingerprint(files)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """What is raised names what is read; what says more by itself passes."""
    try:
        yield
    except (DamagedFile, ImportError, MemoryError):
        raise
    except Exception as error:  # unpickling and parsing of damaged files raise nearly anything
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{what}: {type(error).__name__}: {reason}") from error


def check_md5s(place: Path, files: Iterable[Sequence[str]]) -> None:
    """Raises ValueError that names the first of (file, md5) that is missing or is not the published one."""
    for file, md5 in files:
        if not (place / file).is_file():
            raise ValueError(f"{place / file} is missing")
        found = md5_of(place / file)
        if found != md5:
            raise ValueError(f"{place / file} is corrupted, or another version: its md5 is {found}, not {md5}")


def of_pixels(pixels, labels: Tensor, version: str, *files: Path) -> Samples:
    """Images in an array, uint8 [N, H, W] or [N, H, W, 3], that was read from these files; version: their fingerprint
    before."""
    if len(pixels) != len(labels):
        raise ValueError(f"{' and '.join(map(str, files))}: {len(pixels):,} images and {len(labels):,} labels")
    return Samples(pixels, labels, f"{version}/{hashlib.sha256(labels.numpy().tobytes()).hexdigest()}")


def check_class_folders(folder: Path, classes: Collection[str]) -> None:
    """Raises DamagedFile that names a class folder which the data set does not have."""
    more = [name for name in subfolders(folder) if name not in set(classes)]
    if more:
        raise DamagedFile(f"{folder / more[0]} is no class of this data set, which has {len(classes)}: move it away")
