"""Tasks of photographs: Fashion-MNIST, and patches cropped from photographs (builder only).

A patch task asks from which photograph a patch comes. Each photograph is divided into blocks of 64 pixels; a fifth of
the blocks is for test. No training patch contains a pixel of a test block, and test patches lie inside test blocks.
"""

from __future__ import annotations

import bz2
import gzip
import pickle
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cts_fast.data import archive
from cts_fast.data.build.assemble import Draft, capped, describe, distinct

SKIMAGE = "scikit-image/skimage/data/"
SKLEARN = "scikit-learn/sklearn/datasets/images/"
SCIPY = "scipy/scipy/misc/"
WALLPAPERS = "lomiri-wallpapers-16.04/usr/share/backgrounds/"
PATCH_TASKS = {  # name: (role, title, source, channels, {class: file})
    "photos": (
        "train",
        "Patches of nine colour photographs",
        "photographs in scikit-image (public domain, CC0) and scikit-learn (CC BY 2.0: danielbuechele, vultilion)",
        3,
        {
            "astronaut": SKIMAGE + "astronaut.png",
            "cat": SKIMAGE + "chelsea.png",
            "coffee": SKIMAGE + "coffee.png",
            "stained tissue": SKIMAGE + "ihc.png",
            "galaxies": SKIMAGE + "hubble_deep_field.jpg",
            "retina": SKIMAGE + "retina.jpg",
            "rocket": SKIMAGE + "rocket.jpg",
            "pavilion": SKLEARN + "china.jpg",
            "dahlia": SKLEARN + "flower.jpg",
        },
    ),
    "textures": (
        "train",
        "Patches of eight grey photographs",
        "photographs in scikit-image (public domain, CC0, no known restrictions) and scipy (public domain)",
        1,
        {
            "brick": SKIMAGE + "brick.png",
            "grass": SKIMAGE + "grass.png",
            "gravel": SKIMAGE + "gravel.png",
            "cameraman": SKIMAGE + "camera.png",
            "coins": SKIMAGE + "coins.png",
            "handwriting": SKIMAGE + "text.png",
            "staircase": SCIPY + "ascent.dat",
            "raccoon": SCIPY + "face.dat",
        },
    ),
    "scenes": (
        "target",
        "Patches of nine other colour photographs",
        "photographs in lomiri-wallpapers (CC BY 4.0: "
        "Aitzol Berasategi, Trevor Freespace, Jakub Mede; CC0: Clemens Engelhardt)",
        3,
        {
            "meadow": WALLPAPERS + "aitzgorri_by_Aitzol_Berasategi.jpg",
            "dogs": WALLPAPERS + "friends_by_Aitzol_Berasategi.jpg",
            "stream": WALLPAPERS + "life_by_Aitzol_Berasategi.jpg",
            "mountains": WALLPAPERS + "picosdeeuropa_by_Aitzol_Berasategi.jpg",
            "sunset": WALLPAPERS + "sunset_by_Aitzol_Berasategi.jpg",
            "fig": WALLPAPERS + "Picture_0B_by_freespace.jpg",
            "brushes": WALLPAPERS + "Picture_1A_by_freespace.jpg",
            "dandelion": WALLPAPERS + "seeding_by_Clements_Engelhardt.jpg",
            "drum": WALLPAPERS + "Wine_by_Jakkub_Mede.jpg",
        },
    ),
}
PIXELS, BLOCK, AREA = 32, 64, 448 * 320
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def fashion_mnist(root: Path) -> Draft:
    """Fashion-MNIST with its own division into training and test."""
    folder = root / "dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    draft = Draft(
        "fashion_mnist",
        "target",
        "Fashion-MNIST: articles of clothing",
        "Fashion-MNIST, Zalando SE (MIT), from Debian dataset-fashion-mnist",
        FASHION,
        flip=True,
    )
    for stem, test in (("train", False), ("t10k", True)):
        labels = np.frombuffer(gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes()), np.uint8)[8:]
        pixels = np.frombuffer(gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes()), np.uint8)[16:]
        images = pixels.reshape(-1, 1, 28, 28)
        draft.candidates += [(image, int(label), test) for image, label in zip(images, labels, strict=True)]
    return draft


def picture(path: Path, channels: int) -> np.ndarray:
    """A photograph as uint8 [C, h, w], reduced to at most `AREA` pixels."""
    if path.name == "face.dat":  # bare pixels behind bz2
        image = Image.fromarray(np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8).reshape(768, 1024, 3))
    elif path.name == "ascent.dat":  # a pickled list of rows, in a wheel of a fixed version
        image = Image.fromarray(np.array(pickle.loads(path.read_bytes()), np.uint8))
    else:
        image = Image.open(path)
    image = image.convert("RGB" if channels == 3 else "L")
    scale = min(1.0, (AREA / (image.width * image.height)) ** 0.5)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    array = np.array(image)
    return np.ascontiguousarray(array.transpose(2, 0, 1) if array.ndim == 3 else array[None])


def patch_corners(photo: np.ndarray, seed: str) -> list[tuple[int, int, bool]]:
    """(y, x, is test) of the patches of a photograph, flat ones left out."""
    _, height, width = photo.shape
    blocks = [(i, j) for i in range(height // BLOCK) for j in range(width // BLOCK)]
    random.Random(seed).shuffle(blocks)
    held_out = np.zeros((height, width), bool)
    for i, j in blocks[: max(2, len(blocks) // 5)]:
        held_out[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = True
    corners = []
    for y in range(0, height - PIXELS + 1, 4):
        for x in range(0, width - PIXELS + 1, 4):
            window = np.s_[y : y + PIXELS, x : x + PIXELS]
            share = held_out[window].mean()
            if share in (0, 1) and photo[(slice(None), *window)].std(axis=(1, 2)).max() >= 4:
                corners.append((y, x, share == 1))
    return corners


def patches(root: Path, name: str, train: int, test: int) -> tuple[dict, bytes]:
    """The member of a patch task: ``train`` and ``test`` patches a photograph, overlapping within a split."""
    role, title, source, channels, files = PATCH_TASKS[name]
    draft = Draft(name, role, title, source, list(files), flip=True)
    photos = [picture(root / file, channels) for file in files.values()]
    places = {}
    for index, photo in enumerate(photos):
        for y, x, is_test in patch_corners(photo, f"{name}/{index}"):
            patch = photo[:, y : y + PIXELS, x : x + PIXELS].copy()
            places.setdefault(patch.tobytes(), (index, y, x))
            draft.candidates.append((patch, index, is_test))
    chosen = capped(distinct(draft.candidates), train, test, name)
    corners = torch.tensor([places[patch.tobytes()] for patch, _, _ in chosen])
    labels = torch.tensor([label for _, label, _ in chosen])
    entry, data = archive.pack_crops([torch.from_numpy(p) for p in photos], corners, labels, PIXELS)
    return describe(draft, sum(not c[2] for c in chosen)) | entry, data
