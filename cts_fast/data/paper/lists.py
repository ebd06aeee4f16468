"""Stanford Dogs, CUB-200-2011 and Oxford Pets: images in files, labels and splits in lists of their own."""

from __future__ import annotations

from pathlib import Path

from cts_fast.data.paper.base import Splits, check_class_folders, of_files, reading


def dogs(place: Path, partial: bool) -> Splits:
    """Images/<wnid-breed>/*.jpg; train_list.mat and test_list.mat with file_list and labels 1..120."""
    import numpy as np
    from scipy.io import loadmat

    parts, names = [], {}
    for split in ("train", "test"):
        with reading(place / f"{split}_list.mat"):
            told = loadmat(place / f"{split}_list.mat", squeeze_me=True)
        files = [str(file) for file in np.atleast_1d(told["file_list"])]
        labels = [int(label) - 1 for label in np.atleast_1d(told["labels"])]
        names |= {label: file.partition("/")[0] for file, label in zip(files, labels, strict=True)}
        parts.append(of_files([place / "Images" / file for file in files], labels, partial))
    check_class_folders(place / "Images", list(names.values()))
    classes = (names.get(label, str(label + 1)) for label in range(max(names) + 1))
    return Splits.of(parts, tuple(name.partition("-")[2] or name for name in classes))


def cub(place: Path, partial: bool) -> Splits:
    """images.txt, image_class_labels.txt, train_test_split.txt and classes.txt: lines "number value"."""
    paths, labels, is_train, classes = (
        dict(line.split(maxsplit=1) for line in (place / f"{name}.txt").read_text().splitlines() if line.strip())
        for name in ("images", "image_class_labels", "train_test_split", "classes")
    )
    folders = [classes[str(number)].strip() for number in range(1, len(classes) + 1)]
    check_class_folders(place / "images", folders)
    parts = []
    for wanted in ("1", "0"):
        numbers = [number for number in paths if is_train[number].strip() == wanted]
        files = [place / "images" / paths[number].strip() for number in numbers]
        parts.append(of_files(files, [int(labels[number]) - 1 for number in numbers], partial))
    return Splits.of(parts, tuple(folder.partition(".")[2] or folder for folder in folders))


def pets(place: Path, partial: bool) -> Splits:
    """annotations/trainval.txt and test.txt: lines "Breed_number class species breed", classes 1..37.

    torchvision's class reads the same lists, but tells files only by decoding them.
    """
    parts, names = [], {}
    for split in ("trainval", "test"):
        rows = [line.split() for line in (place / "annotations" / f"{split}.txt").read_text().splitlines()]
        rows = [row for row in rows if row and not row[0].startswith("#")]
        labels = [int(row[1]) - 1 for row in rows]
        names |= {label: row[0].rpartition("_")[0] for row, label in zip(rows, labels, strict=True)}
        parts.append(of_files([place / "images" / f"{row[0]}.jpg" for row in rows], labels, partial))
    return Splits.of(parts, tuple(names.get(label, str(label + 1)) for label in range(max(names) + 1)))
