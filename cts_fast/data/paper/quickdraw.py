"""QuickDraw: drawings of 28 x 28 pixels, an array for each of 345 categories; of each a fixed number is drawn."""

from __future__ import annotations

import random
from pathlib import Path
from urllib.parse import quote

from cts_fast.data.download import Archive
from cts_fast.data.errors import DamagedFile
from cts_fast.data.images import Samples, fingerprint
from cts_fast.data.paper.base import PARTIAL, Splits

TRAIN, TEST = 500, 100  # of a category; the paper's subset is not published, so this is a choice of ours
PREFIX = "full_numpy_bitmap_"  # of files as the project's page names them
URL = "https://storage.googleapis.com/quickdraw_dataset/full/numpy_bitmap/"
LAYOUT = f"quickdraw/numpy_bitmap/<category>.npy (uint8 [N, 784]), also with the prefix {PREFIX}"


def categories() -> list[str]:
    """Their names, in alphabetical order."""
    return Path(__file__).with_name("quickdraw_categories.txt").read_text(encoding="utf-8").splitlines()


def archives() -> tuple[Archive, ...]:
    """The files of all categories; the server tells their md5."""
    folder = "quickdraw/numpy_bitmap"
    return tuple(Archive(URL + quote(f"{name}.npy"), None, folder, (f"{folder}/{name}.npy",)) for name in categories())


def read(place: Path, partial: bool) -> Splits:
    """A seeded draw of TRAIN + TEST drawings of each category; fewer are split in the same proportion."""
    import numpy as np
    import torch

    items, labels, versions = ([], []), ([], []), []
    known = categories()
    for label, name in enumerate(known):
        path = next((p for p in (place / f"{name}.npy", place / f"{PREFIX}{name}.npy") if p.is_file()), None)
        if path is None:
            if partial:
                continue
            raise DamagedFile(f"{place / name}.npy is missing: fetch it with --download, {PARTIAL}")
        versions.append(fingerprint([path]))
        try:
            drawings = np.lib.format.open_memmap(path, mode="r")  # numpy's own way in would advise to unpickle
            if drawings.dtype != np.uint8 or drawings.ndim != 2 or drawings.shape[1] != 784:
                raise ValueError(f"it holds {drawings.dtype} {drawings.shape}")
        except (ValueError, EOFError, OSError) as error:
            raise DamagedFile(f"{path} is damaged ({error}): delete it and fetch it again with --download") from None
        if len(drawings) < TRAIN + TEST and not partial:
            lacking = f"{path} holds {len(drawings)} drawings and {TRAIN + TEST} are needed"
            raise DamagedFile(f"{lacking}: delete it and fetch it again with --download, {PARTIAL}")
        numbers = random.Random(f"quickdraw/{name}").sample(range(len(drawings)), min(TRAIN + TEST, len(drawings)))
        tested = round(len(numbers) * TEST / (TRAIN + TEST))
        for part, chosen in ((0, numbers[tested:]), (1, numbers[:tested])):
            items[part].append(drawings[sorted(chosen)].reshape(-1, 28, 28))
            labels[part].extend([label] * len(chosen))
    parts = (
        Samples(np.concatenate(pixels), torch.tensor(numbers), f"{TRAIN}/{TEST}/{versions}")
        for pixels, numbers in zip(items, labels, strict=True)
    )
    return Splits.of(parts, tuple(known))
