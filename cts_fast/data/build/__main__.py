"""Make the built-in suite anew from its sources: ``python -m cts_fast.data.build --out FILE [--work FOLDER]``.

Needs numpy, pillow and fonttools (the extra ``[data]``), pip and, for four Debian packages, ``apt-get`` (or the .deb
files put into ``FOLDER/downloads``); about 220 MB are downloaded. The sources and their versions stand in
`cts_fast.data.build.sources`. With these sources and the renderer's versions of `sources.RENDERER` the file comes out
byte for byte as it is committed; another FreeType may change grey levels of rendered type, another liblzma the
compressed bytes. The file's header records the versions.
"""

from __future__ import annotations

import logging
from pathlib import Path

from cts_fast.data.build.command import run

LETTERS_PER_TASK = (4600, 1200)  # training and test images of a letter task, over all classes


def installed() -> dict[str, str]:
    """Versions of what renders here, in the shape of `sources.RENDERER`."""
    import fontTools
    import numpy
    import PIL
    from PIL import features

    return {
        "pillow": PIL.__version__,
        "freetype": str(features.version("freetype2")),
        "numpy": numpy.__version__,
        "fonttools": fontTools.version,
    }


def build(out: Path, work: Path) -> None:
    """Fetch the sources into ``work`` and write the suite file ``out``; prints one line per task."""
    from cts_fast.data import archive
    from cts_fast.data.build import emoji_task, photo_tasks, sources, type_tasks
    from cts_fast.data.build.assemble import pack, without

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # silences remarks on harmless padding in fonts
    versions = installed()
    if versions != sources.RENDERER:
        print(f"note: rendered with {versions}, the committed file with {sources.RENDERER}: bytes may differ")
    root = sources.fetch(work)
    members = []

    def add(member: tuple[dict, bytes]) -> None:
        entry, data = member
        members.append(member)
        count, channels, height, width = entry["shape"]
        print(
            f"{entry['name']:14} {entry['role']:6} {count:6,} images, {len(entry['classes']):2} classes, "
            f"{channels}x{height}x{width}, {len(data):9,} bytes",
            flush=True,
        )

    for draft in type_tasks.letters(root):
        train, test = (round(total / len(draft.classes)) for total in LETTERS_PER_TASK)
        add(pack(draft, train, test))
    add(pack(type_tasks.typefaces(root), 170, 40))
    concepts = type_tasks.icon_concepts(root)
    add(pack(without(type_tasks.icon_styles(root), concepts), 340, 80))
    add(pack(emoji_task.emoji(root), 300, 80))
    add(photo_tasks.patches(root, "photos", 600, 150))
    add(photo_tasks.patches(root, "textures", 600, 150))
    add(pack(photo_tasks.fashion_mnist(root), 700, 200))
    add(photo_tasks.patches(root, "scenes", 600, 150))
    add(pack(concepts, 120, 30))
    add(pack(type_tasks.hangul(root), 220, 60))
    about = {"suite": "builtin", "version": 1, "sources": {**sources.WHEELS, **sources.DEBS}, "renderer": versions}
    archive.write(out, about, members)
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(build, "cts_fast.data.build", __doc__)
