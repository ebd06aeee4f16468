"""Tiny ImageNet: 200 classes of ImageNet at 64 pixels, in two halves by sorted wnid."""

from __future__ import annotations

from pathlib import Path

from cts_fast.data.folder import images_below
from cts_fast.data.paper.base import Splits, check_class_folders, of_files

HALF = 100
LAYOUT = (
    "tiny-imagenet-200/{wnids.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt}, "
    "or val sorted into val/<wnid>/"
)


def read(place: Path, partial: bool, half: int) -> Splits:
    """Half 0 or 1; the published validation set is the test set, for the test set's labels are not public."""
    wnids = sorted((place / "wnids.txt").read_text().split())
    check_class_folders(place / "train", wnids)
    classes = wnids[half * HALF : (half + 1) * HALF]
    seen: set[tuple[int, int]] = set()  # a link would have images counted twice, or tested that were trained on
    number = {wnid: label for label, wnid in enumerate(classes)}
    train = [(path, label) for wnid, label in number.items() for path in images_below(place / "train" / wnid, seen)]
    val = place / "val"
    if next((val / "images").glob("*"), None) and (val / "val_annotations.txt").is_file():
        rows = [line.split("\t") for line in (val / "val_annotations.txt").read_text().splitlines() if line.strip()]
        test = [(str(val / "images" / row[0]), number[row[1]]) for row in rows if row[1] in number]
    else:  # sorted into class folders, as many scripts do
        check_class_folders(val, [*wnids, "images"])
        test = [(path, label) for wnid, label in number.items() for path in images_below(val / wnid, seen)]
    words = (
        dict(line.split("\t", 1) for line in (place / "words.txt").read_text().splitlines() if "\t" in line)
        if (place / "words.txt").is_file()
        else {}
    )
    names = tuple(f"{words[wnid]} ({wnid})" if wnid in words else wnid for wnid in classes)
    return Splits(of_files(*_columns(train), partial), of_files(*_columns(test), partial), names)


def _columns(rows: list[tuple[str, int]]) -> tuple[list[str], list[int]]:
    return [path for path, _ in rows], [label for _, label in rows]
