"""Data sets that torchvision reads: its classes find images and labels, and decode none."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from cts_fast.data.images import fingerprint
from cts_fast.data.paper.base import Splits, check_class_folders, check_md5s, naming, of_files, of_pixels, reading


def _made(kind: Any, root: Path, splits: Iterable[str], lists: str, loader: Callable = str) -> list[Any]:
    """The splits of a torchvision data set whose images are in files; lists: what it reads, {} the split's name."""
    sets = []
    for split in splits:
        with naming(str(root / lists.format(split))):
            sets.append(kind(root, split, loader=loader))
    return sets


def _listed(splits: list[list[Any]], partial: bool, classes: tuple[str, ...]) -> Splits:
    """Of torchvision data sets (several a split) that were given `str` to load images with: they yield paths."""
    parts = []
    for sets in splits:
        rows = [data[i] for data in sets for i in range(len(data))]
        parts.append(of_files([path for path, _ in rows], [int(label) for _, label in rows], partial))
    return Splits.of(parts, classes)


def _bare(kind: type, **lists: Any) -> type:
    """The class, asking for no checksums: `check_md5s` says which file is wrong. lists: its public lists of files."""
    return type(kind.__name__, (kind,), lists)


class _Arrays(pickle.Unpickler):
    """Loads arrays, numbers and words; refuses what names anything else, which might run code."""

    NAMES = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    NAMES |= {("numeric", "_frombuffer"), ("multiarray", "scalar")}

    def find_class(self, module: str, name: str) -> Any:
        if (module.removeprefix("numpy.core.").removeprefix("numpy._core."), name) not in self.NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no images need")
        return super().find_class(module, name)


def cifar(place: Path, partial: bool, fine: bool) -> Splits:
    """CIFAR-10, or CIFAR-100 with its fine labels; without a checksum, files of arrays and words alone."""
    from torchvision import datasets

    kind = datasets.CIFAR100 if fine else datasets.CIFAR10
    listed = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    if partial:
        for path in (place / file for file, _ in listed):
            with reading(path), open(path, "rb") as opened:
                _Arrays(opened, encoding="latin1").load()
    else:
        check_md5s(place, listed)
    bare = {name: [[file, None] for file, _ in getattr(kind, name)] for name in ("train_list", "test_list")}
    kind = _bare(kind, **bare, meta={**kind.meta, "md5": None})
    parts = []
    for is_train in (True, False):
        files = [place / file for file, _ in (kind.train_list if is_train else kind.test_list)]
        with reading(*files, place / kind.meta["filename"]) as version:
            data = kind(place.parent, train=is_train)
        parts.append(of_pixels(data.data, torch.tensor(data.targets), version, *files))
        classes = tuple(data.classes)
    return Splits.of(parts, classes)


def fashion_mnist(place: Path, partial: bool) -> Splits:
    """The four idx files, unpacked; Debian's packages of them have other md5s, so none is asked for."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    parts = []
    for stem in ("train", "t10k"):
        files = images, labels = place / f"{stem}-images-idx3-ubyte", place / f"{stem}-labels-idx1-ubyte"
        version = fingerprint(files)
        with reading(images):
            pixels = read_image_file(str(images)).numpy()
        with reading(labels):
            parts.append(of_pixels(pixels, read_label_file(str(labels)), version, *files))
    return Splits.of(parts, tuple(FashionMNIST.classes))


def svhn(place: Path, partial: bool) -> Splits:
    """train_32x32.mat and test_32x32.mat; the label 10 of the digit 0 becomes 0."""
    from torchvision.datasets import SVHN

    kind = _bare(SVHN, split_list={split: [url, file, None] for split, (url, file, _) in SVHN.split_list.items()})
    parts = []
    for split in ("train", "test"):
        _, file, md5 = SVHN.split_list[split]
        if not partial:
            check_md5s(place, [(file, md5)])
        with reading(place / file) as version:
            data = kind(place, split=split)
        labels = torch.from_numpy(data.labels.reshape(-1)).long()
        parts.append(of_pixels(data.data.transpose(0, 2, 3, 1), labels, version, place / file))
    return Splits.of(parts, tuple(map(str, range(10))))


def stl10(place: Path, partial: bool) -> Splits:
    """The labelled images; labels start at 1 in the files. The unlabelled ones need not be there."""
    from torchvision.datasets import STL10

    lists = {"train_list": STL10.train_list[:2], "test_list": STL10.test_list}
    kind = _bare(STL10, **{name: [[file, None] for file, _ in files] for name, files in lists.items()})
    parts = []
    for split, listed in zip(("train", "test"), lists.values(), strict=True):
        if not partial:
            check_md5s(place, listed)
        files = [place / file for file, _ in listed]
        with reading(*files) as version:
            data = kind(place.parent, split=split)
        labels = torch.as_tensor(data.labels).long()
        parts.append(of_pixels(data.data.transpose(0, 2, 3, 1), labels, version, *files))
    return Splits.of(parts, tuple(data.classes))


def aircraft(place: Path, partial: bool) -> Splits:
    """The 100 variants; trainval to train on."""
    from torchvision.datasets import FGVCAircraft

    train, test = _made(
        FGVCAircraft, place.parent, ("trainval", "test"), "fgvc-aircraft-2013b/data/images_variant_{}.txt"
    )
    return _listed([[train], [test]], partial, tuple(train.classes))


def cars(place: Path, partial: bool) -> Splits:
    """devkit, cars_train, cars_test; copies on the web nest the images (cars_train/cars_train)."""
    from torchvision.datasets import StanfordCars

    train, test = _made(
        StanfordCars, place.parent, ("train", "test"), "stanford_cars, its devkit and annotations of {}", _nested
    )
    return _listed([[train], [test]], partial, tuple(train.classes))


def _nested(path: str) -> str:
    folder, name = os.path.split(path)
    deeper = os.path.join(folder, os.path.basename(folder), name)
    return deeper if os.path.isfile(deeper) else path


def flowers(place: Path, partial: bool) -> Splits:
    """The published training and validation parts to train on (1,020 each), the large rest to test on."""
    from torchvision.datasets import Flowers102

    train, val, test = _made(
        Flowers102, place.parent, ("train", "val", "test"), "flowers-102/setid.mat or imagelabels.mat"
    )
    return _listed([[train, val], [test]], partial, tuple(Flowers102.classes))


def food(place: Path, partial: bool) -> Splits:
    """meta/train.json and meta/test.json, images/<class>/*.jpg."""
    from torchvision.datasets import Food101

    train, test = _made(Food101, place.parent, ("train", "test"), "food-101/meta/{}.json")
    check_class_folders(place / "images", train.classes)
    return _listed([[train], [test]], partial, tuple(train.classes))


def dtd(place: Path, partial: bool) -> Splits:
    """The first of the ten published partitions; its training and validation parts to train on."""
    from torchvision.datasets import DTD

    train, val, test = _made(DTD, place.parent, ("train", "val", "test"), "dtd/dtd/labels/{}1.txt")
    check_class_folders(place / "dtd" / "images", train.classes)
    return _listed([[train, val], [test]], partial, tuple(train.classes))
