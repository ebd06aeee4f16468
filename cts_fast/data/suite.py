"""Tasks of a suite: what a program trains and tests on."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cts_fast.data import archive
from cts_fast.data.cache import Storage, mapped
from cts_fast.data.decode import decode, to_picture, upright
from cts_fast.data.errors import DamagedFile
from cts_fast.data.images import LazyImages, MappedImages, Samples

BUILTIN_FILE = "builtin.bin"


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: ``images`` uint8 [N, C, H, W] with C in {1, 3}, ``labels`` int64 [N].

    Images that are not in memory are `cts_fast.data.images.LazyImages`: indexing reads the images asked for.
    """

    images: Tensor | LazyImages
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.numel()

    def select(self, numbers: Tensor) -> ImageSet:
        """Some of the images, in this order."""
        chosen = self.images[numbers] if isinstance(self.images, Tensor) else self.images.select(numbers)
        return ImageSet(chosen, self.labels[numbers])


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

    @staticmethod
    def from_datasets(
        name: str,
        train: Any,
        test: Any,
        *,
        size: int,
        channels: int = 3,
        classes: Sequence[str] | None = None,
        flip: bool = False,
        role: str = "train",
        title: str = "",
        source: str = "",
        cache: Path | str | None = None,
        version: str = "1",
    ) -> Task:
        """A task of two ``torch.utils.data.Dataset``s of (image, label), read once.

        Args:
            train, test: with ``len()`` and ``[i]``; an image is a PIL image, a tensor [C, H, W] (uint8, or floats in
                0..1) or a numpy array (uint8 [H, W] or [H, W, C]); a label is 0, 1, ... C - 1.
            size: side length to which images are resized; channels: 3, or 1 for grey.
            classes: their names; None: those of ``train.classes``, or the numbers.
            cache: a folder in which the images are kept in mapped files under ``name`` and ``version``; None: memory.

        Raises:
            ValueError: a split without images, a label outside the classes.
            DamagedFile: an item that cannot be read, or whose image or label is none; the message has its number.
        """
        if channels not in (1, 3) or size < 1:
            raise ValueError(f"task {name!r}: channels must be 1 or 3 and size at least 1, not {channels} and {size}")
        if cache is not None and Path(name).name != name:
            raise ValueError(f"task {name!r} is no name of a folder, in which its images could be kept")
        splits = []
        try:
            for split, data in (("train", train), ("test", test)):
                splits.append(_read_dataset(f"{name}-{split}", data, size, channels, cache, version))
            named = classes if classes is not None else getattr(train, "classes", None)
            names = tuple(_numbers_of_classes(name, splits[0], splits[1]) if named is None else map(str, named))
            return Task(name, splits[0], splits[1], names, flip, role, title or name, source).checked()
        except ValueError:
            for part in splits:  # else the same would be found there after the data set was mended
                if isinstance(part.images, MappedImages):
                    shutil.rmtree(part.images.path.parent, ignore_errors=True)
            raise

    def checked(self) -> Task:
        """The task itself; raises ValueError for a split without images, a label outside the classes, what is no
        `ImageSet`, and a name that `check_name` refuses."""
        check_name(self.name)
        for split, part in (("training", self.train), ("test", self.test)):
            if not len(part):
                raise ValueError(f"task {self.name!r} has no {split} images")
            shape, dtype = tuple(part.images.shape), part.labels.dtype
            if len(shape) != 4 or shape[1] not in (1, 3) or shape[0] != len(part) or dtype != torch.int64:
                raise ValueError(
                    f"task {self.name!r} has {split} images of shape {shape} and {len(part)} labels of {dtype}: images "
                    "must be [N, C, H, W] with C 1 or 3, labels N of torch.int64"
                )
            if isinstance(part.images, Tensor) and part.images.dtype != torch.uint8:
                raise ValueError(f"task {self.name!r} has {split} images of {part.images.dtype}, not torch.uint8")
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= len(self.classes):
                raise ValueError(
                    f"task {self.name!r} has {split} labels from {low} to {high} and {len(self.classes)} classes: "
                    f"labels must lie in 0..{len(self.classes) - 1}"
                )
        return self

    def validation(self, fraction: float = 0.1, seed: int = 0) -> Task:
        """The same task for tuning: a seeded fraction of every class's training images takes the test set's place."""
        train, held = split_by_class(self.train.labels, fraction, f"{seed}/{self.name}")
        return replace(self, train=self.train.select(train), test=self.train.select(held)).checked()


def check_name(name: str) -> None:
    """Raises ValueError for a task's name that options, with commas between tasks, and lines of tables cannot hold."""
    if "," in name or not name.isprintable():
        raise ValueError(f"a task cannot be called {ascii(name)}: give it a name with no comma and nothing unprintable")


def _numbers_of_classes(name: str, train: ImageSet, test: ImageSet) -> list[str]:
    """The names of classes that have none; raises ValueError unless every class has a training image."""
    low, high = (int(bound) for bound in torch.cat([train.labels, test.labels]).aminmax())
    there = train.labels.unique()
    absent = [low] if low < 0 else [n for n, label in enumerate(there.tolist()) if label != n] or [len(there)]
    if absent[0] <= high:
        raise ValueError(
            f"task {name!r} has labels from {low} to {high} and {'a' if low < 0 else 'no training image of'} class "
            f"{absent[0]}: labels must be 0, 1, ... C - 1, or give classes"
        )
    return [str(label) for label in there.tolist()]


def split_by_class(labels: Tensor, fraction: float, seed: str) -> tuple[Tensor, Tensor]:
    """Numbers of two parts; the second holds `fraction` of each class (rounded, one at least where there are two)."""
    kept, held = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1).tolist()
        random.Random(f"{seed}/{label}").shuffle(members)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held += members[:count]
        kept += members[count:]
    return torch.tensor(sorted(kept), dtype=torch.int64), torch.tensor(sorted(held), dtype=torch.int64)


def _read_dataset(title: str, data: Any, size: int, channels: int, cache: Path | str | None, version: str) -> ImageSet:
    """All of a torch data set, each item read once; its images in memory, or in the cache."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(f"{title}: a data set must have len() and [i], which {type(data).__name__} has not")
    count = len(data)
    if not count:
        raise ValueError(f"{title}: the data set is empty")
    labels = torch.zeros(count, dtype=torch.int64)

    class Images:
        """The images; reading one notes its label."""

        def __getitem__(self, i: int) -> Any:
            try:
                image, label = data[i]
                if int(label) != label:
                    raise ValueError(f"the label {label} is no integer")
                labels[i] = int(label)
                return upright(to_picture(image), channels)
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0]
                raise DamagedFile(f"{title}: item {i} cannot be read ({type(error).__name__}: {reason})") from error

    items: Any = Images()
    if cache is None:
        images = torch.stack([torch.from_numpy(decode(items[i], size, channels)) for i in range(count)])
        return ImageSet(images, labels)
    samples = Samples(items, labels, key=f"{version}/{count}")
    return ImageSet(*mapped(title, samples, size, channels, Path(cache)))


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


class Suite:
    """Tasks that are found by name and read when they are asked for."""

    def roles(self, root: Path | None) -> dict[str, str]:
        """Name to role of every task, without reading images: "train", "target", or "" for those to ask for by name."""
        raise NotImplementedError

    def load(self, root: Path | None, names: Sequence[str], storage: Storage) -> dict[str, Task]:
        """The tasks of these names."""
        raise NotImplementedError


class BuiltinSuite(Suite):
    """The tasks that come inside the package, in one file; see `cts_fast.data.archive`."""

    REMEDY = "install cts_fast again, or make it anew with `python -m cts_fast.data.build --out FILE`"

    def header(self, root: Path | None) -> tuple[Path, dict, int]:
        """The file, its header, and where its members begin."""
        path = (root or Path(__file__).parent / "builtin") / BUILTIN_FILE
        if not path.is_file():
            raise FileNotFoundError(f"the built-in suite {path} is missing: {self.REMEDY}")
        try:
            return path, *archive.read_header(path)
        except DamagedFile as error:
            raise DamagedFile(f"the built-in suite {path} is damaged: {error}; {self.REMEDY}") from None

    def roles(self, root: Path | None) -> dict[str, str]:
        _, header, _ = self.header(root)
        return {entry["name"]: entry["role"] for entry in header["tasks"]}

    def load(self, root: Path | None, names: Sequence[str], storage: Storage) -> dict[str, Task]:
        path, header, start = self.header(root)
        entries = {entry["name"]: entry for entry in header["tasks"]}
        tasks = {}
        for name in names:
            entry = entries[name]
            try:
                images, labels = archive.unpack(entry, archive.read_member(path, start, entry))
            except DamagedFile as error:
                message = f"task {name!r} of the built-in suite {path} is damaged: {error}; {self.REMEDY}"
                raise DamagedFile(message) from None
            train, test = (
                _image_set(images[part], labels[part])
                for part in (slice(None, entry["train"]), slice(entry["train"], None))
            )
            classes = tuple(entry["classes"])
            tasks[name] = Task(
                name, train, test, classes, entry["flip"], entry["role"], entry["title"], entry["source"]
            )
        return tasks


class FunctionSuite(Suite):
    """Tasks that a function (root, names) makes in memory; names None: all."""

    def __init__(self, function: Callable[..., dict[str, Task]]) -> None:
        self.function = function

    def roles(self, root: Path | None) -> dict[str, str]:
        return {name: task.role for name, task in self.function(root, None).items()}

    def load(self, root: Path | None, names: Sequence[str], storage: Storage) -> dict[str, Task]:
        return self.function(root, list(names))


SUITES: dict[str, Suite | Callable[..., dict[str, Task]]] = {"builtin": BuiltinSuite()}
"""Suite name to a `Suite`, or to a function as `FunctionSuite` takes it; a further suite adds itself here."""

REGISTERED: dict[str, Task | Callable[[], Task]] = {}
"""Tasks of one's own, which every suite has beside its own."""


def register(name: str, task: Task | Callable[[], Task]) -> None:
    """Add a task of one's own, or a function that makes it, to be asked for by this name in any suite.

    Raises ValueError for a name that is taken, here or, once that is loaded, in the suite, or that `check_name`
    refuses; TypeError for what is neither.
    """
    check_name(name)
    if name in REGISTERED:
        raise ValueError(f"a task {name!r} is registered already")
    if not isinstance(task, Task) and not callable(task):
        raise TypeError(f"the task {name!r} must be a Task or a function that makes one, not {type(task).__name__}")
    REGISTERED[name] = task


def task_roles(name: str, root: str | Path | None = None) -> dict[str, str]:
    """Name to role of the tasks of a suite, or of several with commas between them; see `load_suite`."""
    roles: dict[str, str] = {}
    for suite, folder in _parts(name, root):
        roles = {**roles, **{task: role for task, role in suite.roles(folder).items() if task not in roles}}
    return roles


def load_suite(
    name: str = "builtin",
    root: str | Path | None = None,
    names: Iterable[str] | None = None,
    storage: Storage | None = None,
) -> dict[str, Task]:
    """Load the tasks of a suite, by name; only the tasks asked for are decoded.

    Args:
        name: the suite; "builtin" comes with the package, "paper" and "imagenet" are the paper's two experiments,
            "folder" has a task for every subfolder of ``root``. Several with commas between them: a task comes from the
            first that has it.
        root: folder that holds the suite's data; None means its own place (the package itself for "builtin").
        names: tasks wanted, returned in this order; None means all that have a role, those for meta-training first.
        storage: how images in files are held.

    Raises:
        ValueError: no such suite or task; the message lists what exists.
        FileNotFoundError: the data are not there; the message says how to get them.
        cts_fast.data.DamagedFile: the file or a task in it does not match its checksum, a count or an image is wrong.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of task names, not the string {names!r}")
    wanted = None if names is None else list(dict.fromkeys(names))
    own = [task for task in wanted or () if task in REGISTERED]
    rest = None if wanted is None else [task for task in wanted if task not in own]
    tasks = _load(name, root, rest, storage or Storage())
    for task in own:
        tasks[task] = _registered(task)
    return tasks if wanted is None else {task: tasks[task] for task in wanted}


def _registered(name: str) -> Task:
    """The registered task of this name, made and checked."""
    task = REGISTERED[name]
    if not isinstance(task, Task):
        try:
            task = task()
        except Exception as error:
            raise ValueError(
                f"the registered task {name!r} cannot be made ({type(error).__name__}: {error})"
            ) from error
    if not isinstance(task, Task):
        raise ValueError(f"the registered task {name!r} is {type(task).__name__}, not a Task")
    return replace(task, name=name).checked()


def _parts(name: str, root: str | Path | None) -> list[tuple[Suite, Path | None]]:
    """The suites of a name with commas, and the folder of each; beside others the built-in one keeps its own place."""
    parts = name.split(",")
    found = []
    for part in parts:
        if part not in SUITES:
            raise ValueError(f"there is no suite {part!r}; there are: {', '.join(SUITES)}")
        suite = SUITES[part]
        folder = None if root is None or (part == "builtin" and len(parts) > 1) else Path(root)
        found.append((suite if isinstance(suite, Suite) else FunctionSuite(suite), folder))
    return found


def _load(name: str, root: str | Path | None, names: list[str] | None, storage: Storage) -> dict[str, Task]:
    """Tasks of one or several suites, without those registered."""
    known: list[str] = []
    wanted: list[tuple[Suite, Path | None, list[str]]] = []
    for suite, folder in _parts(name, root):
        roles = {task: role for task, role in suite.roles(folder).items() if task not in known}
        known += roles
        by_role = [task for task, role in roles.items() if role]
        wanted.append((suite, folder, by_role if names is None else [task for task in names if task in roles]))
    taken = [task for task in REGISTERED if task in known]
    if taken:
        raise ValueError(f"suite {name!r} has a task {taken[0]!r} of its own: register yours under another name")
    known += REGISTERED
    unknown = [task for task in names or () if task not in known]
    if unknown:
        raise ValueError(f"suite {name!r} has no task {', '.join(map(repr, unknown))}; it has: {', '.join(known)}")
    tasks: dict[str, Task] = {}
    for suite, folder, mine in wanted:  # after all names are known, for it may decode for hours
        if mine:
            tasks |= suite.load(folder, mine, storage)
    return tasks
