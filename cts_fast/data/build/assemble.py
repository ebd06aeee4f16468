"""From candidate images to a task: duplicates removed, classes balanced, packed (builder only)."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from cts_fast.data import archive


@dataclass
class Draft:
    """A task under construction; ``candidates`` are (image uint8 [C, H, W], class index, is test image)."""

    name: str
    role: str
    title: str
    source: str
    classes: list[str]
    flip: bool = False
    candidates: list[tuple[np.ndarray, int, bool]] = field(default_factory=list)


def distinct(candidates: list[tuple[np.ndarray, int, bool]]) -> list[tuple[np.ndarray, int, bool]]:
    """One of each bitmap; a bitmap that stands for two classes is left out altogether."""
    meaning: dict[bytes, set[int]] = defaultdict(set)
    for image, label, _ in candidates:
        meaning[image.tobytes()].add(label)
    kept, seen = [], set()
    for image, label, test in candidates:
        key = image.tobytes()
        if len(meaning[key]) == 1 and key not in seen:
            seen.add(key)
            kept.append((image, label, test))
    return kept


def capped(candidates: list, train: int, test: int, seed: str) -> list:
    """At most ``train`` and ``test`` images a class, drawn with ``seed``; training images first, then by class."""
    groups = defaultdict(list)
    for candidate in candidates:
        groups[candidate[2], candidate[1]].append(candidate)
    chosen = []
    for (is_test, label), group in sorted(groups.items()):
        random.Random(f"{seed}/{is_test}/{label}").shuffle(group)
        chosen += group[: test if is_test else train]
    return chosen


def without(draft: Draft, other: Draft) -> Draft:
    """``draft`` less the bitmaps that occur in ``other``, so that the two tasks share none."""
    taken = {image.tobytes() for image, _, _ in other.candidates}
    draft.candidates = [candidate for candidate in draft.candidates if candidate[0].tobytes() not in taken]
    return draft


def pack(draft: Draft, train: int, test: int, differences: str | None = None) -> tuple[dict, bytes]:
    """The member of a drafted task with at most ``train`` and ``test`` images a class."""
    chosen = capped(distinct(draft.candidates), train, test, draft.name)
    images = torch.from_numpy(np.stack([image for image, _, _ in chosen]))
    labels = torch.tensor([label for _, label, _ in chosen])
    entry, data = archive.pack_images(images, labels, differences)
    return describe(draft, sum(not c[2] for c in chosen)) | entry, data


def describe(draft: Draft, train: int) -> dict:
    """The header's entry about a task whose first ``train`` images are for training."""
    return {
        "name": draft.name,
        "role": draft.role,
        "title": draft.title,
        "source": draft.source,
        "classes": draft.classes,
        "flip": draft.flip,
        "train": train,
    }
