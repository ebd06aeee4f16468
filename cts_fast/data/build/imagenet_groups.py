"""Make the table of ImageNet's groups: ``python -m cts_fast.data.build.imagenet_groups --out FILE [--work FOLDER]``.

The 1,000 classes are noun synsets of WordNet 3.0: a class's wnid is "n" and the synset's offset. Their list comes from
the wheel of timm, WordNet's tree from Debian's ``wordnet-base``. A class belongs to the first of eight groups one of
whose `ROOTS` is the class itself or above it, on any path of hypernyms. The paper divides ImageNet by the same
hierarchy, into groups of 113, 131, 121, 121, 120, 95, 155 and 144 classes, but does not print how: those cannot be made
again. Ours have 118, 100, 119, 129, 129, 122, 142 and 141; `cts_fast.data.paper.imagenet.TITLES` says what they hold.
"""

from __future__ import annotations

from pathlib import Path

from cts_fast.data.build.command import run
from cts_fast.data.build.sources import fetch

WHEELS = {"timm": "1.0.31"}
DEBS = {"wordnet-base": "1:3.0-37"}
ROOTS = (  # WordNet offsets, for each of `TITLES`
    ("02084071",),  # dog
    ("01861778",),  # mammal
    ("01471682",),  # vertebrate
    ("03100490", "04341686"),  # conveyance, structure
    ("03183080",),  # device
    ("03122748", "03093574", "03405265"),  # covering, consumer goods, furnishing
    ("00021939",),  # artifact
    ("00001740",),  # entity: all else
)


def nouns(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Offset to (first word, offsets of the hypernyms) of every synset in WordNet's ``data.noun`` (see wndb(5WN))."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields = line.split(" | ")[0].split()
        pointers = fields[5 + 2 * int(fields[3], 16) :]  # groups of four: symbol, offset, part of speech, words
        above = [pointers[i + 1] for i in range(0, len(pointers) - 3, 4) if pointers[i] in ("@", "@i")]
        found[fields[0]] = (fields[4].replace("_", " "), above)
    return found


def group_of(offset: str, tree: dict[str, tuple[str, list[str]]]) -> int:
    """Number (from 1) of a synset's group."""
    above, open_ = set(), [offset]
    while open_:
        here = open_.pop()
        if here not in above:
            above.add(here)
            open_ += tree[here][1]
    return next(number for number, roots in enumerate(ROOTS, 1) if above & set(roots))


def build(out: Path, work: Path) -> None:
    """Fetch the sources into ``work`` and write the table: wnid, number of the group, first word of the synset."""
    trees = fetch(work, WHEELS, DEBS)
    tree = nouns(trees / "wordnet-base/usr/share/wordnet/data.noun")
    wnids = sorted((trees / "timm/timm/data/_info/imagenet_synsets.txt").read_text().split())
    rows = [f"{wnid}\t{group_of(wnid[1:], tree)}\t{tree[wnid[1:]][0]}\n" for wnid in wnids]
    out.write_text("".join(rows), encoding="utf-8")
    counts = [sum(row.split("\t")[1] == str(number) for row in rows) for number in range(1, len(ROOTS) + 1)]
    print(f"{out}: {len(rows)} classes in groups of {', '.join(map(str, counts))}")


if __name__ == "__main__":
    run(build, "cts_fast.data.build.imagenet_groups", __doc__)
