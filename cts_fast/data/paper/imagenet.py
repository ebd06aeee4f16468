"""ImageNet (ILSVRC 2012) in eight groups of classes, cut along WordNet's hierarchy."""

from __future__ import annotations

from pathlib import Path

from cts_fast.data.folder import by_class
from cts_fast.data.images import Samples
from cts_fast.data.paper.base import PARTIAL, DamagedFile, Splits

TITLES = (
    "dogs",
    "other mammals",
    "birds, reptiles, amphibians and fish",
    "vehicles and structures",
    "devices",
    "clothing, coverings, appliances and furniture",
    "containers, implements and equipment",
    "invertebrates, plants, fungi, food and landscapes",
)
"""What the groups hold; `cts_fast.data.build.imagenet_groups` makes the table and says how they were cut."""

LAYOUT = (
    "imagenet/{train,val}/<wnid>/*.JPEG (val sorted into class folders, as torchvision.datasets.ImageNet leaves it)"
)


def groups() -> list[dict[str, str]]:
    """For each group, wnid to name of its classes, sorted by wnid."""
    table = Path(__file__).with_name("imagenet_groups.txt").read_text(encoding="utf-8")
    found: list[dict[str, str]] = [{} for _ in TITLES]
    for line in table.splitlines():
        wnid, number, name = line.split("\t")
        found[int(number) - 1][wnid] = name
    return found


def read(place: Path, partial: bool, wnids: dict[str, str]) -> Splits:
    """The classes of one group; the published validation set is the test set."""
    parts: list[Samples] = []
    seen: set[tuple[int, int]] = set()  # a link would have images counted twice, or tested that were trained on
    for split in ("train", "val"):
        lacking = [wnid for wnid in wnids if not (place / split / wnid).is_dir()]
        if lacking and not partial:
            raise DamagedFile(
                f"{place / split / lacking[0]} is missing ({len(lacking)} class folders of this group are): "
                f"unpack the archive again, {PARTIAL}"
            )
        parts.append(by_class(place / split, wnids, seen))
    return Splits.of(parts, tuple(f"{name} ({wnid})" for wnid, name in wnids.items()))
