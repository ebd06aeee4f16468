"""The task of colour emoji: to which group of the Unicode list does it belong? (builder only)"""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from cts_fast.data.build.assemble import Draft

PIXELS, STRIKE = 32, 109  # the font holds bitmaps of one size, drawn at this number
_LINE = re.compile(r"(?P<points>[0-9A-F ]+?)\s*; fully-qualified\s*#.*?E\d+\.\d+ (?P<name>.*)")


def emoji(root: Path) -> Draft:
    """Emoji without skin tones, on white; all sequences that begin with one emoji fall into one split."""
    if not features.check("raqm"):
        raise RuntimeError("emoji sequences need a pillow with raqm (the wheels on PyPI have it)")
    path = root / "fonts-noto-color-emoji/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    font = ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    draft = Draft(
        "emoji",
        "train",
        "Unicode group of an emoji",
        "Noto Color Emoji, Google (OFL; artwork Apache 2.0), from Debian; groups from unicode-data",
        [],
    )
    listing = (root / "unicode-data/usr/share/unicode/emoji/emoji-test.txt").read_text(encoding="utf-8")
    for line in listing.splitlines():
        if line.startswith("# group: ") and "Component" not in line:
            draft.classes.append(line.removeprefix("# group: "))
        match = _LINE.fullmatch(line)
        if match and "skin tone" not in match["name"]:
            points = match["points"].split()
            flag = len(points) == 2 and points[0].startswith("1F1")
            test = random.Random(" ".join(points) if flag else points[0]).random() < 0.2
            image = _render(font, "".join(chr(int(point, 16)) for point in points))
            draft.candidates.append((image, len(draft.classes) - 1, test))
    return draft


def _render(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
    """uint8 [3, 32, 32] with 16 levels a channel."""
    large = Image.new("RGB", (144, 144), "white")
    ImageDraw.Draw(large).text((72, 72), text, font=font, anchor="mm", embedded_color=True)
    small = large.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    return ((np.asarray(small, np.uint16) + 8) // 17 * 17).astype(np.uint8).transpose(2, 0, 1).copy()
