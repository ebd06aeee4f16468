"""Tiny data sets in the official layouts: an image's upper half shows its label as a colour, the lower one is black."""

import gzip
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from cts_fast.data.paper import imagenet


def pixels(label: int, side: int = 16, channels: int = 3) -> np.ndarray:
    """uint8 [side, side(, 3)]."""
    image = np.zeros((side, side, 3), np.uint8)
    image[: side // 2] = 20 * (label % 12) + 15, 20 * (label // 12) + 15, 200
    return image if channels == 3 else image[..., 0]


def labels_of(images: torch.Tensor) -> list[int]:
    """What images [N, C, S, S] show; asserts that they stand upright."""
    side = images.shape[-1]
    upper, lower = images[:, :, side // 4, side // 2].float(), images[:, :, -side // 4, side // 2]
    assert lower.max() < 40
    steps = ((upper - 15) / 20).round().int()
    return (steps[:, 0] + (12 * steps[:, 1] if images.shape[1] == 3 else 0)).tolist()


def jpeg(path: Path, label: int, side: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, side)).save(path, "JPEG", quality=100, subsampling=0)


def lines(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))


# Each builder writes below the data root; returns labels of the training and of the test images, in order.


def tiny_imagenet(root: Path, sort_val: bool = False) -> dict[str, tuple[list[int], list[int]]]:
    """102 classes, so that the second half has two; wnids.txt is not sorted."""
    folder = root / "tiny-imagenet-200"
    wnids = [f"n{10000000 + 7 * i}" for i in range(102)]
    lines(folder / "wnids.txt", reversed(wnids))
    lines(folder / "words.txt", (f"{wnid}\tword {i}" for i, wnid in enumerate(wnids)))
    annotations = []
    for i, wnid in enumerate(wnids):
        jpeg(folder / "train" / wnid / "images" / f"{wnid}_0.JPEG", i % 100)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        name = f"val_{101 - i}.JPEG"
        jpeg(folder / "val" / (wnid if sort_val else "images") / name, i % 100)
        annotations.append(f"{name}\t{wnid}\t0\t0\t9\t9")
    if not sort_val:
        lines(folder / "val" / "val_annotations.txt", annotations)
    return {"tiny_imagenet_a": (list(range(100)),) * 2, "tiny_imagenet_b": ([0, 1],) * 2}


def cifar(root: Path, fine: bool):
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True)

    def batch(name: str, labels: list[int]) -> list[int]:
        data = np.stack([pixels(label, 32).transpose(2, 0, 1).reshape(-1) for label in labels])
        content = {"data": data, "fine_labels" if fine else "labels": labels, "coarse_labels": [0] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(content))
        return labels

    names = [f"class {i}" for i in range(100 if fine else 10)]
    (folder / ("meta" if fine else "batches.meta")).write_bytes(
        pickle.dumps({"fine_label_names" if fine else "label_names": names})
    )
    if fine:
        return {"cifar100": (batch("train", [3, 99, 0]), batch("test", [1, 5]))}
    train = [label for i in range(1, 6) for label in batch(f"data_batch_{i}", [i, 9 - i])]
    return {"cifar10": (train, batch("test_batch", [7, 0]))}


def stanford_dogs(root: Path):
    folder = root / "stanford_dogs"
    breeds = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog"]
    told = {}
    for split, labels in (("train", [0, 2, 1, 2]), ("test", [1, 0, 2])):
        files = [f"{breeds[label]}/{breeds[label][:9]}_{split}{i}.jpg" for i, label in enumerate(labels)]
        for file, label in zip(files, labels, strict=True):
            jpeg(folder / "Images" / file, label, 20)
        cells = np.empty((len(files), 1), object)
        cells[:, 0] = files
        savemat(folder / f"{split}_list.mat", {"file_list": cells, "labels": np.array([[n + 1] for n in labels])})
        told[split] = labels
    return {"stanford_dogs": (told["train"], told["test"])}


def aircraft(root: Path):
    data = root / "fgvc-aircraft-2013b" / "data"
    variants = ["707-320", "A300B4", "Boeing 717"]
    lines(data / "variants.txt", variants)
    for split, labels in (("trainval", [2, 0, 1]), ("test", [1, 2])):
        lines(data / f"images_variant_{split}.txt", (f"{split}{i} {variants[n]}" for i, n in enumerate(labels)))
        for i, label in enumerate(labels):
            jpeg(data / "images" / f"{split}{i}.jpg", label)
    return {"aircraft": ([2, 0, 1], [1, 2])}


def cub(root: Path):
    folder = root / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    labels, is_train = [0, 1, 1, 0], [1, 0, 1, 0]
    paths = [f"{classes[label]}/image_{i}.jpg" for i, label in enumerate(labels)]
    for path, label in zip(paths, labels, strict=True):
        jpeg(folder / "images" / path, label)
    for name, values in (
        ("images", paths),
        ("image_class_labels", [label + 1 for label in labels]),
        ("train_test_split", is_train),
        ("classes", classes),
    ):
        lines(folder / f"{name}.txt", (f"{i} {value}" for i, value in enumerate(values, 1)))
    return {"cub": ([0, 1], [1, 0])}


def fashion_mnist(root: Path):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, labels in (("train", [4, 0, 9]), ("t10k", [2, 7])):
        images = np.stack([pixels(label, 28, 1) for label in labels]).tobytes()
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, len(labels), 28, 28) + images)
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))
    return {"fashion_mnist": ([4, 0, 9], [2, 7])}


def svhn(root: Path):
    (root / "svhn").mkdir(parents=True)
    for split, labels in (("train", [10, 1, 9]), ("test", [3, 10])):
        x = np.stack([pixels(label % 10, 32) for label in labels], -1)
        savemat(root / "svhn" / f"{split}_32x32.mat", {"X": x, "y": np.array([[label] for label in labels])})
    return {"svhn": ([0, 1, 9], [3, 0])}


def stanford_cars(root: Path, nested: bool = False):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.empty(3, object)
    names[:] = ["AM General Hummer", "Acura RL", "Acura TL"]
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    for split, labels in (("train", [0, 2, 1]), ("test", [1, 2])):
        told = np.empty(len(labels), dtype=[("class", object), ("fname", object)])
        for i, label in enumerate(labels):
            images = folder / f"cars_{split}"
            jpeg((images / f"cars_{split}" if nested else images) / f"0000{i}.jpg", label, 24)
            told[i] = (np.uint8(label + 1), f"0000{i}.jpg")
        path = folder / ("devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat")
        savemat(path, {"annotations": told})
    return {"stanford_cars": ([0, 2, 1], [1, 2])}


def quickdraw(root: Path):
    folder = root / "quickdraw" / "numpy_bitmap"
    folder.mkdir(parents=True)
    for name, label in (("The Eiffel Tower", 0), ("full_numpy_bitmap_The Mona Lisa", 2)):
        np.save(folder / f"{name}.npy", np.stack([pixels(label, 28, 1).reshape(-1)] * 12))
    return {"quickdraw": ([0] * 10 + [2] * 10, [0] * 2 + [2] * 2)}


def flowers(root: Path):
    folder = root / "flowers-102"
    labels = [101, 0, 50, 7, 7]
    for i, label in enumerate(labels, 1):
        jpeg(folder / "jpg" / f"image_{i:05d}.jpg", label)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[label + 1 for label in labels]])})
    savemat(
        folder / "setid.mat", {"trnid": np.array([[2, 1]]), "valid": np.array([[3, 4]]), "tstid": np.array([[5, 1]])}
    )
    return {"flowers": ([0, 101, 50, 7], [7, 101])}


def pets(root: Path):
    folder = root / "oxford-iiit-pet"
    breeds = ["Abyssinian", "american_bulldog"]
    for split, labels in (("trainval", [1, 0, 1]), ("test", [0, 1])):
        names = [f"{breeds[label]}_{split}{i}" for i, label in enumerate(labels)]
        lines(
            folder / "annotations" / f"{split}.txt",
            (f"{name} {label + 1} {label + 1} 1" for name, label in zip(names, labels, strict=True)),
        )
        for name, label in zip(names, labels, strict=True):
            jpeg(folder / "images" / f"{name}.jpg", label)
    return {"pets": ([1, 0, 1], [0, 1])}


def stl10(root: Path):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    lines(folder / "class_names.txt", (f"class {i}" for i in range(10)))
    for split, labels in (("train", [9, 0, 4]), ("test", [5, 5])):
        columns_first = np.stack([pixels(label, 96).transpose(2, 1, 0) for label in labels])
        (folder / f"{split}_X.bin").write_bytes(columns_first.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in labels))
    return {"stl10": ([9, 0, 4], [5, 5])}


def food(root: Path):
    folder = root / "food-101"
    classes = ["apple_pie", "waffles"]
    for split, count in (("train", 2), ("test", 1)):
        told = {name: [f"{name}/{split}{i}" for i in range(count)] for name in classes}
        (folder / "meta").mkdir(parents=True, exist_ok=True)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(told))
        for label, name in enumerate(classes):
            for path in told[name]:
                jpeg(folder / "images" / f"{path}.jpg", label)
    return {"food101": ([0, 0, 1, 1], [0, 1])}


def dtd(root: Path):
    folder = root / "dtd" / "dtd"
    classes = ["banded", "zigzagged"]
    for split in ("train", "val", "test"):
        lines(folder / "labels" / f"{split}1.txt", (f"{name}/{name}_{split}.jpg" for name in reversed(classes)))
        for label, name in enumerate(classes):
            jpeg(folder / "images" / name / f"{name}_{split}.jpg", label)
    return {"dtd": ([1, 0, 1, 0], [1, 0])}


def imagenet_groups(root: Path):
    told = {}
    for number, wnids in enumerate(imagenet.groups(), 1):
        for label, wnid in enumerate(wnids):
            jpeg(root / "imagenet" / "train" / wnid / f"{wnid}_1.JPEG", label, 8)
            jpeg(root / "imagenet" / "val" / wnid / f"ILSVRC2012_val_{number}{label:04d}.JPEG", label, 8)
        told[f"imagenet_{number}"] = (list(range(len(wnids))),) * 2
    return told


LAYOUTS: tuple[Callable[[Path], dict[str, tuple[list[int], list[int]]]], ...] = (
    tiny_imagenet,
    lambda root: cifar(root, fine=True),
    lambda root: cifar(root, fine=False),
    stanford_dogs,
    aircraft,
    cub,
    fashion_mnist,
    svhn,
    stanford_cars,
    quickdraw,
    flowers,
    pets,
    stl10,
    food,
    dtd,
    imagenet_groups,
)


def build_all(root: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Every data set of the paper; returns name to labels of training and test images."""
    return {name: labels for build in LAYOUTS for name, labels in build(root).items()}


def gzipped(path: Path) -> bytes:
    """Contents of a file, gzipped."""
    return gzip.compress(path.read_bytes())
