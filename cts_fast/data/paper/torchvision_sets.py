"""Data sets that torchvision reads: its classes find images and labels, and decode none."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from cts_fast.data.paper.base import Splits, check_class_folders, of_files, of_pixels


def _listed(splits: list[list[Any]], partial: bool, classes: tuple[str, ...]) -> Splits:
    """Of torchvision data sets (several a split) that were given `str` to load images with: they yield paths."""
    parts = []
    for sets in splits:
        rows = [data[i] for data in sets for i in range(len(data))]
        parts.append(of_files([path for path, _ in rows], [int(label) for _, label in rows], partial))
    return Splits.of(parts, classes)


def _without_md5(kind: type, partial: bool, **lists: Any) -> type:
    """The class; where `partial`, one that asks for no checksums. lists: its public lists of (file, md5)."""
    return type(kind.__name__, (kind,), lists) if partial else kind


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
    bare = {name: [[file, None] for file, _ in getattr(kind, name)] for name in ("train_list", "test_list")}
    kind = _without_md5(kind, partial, **bare, meta={**kind.meta, "md5": None})
    parts = []
    for is_train in (True, False):
        files = [place / file for file, _ in (kind.train_list if is_train else kind.test_list)]
        for file in [*files, place / kind.meta["filename"]] if partial else ():
            with open(file, "rb") as opened:
                _Arrays(opened, encoding="latin1").load()
        data = kind(place.parent, train=is_train)
        parts.append(of_pixels(data.data, torch.tensor(data.targets), *files))
        classes = tuple(data.classes)
    return Splits.of(parts, classes)


def fashion_mnist(place: Path, partial: bool) -> Splits:
    """The four idx files, unpacked; Debian's packages of them have other md5s, so none is asked for."""
    from torchvision.datasets import FashionMNIST

    parts = []
    for is_train, stem in ((True, "train"), (False, "t10k")):
        data = FashionMNIST(place.parent.parent, train=is_train)
        files = [place / f"{stem}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        parts.append(of_pixels(data.data.numpy(), data.targets.long(), *files))
    return Splits.of(parts, tuple(FashionMNIST.classes))


def svhn(place: Path, partial: bool) -> Splits:
    """train_32x32.mat and test_32x32.mat; the label 10 of the digit 0 becomes 0."""
    from torchvision.datasets import SVHN

    bare = {split: [url, file, None] for split, (url, file, _) in SVHN.split_list.items()}
    kind = _without_md5(SVHN, partial, split_list=bare)
    parts = []
    for split in ("train", "test"):
        data = kind(place, split=split)
        labels = torch.from_numpy(data.labels.reshape(-1)).long()
        parts.append(of_pixels(data.data.transpose(0, 2, 3, 1), labels, place / kind.split_list[split][1]))
    return Splits.of(parts, tuple(map(str, range(10))))


def stl10(place: Path, partial: bool) -> Splits:
    """The labelled images; labels start at 1 in the files. The unlabelled ones need not be there."""
    from torchvision.datasets import STL10

    train_list = [[file, None if partial else md5] for file, md5 in STL10.train_list[:2]]
    test_list = [[file, None if partial else md5] for file, md5 in STL10.test_list]
    kind = type("STL10", (STL10,), {"train_list": train_list, "test_list": test_list})
    parts = []
    for split, files in (("train", train_list), ("test", test_list)):
        data = kind(place.parent, split=split)
        labels = torch.as_tensor(data.labels).long()
        parts.append(of_pixels(data.data.transpose(0, 2, 3, 1), labels, *(place / file for file, _ in files)))
    return Splits.of(parts, tuple(data.classes))


def aircraft(place: Path, partial: bool) -> Splits:
    """The 100 variants; trainval to train on."""
    from torchvision.datasets import FGVCAircraft

    train, test = (FGVCAircraft(place.parent, split, loader=str) for split in ("trainval", "test"))
    return _listed([[train], [test]], partial, tuple(train.classes))


def cars(place: Path, partial: bool) -> Splits:
    """devkit, cars_train, cars_test; copies on the web nest the images (cars_train/cars_train)."""
    from torchvision.datasets import StanfordCars

    train, test = (StanfordCars(place.parent, split, loader=_nested) for split in ("train", "test"))
    return _listed([[train], [test]], partial, tuple(train.classes))


def _nested(path: str) -> str:
    folder, name = os.path.split(path)
    deeper = os.path.join(folder, os.path.basename(folder), name)
    return deeper if os.path.isfile(deeper) else path


def flowers(place: Path, partial: bool) -> Splits:
    """The published training and validation parts to train on (1,020 each), the large rest to test on."""
    from torchvision.datasets import Flowers102

    train, val, test = (Flowers102(place.parent, split, loader=str) for split in ("train", "val", "test"))
    return _listed([[train, val], [test]], partial, tuple(Flowers102.classes))


def food(place: Path, partial: bool) -> Splits:
    """meta/train.json and meta/test.json, images/<class>/*.jpg."""
    from torchvision.datasets import Food101

    train, test = (Food101(place.parent, split, loader=str) for split in ("train", "test"))
    check_class_folders(place / "images", train.classes)
    return _listed([[train], [test]], partial, tuple(train.classes))


def dtd(place: Path, partial: bool) -> Splits:
    """The first of the ten published partitions; its training and validation parts to train on."""
    from torchvision.datasets import DTD

    train, val, test = (DTD(place.parent, split, loader=str) for split in ("train", "val", "test"))
    check_class_folders(place / "dtd" / "images", train.classes)
    return _listed([[train, val], [test]], partial, tuple(train.classes))
