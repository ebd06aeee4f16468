"""Reduced copies of the real data sets, where a folder with them is named by CTS_FAST_DATA."""

import os
from pathlib import Path

import pytest
import torch

from cts_fast.data import DamagedFile, Storage, load_suite
from cts_fast.data.paper.suite import BY_NAME

EXPECTED = {  # training and test images, classes
    "tiny_imagenet_a": (8_000, 2_000, 100),
    "tiny_imagenet_b": (8_000, 2_000, 100),
    "fashion_mnist": (30_000, 10_000, 10),
    "stanford_cars": (6_509, 1_635, 196),
    "quickdraw": (57_615, 11_385, 345),
    "flowers": (1_434, 4_109, 102),
}


@pytest.fixture(scope="module")
def packs():
    if "CTS_FAST_DATA" not in os.environ:
        pytest.skip("CTS_FAST_DATA does not name a folder with reduced data sets")
    return Path(os.environ["CTS_FAST_DATA"])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_reduced_data_set_is_read_when_it_may_be_partial(packs, name):
    data = BY_NAME[name]
    if data.place(packs) is None:
        pytest.skip(f"{name} is not in {packs}")
    splits = data.find(packs, partial=True)
    assert (len(splits.train), len(splits.test), len(splits.classes)) == EXPECTED[name]
    with pytest.raises(DamagedFile, match="--partial"):
        data.find(packs)


def test_reduced_flowers_are_cached_and_read_again(packs, tmp_path):
    if BY_NAME["flowers"].place(packs) is None:
        pytest.skip(f"flowers is not in {packs}")
    storage = Storage(size=16, partial=True, cache=tmp_path)
    first, again = (load_suite("paper", packs, ["flowers"], storage)["flowers"] for _ in range(2))
    assert torch.equal(first.test.images[::100], again.test.images[::100])
    assert first.train.images[:200].float().std() > 30


@pytest.mark.parametrize(("folder", "classes"), [("gtsrb", 43), ("dtd/dtd/images", 10)])
def test_a_reduced_set_without_an_official_layout_is_a_folder_of_ones_own(packs, tmp_path, folder, classes):
    place = packs / folder
    if not place.is_dir():
        pytest.skip(f"{folder} is not in {packs}")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "own").symlink_to(place)
    task = load_suite("folder", tmp_path / "root", ["own"], Storage(size=16))["own"]
    assert len(task.classes) == task.train.labels.unique().numel() == classes and len(task.test) >= 200
