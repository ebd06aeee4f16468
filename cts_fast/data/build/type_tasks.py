"""Tasks of rendered type: letters, symbols, Hangul, typefaces and icons (builder only).

Every image is one glyph (or two, for typefaces) rendered white on black with 16 grey levels. Letters keep their place
and size relative to the base line; icons are scaled to the box. Training and test images come from different font
families, from different characters (typefaces, Hangul) or from different icon names or sets, never from a draw over
images.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from cts_fast.data.build.assemble import Draft

FONT_SOURCE = (
    "rendered type: fonts of matplotlib, mplhep-data, rendercv-fonts and weblate-fonts "
    "(OFL, Apache 2.0, GUST, Bitstream and Ubuntu font licences)"
)
ICON_SOURCE = "rendered icons: icon fonts of qtawesome (OFL, Apache 2.0, MIT, CC BY 4.0)"
HANGUL_SOURCE = "rendered type: Noto Sans KR (rendercv-fonts) and Kurinto Sans KR (weblate-fonts), both OFL"

FAMILIES = {  # family: file patterns below the unpacked packages
    "DejaVu Sans": ["matplotlib/**/DejaVuSans.ttf", "matplotlib/**/DejaVuSans-*.ttf"],
    "DejaVu Sans Mono": ["matplotlib/**/DejaVuSansMono*.ttf"],
    "DejaVu Serif": ["matplotlib/**/DejaVuSerif.ttf", "matplotlib/**/DejaVuSerif-*.ttf"],
    "STIX": ["matplotlib/**/STIXGeneral*.ttf"],
    "Fira Sans": ["mplhep-data/**/FiraSans-*.ttf"],
    "Fira Mono": ["mplhep-data/**/FiraMono-*.ttf"],
    "Latin Modern Roman": ["mplhep-data/**/lmroman[!c]*.otf"],
    "Latin Modern Sans": ["mplhep-data/**/lmsans*.otf"],
    "TeX Gyre Heros": ["mplhep-data/**/texgyreheros*.otf"],
    "TeX Gyre Termes": ["mplhep-data/**/texgyretermes*.otf"],
    "EB Garamond": ["rendercv-fonts/**/EBGaramond-*.ttf"],
    "Gentium Book Plus": ["rendercv-fonts/**/GentiumBookPlus-*.ttf"],
    "Lato": ["rendercv-fonts/**/Lato-*.ttf"],
    "Mukta": ["rendercv-fonts/**/Mukta-*.ttf"],
    "Noto Sans": ["rendercv-fonts/**/NotoSans-*.ttf"],
    "Open Sans": ["rendercv-fonts/**/OpenSans-*.ttf"],
    "Open Sauce Sans": ["rendercv-fonts/**/OpenSauceSans-*.ttf"],
    "Poppins": ["rendercv-fonts/**/Poppins-*.ttf"],
    "Raleway": ["rendercv-fonts/**/Raleway-*.ttf"],
    "Roboto": ["rendercv-fonts/**/Roboto-*.ttf"],
    "Source Code Pro": ["weblate-fonts/**/ttf/SourceCodePro-*.ttf"],
    "Source Sans 3": ["rendercv-fonts/**/SourceSans3-*.ttf", "weblate-fonts/**/ttf/SourceSans3-*.ttf"],
    "Ubuntu": ["rendercv-fonts/**/Ubuntu-*.ttf"],
    "XCharter": ["rendercv-fonts/**/XCharter-*.otf"],
    "Kurinto Sans": ["weblate-fonts/**/KurintoSans-*.ttf"],
}
TEST_FAMILIES = {
    "DejaVu Serif",
    "EB Garamond",
    "Fira Mono",
    "Open Sauce Sans",
    "Raleway",
    "TeX Gyre Heros",
    "Ubuntu",
    "XCharter",
}

UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ACCENTED = "ÀÁÂÃÄÅĀĄÇĆČĎÈÉÊËĒĘĚÌÍÎÏĪÑŃŇÒÓÔÕÖØŌŐŘŚŠŤÙÚÛÜŮŰÝŸŹŻŽàáâãäåāąçćčèéêëēęñńňòóôõöøōőřśšùúûüůűýÿźżž"
GREEK = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩαβγδεζηθικλμνξοπρσςτυφχψω"
CYRILLIC = "АБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдежзийклмнопрстуфхцчшщъыьэюя"
SYMBOLS = "0123456789!?&@#$%*()[]{}/\\<>=+-.,:;'\"^_~§©€£¥¿«»±†"
LETTER_TASKS = [  # name, title, characters, pixels
    ("latin_upper", "Latin capitals", UPPER, 28),
    ("latin_lower", "Latin small letters", UPPER.lower(), 28),
    ("latin_accents", "Accented Latin letters", ACCENTED[:64], 32),
    ("greek", "Greek letters", GREEK, 28),
    ("cyrillic", "Cyrillic letters", CYRILLIC, 32),
    ("symbols", "Digits and symbols", SYMBOLS, 28),
]

CONCEPTS = {  # class of the held-out icon task: words of an icon's name that stand for it
    "align": ["align"],
    "arrow": ["arrow", "arrows"],
    "battery": ["battery"],
    "book": ["book"],
    "briefcase": ["briefcase"],
    "calendar": ["calendar"],
    "camera": ["camera"],
    "car": ["car"],
    "card": ["card"],
    "chart": ["chart"],
    "chevron": ["chevron", "caret"],
    "clock": ["clock", "time", "timer"],
    "cloud": ["cloud"],
    "eye": ["eye"],
    "file": ["file"],
    "filter": ["filter"],
    "folder": ["folder"],
    "gear": ["cog", "gear", "settings"],
    "hand": ["hand"],
    "heart": ["heart"],
    "home": ["home", "house"],
    "image": ["image", "picture"],
    "lock": ["lock"],
    "magnifier": ["search", "magnify", "magnifying"],
    "map": ["map"],
    "message": ["chat", "message", "comment"],
    "pen": ["edit", "pencil", "pen"],
    "person": ["user", "users", "account", "person"],
    "phone": ["phone"],
    "play": ["play"],
    "question": ["question"],
    "shield": ["shield"],
    "star": ["star"],
    "table": ["table"],
    "video": ["video"],
    "wifi": ["wifi"],
}
TEST_ICON_SETS = {"remixicon", "fontawesome6", "elusiveicons"}


def quantised(image: Image.Image) -> np.ndarray:
    """Grey image to uint8 [1, H, W] with 16 levels (multiples of 17): smaller, and the eye sees no difference."""
    return ((np.asarray(image, dtype=np.uint16) + 8) // 17 * 17).astype(np.uint8)[None]


@lru_cache(maxsize=4096)
def _font(path: Path, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def render(path: Path, texts: list[str], pixels: int, baseline: bool = True) -> dict[str, np.ndarray]:
    """Render ``texts`` with a font, each to uint8 [1, pixels, pixels], centred, two pixels of margin.

    With ``baseline`` one scale and one base line serve all texts (a text too wide is shrunk); without, each fills the
    box.
    """
    reference = 200
    boxes = {text: _font(path, reference).getbbox(text, anchor="ls") for text in texts}
    boxes = {text: box for text, box in boxes.items() if box[2] > box[0] and box[3] > box[1]}
    if not boxes:
        return {}
    top, bottom = min(b[1] for b in boxes.values()), max(b[3] for b in boxes.values())
    room, images = pixels - 4, {}
    for text, (left, upper, right, lower) in boxes.items():
        if not baseline:
            top, bottom = upper, lower
        scale = min(room / (bottom - top), room / (right - left))
        image = Image.new("L", (pixels, pixels))
        x, y = (pixels - (left + right) * scale) / 2, (pixels - (top + bottom) * scale) / 2
        ImageDraw.Draw(image).text((x, y), text, fill=255, font=_font(path, round(reference * scale, 2)), anchor="ls")
        if np.asarray(image).max() > 127:
            images[text] = quantised(image)
    return images


def font_files(root: Path) -> list[tuple[str, Path]]:
    """(family, file) of every text font, in a fixed order."""
    return [
        (family, path)
        for family, patterns in FAMILIES.items()
        for path in sorted({p for pattern in patterns for p in root.glob(pattern)})
    ]


@cache
def covered(path: Path) -> frozenset[int]:
    """Code points that a font has glyphs for."""
    with TTFont(path, lazy=True) as font:
        return frozenset(font.getBestCmap() or ())


def letters(root: Path) -> list[Draft]:
    """One task for each alphabet; font families are divided between training and test."""
    drafts = []
    for name, title, characters, pixels in LETTER_TASKS:
        draft = Draft(name, "train", title, FONT_SOURCE, list(characters))
        for family, path in font_files(root):
            present = [c for c in characters if ord(c) in covered(path)]
            images = render(path, present, pixels)
            draft.candidates += [(image, characters.index(c), family in TEST_FAMILIES) for c, image in images.items()]
        drafts.append(draft)
    return drafts


def typefaces(root: Path, count: int = 400) -> Draft:
    """Which family set these two letters? Training and test use different letters; ``count`` pairs a family."""
    letters_all = list(UPPER + UPPER.lower())
    rng = random.Random("typefaces")
    rng.shuffle(letters_all)
    draft = Draft("typefaces", "train", "Typeface of two letters", FONT_SOURCE, list(FAMILIES))
    for index, family in enumerate(FAMILIES):
        files = [path for name, path in font_files(root) if name == family]
        for number in range(count):
            test = number % 4 == 3
            pool = letters_all[:14] if test else letters_all[14:]
            text = "".join(rng.sample(pool, 2))
            images = render(files[number % len(files)], [text], 64)
            draft.candidates += [(image, index, test) for image in images.values()]
    return draft


def hangul(root: Path, count: int = 400) -> Draft:
    """Which consonant begins this Korean syllable? Its vowel and final decide the split (588 pairs)."""
    initials: list[str] = [*"g kk n d tt r m b pp s ss (silent) j jj ch k t p h".split()]
    patterns = ["rendercv-fonts/**/NotoSansKR-*.ttf", "weblate-fonts/**/KurintoSansKR-*.ttf"]
    files = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    rng = random.Random("hangul")
    rests = list(range(588))
    rng.shuffle(rests)
    draft = Draft("hangul", "target", "First consonant of a Korean syllable", HANGUL_SOURCE, initials)
    for index in range(len(initials)):
        for number in range(count):
            test = number % 4 == 3
            rest = rng.choice(rests[:118] if test else rests[118:])
            text = chr(0xAC00 + index * 588 + rest)
            images = render(rng.choice(files), [text], 32, baseline=False)
            draft.candidates += [(image, index, test) for image in images.values()]
    return draft


def icon_names(root: Path) -> list[tuple[str, Path, str, int]]:
    """(icon font, file, icon name, code point) of every icon, aliases removed; versions kept twice are read once."""
    icons = []
    for charmap in sorted(root.glob("qtawesome/**/*-charmap-*.json")):
        font = charmap.name.split("-")[0]
        if font in ("materialdesignicons5", "fontawesome5"):
            continue
        path = charmap.with_name(charmap.name.replace("-charmap", "").replace(".json", ".ttf"))
        seen = set()
        for name, code in json.loads(charmap.read_text()).items():
            point = int(code, 16)
            if point not in seen and point in covered(path):
                seen.add(point)
                icons.append((font, path, name, point))
    return icons


def _words(name: str) -> list[str]:
    return re.split("[-_.]", name)


def _concept(name: str) -> set[str]:
    return {concept for concept, words in CONCEPTS.items() if set(words) & set(_words(name))}


def icon_concepts(root: Path) -> Draft:
    """What does this icon mean? Icon sets are divided between training and test."""
    draft = Draft("icon_concepts", "target", "Meaning of an icon", ICON_SOURCE, list(CONCEPTS))
    for font, path, name, point in icon_names(root):
        concepts = _concept(name)
        if len(concepts) == 1:
            index = draft.classes.index(concepts.pop())
            images = render(path, [chr(point)], 32, baseline=False)
            draft.candidates += [(image, index, font in TEST_ICON_SETS) for image in images.values()]
    return draft


def _style(font: str, path: Path, name: str) -> str | None:
    """The class of `icon_styles`: the set, and its weight where it has several."""
    words = _words(name)
    if font == "phosphor":
        return "Phosphor " + (words[-1] if words[-1] in ("thin", "light", "bold", "fill") else "regular")
    if font == "remixicon":
        return f"Remix {words[-1]}" if words[-1] in ("line", "fill") else None
    if font == "materialdesignicons6":
        return "Material outline" if "outline" in words else "Material filled"
    if font == "fontawesome6":
        return {"brands": "Font Awesome brands", "solid": "Font Awesome solid"}.get(path.name.split("-")[1])
    return {"codicon": "Codicons", "elusiveicons": "Elusive"}.get(font)


def icon_styles(root: Path) -> Draft:
    """Which set and weight drew this icon? The name's first word decides the split; no concept of `icon_concepts`."""
    draft = Draft("icon_styles", "train", "Drawing style of an icon", ICON_SOURCE, [])
    for font, path, name, point in icon_names(root):
        style = _style(font, path, name)
        if style is None or _concept(name):
            continue
        if style not in draft.classes:
            draft.classes.append(style)
        test = random.Random(_words(name)[0]).random() < 0.2
        images = render(path, [chr(point)], 32, baseline=False)
        draft.candidates += [(image, draft.classes.index(style), test) for image in images.values()]
    return draft
