"""Images mapped from the cache, or decoded by workers: the same as in memory, whole or not at all, and small."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from support.image_tasks import make_task

from cts_fast.baselines import METHODS
from cts_fast.data import DamagedFile, ImageSet, Task
from cts_fast.data.cache import hold, mapped, open_mapped
from cts_fast.data.images import DecodedImages, MappedImages, Samples
from cts_fast.experiments.batches import TaskBatches, draw_together
from cts_fast.experiments.meta_test import MetaTester, MetaTestSettings
from cts_fast.experiments.meta_train import MetaTrainer, MetaTrainSettings
from cts_fast.models.resnet20 import ResNet20


def samples(count=20, side=8, key="a"):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Samples(pixels, torch.arange(count) % 4, key=key)


def in_memory(part):
    return torch.from_numpy(part.items.transpose(0, 3, 1, 2).copy())


SLOW = """
import sys, time, torch, numpy as np
from pathlib import Path
from cts_fast.data import cache
from cts_fast.data.images import Samples
class Slow:
    def __getitem__(self, i):
        time.sleep(0.01)
        return np.full((8, 8, 3), i, np.uint8)
cache.CHUNK = 10
cache.mapped("slow", Samples(Slow(), torch.arange(100), key="slow"), 8, 3, Path(sys.argv[1]))
"""


class Uniform:
    """What `SLOW` decodes."""

    def __getitem__(self, i):
        return np.full((8, 8, 3), i, np.uint8)


@pytest.fixture
def slow(tmp_path):
    """Another process that is half-way in decoding 100 images."""
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*.part/images.npy")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


def open_slow(folder, items):
    return mapped("slow", Samples(items, torch.arange(100), key="slow"), 8, 3, folder)[0][:][:, 0, 0, 0].tolist()


def test_of_two_processes_one_decodes_and_the_other_waits_for_it(slow, tmp_path, capfd):
    assert open_slow(tmp_path, items=None) == list(range(100))  # nothing to decode here
    assert "waiting: slow is being decoded by another process" in capfd.readouterr().err
    assert slow.wait() == 0
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_after_a_kill_half_way_the_next_process_makes_it_whole(slow, tmp_path, capfd):
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert left.suffix == ".part"
    assert open_slow(tmp_path, Uniform()) == list(range(100))
    said = capfd.readouterr().err
    assert "decoding slow" in said and "waiting" not in said
    assert not left.exists()
    assert open_slow(tmp_path, items=None) == list(range(100))


def test_another_size_version_or_file_is_another_entry(tmp_path):
    def entries():
        return len([path for path in tmp_path.joinpath("cache").iterdir() if path.is_dir()])

    image = tmp_path / "image.png"
    from PIL import Image

    def open_(size=8, level=1):
        if level:
            Image.new("RGB", (8, 8), (level, level, level)).save(image)
            os.utime(image, (level, level))
        return mapped("x", Samples([str(image)], torch.zeros(1).long()), size, 3, tmp_path / "cache")[0][0].max()

    assert (open_(level=1), entries()) == (1, 1)
    assert (open_(level=0), entries()) == (1, 1)
    assert (open_(size=9, level=0), entries()) == (1, 2)
    assert (open_(level=2), entries()) == (2, 3)


def test_equal_files_at_two_places_are_two_entries(tmp_path):
    from PIL import Image

    for level in (1, 2):
        folder = tmp_path / str(level)
        folder.mkdir()
        Image.new("RGB", (8, 8), (level, level, level)).save(folder / "a.ppm")
        os.utime(folder / "a.ppm", (9, 9))
        part = Samples([str(folder / "a.ppm")], torch.zeros(1).long())
        assert mapped("x", part, 8, 3, tmp_path / "cache")[0][0].max() == level


def test_a_file_that_is_gone_since_it_was_found_is_named(tmp_path):
    with pytest.raises(DamagedFile, match="gone.png is gone since it was found: replace the file"):
        mapped("x", Samples([str(tmp_path / "gone.png")], torch.zeros(1).long()), 8, 3, tmp_path)


def test_long_titles_have_entries_of_their_own(tmp_path):
    titles = ["ü" * 100 + end for end in ("a" * 40, "a" * 41, "b" * 40)]
    for number, title in enumerate(titles * 2):
        images, _ = mapped(
            title, Samples(samples().items[number % 3 :][:1], torch.zeros(1).long(), key="1"), 8, 3, tmp_path
        )
        assert torch.equal(images[0], mapped("x", samples(), 8, 3, tmp_path)[0][number % 3])
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 4


def test_a_damaged_entry_is_named(tmp_path):
    images, _ = mapped("x", samples(), 8, 3, tmp_path)
    whole = images.path.read_bytes()
    for content in (whole[:-10], whole[:40], b"", np.lib.format.magic(1, 0)):
        images.path.write_bytes(content)
        with pytest.raises(DamagedFile, match="damaged.*delete this folder"):
            mapped("x", samples(), 8, 3, tmp_path)
    images.path.write_bytes(whole)
    with pytest.raises(DamagedFile, match=r"they are uint8 \(20, 3, 8, 8\)"):
        open_mapped(images.path.parent, (20, 3, 9, 9))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--cache-dir.*file"):
        mapped("x", samples(), 8, 3, tmp_path / "file")


def test_an_image_that_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    part = Samples([str(tmp_path / "bad.jpg")], torch.zeros(1).long())
    with pytest.raises(DamagedFile, match="bad.jpg"):
        mapped("x", part, 8, 3, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_above_the_limit_workers_decode_and_nothing_is_written(tmp_path):
    parts = (samples(), samples(10))
    bytes_ = 30 * 3 * 8 * 8
    (images, _), _ = hold("x", parts, 8, 3, tmp_path / "a", bytes_)
    assert isinstance(images, MappedImages)
    (images, labels), _ = hold("x", parts, 8, 3, tmp_path / "b", bytes_ - 1)
    assert isinstance(images, DecodedImages) and not (tmp_path / "b").exists()
    assert torch.equal(labels, parts[0].labels)


@pytest.fixture(params=["mapped", "decoded"])
def lazy(request, tmp_path):
    part = samples()
    kept = mapped("x", part, 8, 3, tmp_path)[0] if request.param == "mapped" else DecodedImages(part, 8, 3)
    return kept, in_memory(part), part.labels


def test_indexing_reads_what_a_tensor_would(lazy):
    images, expected, _ = lazy
    assert images.shape == expected.shape and len(images) == 20 and images.nbytes == expected.nbytes
    for index in (3, -1, slice(5, 9), slice(None), torch.tensor([7, 7, 0]), torch.arange(20) % 3 == 0):
        assert torch.equal(images[index], expected[index])
    some = images.select(torch.tensor([4, 2, 9]))
    assert torch.equal(some[:], expected[[4, 2, 9]]) and torch.equal(some.select(torch.tensor([2]))[0], expected[9])
    images[0].zero_()
    assert torch.equal(images[0], expected[0])  # what is handed out is a copy


@pytest.mark.parametrize("size", [None, 6])
def test_batches_are_those_of_images_in_memory_bit_for_bit(lazy, size):
    images, expected, labels = lazy
    part = torch.tensor([3, 19, 4, 7, 0, 11, 12])
    options = {"seed": 1, "part": part, "size": size, "padding": 2, "flip": True}
    here, there = TaskBatches(images, labels, 5, **options), TaskBatches(expected, labels, 5, **options)
    for _ in range(4):
        for a, b in zip(next(here), next(there), strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()
    # a state tells of what was taken, not of what was read ahead; it fits either kind
    again = TaskBatches(images, labels, 5, **options)
    again.load_state_dict(there.state_dict())
    for _ in range(3):
        x = next(here)[0]
        assert torch.equal(x, next(there)[0]) and torch.equal(x, next(again)[0])
        again.load_state_dict(here.state_dict())


def test_training_and_testing_are_those_of_images_in_memory_bit_for_bit(lazy):
    images, expected, labels = lazy
    losses, accuracies = [], []
    for kept in (images, expected):
        own = Task("own", ImageSet(kept, labels), ImageSet(kept, labels), ("a", "b", "c", "d"), True, "train", "", "")
        settings = MetaTrainSettings(horizon=2, rounds=1, batch_size=4, padding=1, held_back=0.2)
        trainer = MetaTrainer(
            METHODS["fomaml"], [own, make_task("b")], settings, make_net=ResNet20, meta_lr=0.1, seed=0
        )
        losses.append(torch.stack([trainer.train_step() for _ in range(2)]))
        tester = MetaTester(own, MetaTestSettings(steps=2, images=8, batch_size=4, padding=1), make_net=ResNet20)
        accuracies.append(tester.accuracy({}, seed=0))
    assert torch.equal(*losses) and accuracies[0] == accuracies[1]


def test_a_graph_is_refused_images_that_are_not_on_the_device(lazy):
    images, _, labels = lazy
    own = Task("own", ImageSet(images, labels), ImageSet(images, labels), ("a", "b", "c", "d"), True, "train", "", "")
    settings = MetaTrainSettings(horizon=2, rounds=1, batch_size=4)
    with pytest.raises(ValueError, match="own: a CUDA graph needs images on the GPU"):
        MetaTrainer(METHODS["cts"], [own], settings, make_net=ResNet20, meta_lr=0.1, seed=0, capture=True)


def test_a_datasets_images_are_read_once_and_kept(tmp_path):
    class Data:
        classes = ("even", "odd")
        reads = 0

        def __len__(self):
            return 6

        def __getitem__(self, i):
            Data.reads += 1
            return torch.full((3, 8, 8), i / 255), i % 2

    tasks = [
        Task.from_datasets("own", Data(), Data(), size=8, cache=cache, version=version)
        for cache, version in ((None, "1"), (tmp_path, "1"), (tmp_path, "1"), (tmp_path, "2"))
    ]
    assert Data.reads == 12 * 3
    for task in tasks:
        assert task.classes == ("even", "odd") and task.role == "train"
        assert task.train.images[:][:, 0, 0, 0].tolist() == list(range(6))
        assert task.test.labels.tolist() == [0, 1] * 3


def test_private_memory_does_not_grow_with_the_number_of_images(tmp_path):
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's /proc")
    code = """
import sys, torch, numpy as np
from pathlib import Path
from cts_fast.data.images import MappedImages
from cts_fast.experiments.batches import TaskBatches
torch.set_num_threads(1)
path, count = Path(sys.argv[1]), 16_000
with open(path, "wb") as file:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, 3, 64, 64)})
    file.truncate(file.tell() + count * 3 * 64 * 64)
stream = TaskBatches(MappedImages(path), torch.zeros(count, dtype=torch.int64), 100, seed=0, padding=0)
for step in range(1, 161):
    next(stream)
    if step in (20, 160):
        print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssFile"))))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "images.npy")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    few, few_file, many, many_file = (int(number) / 1024 for number in told)  # MB
    assert many_file - few_file > 60  # the rest of 197 MB was read
    assert many - few < 10


def test_draws_of_lazy_and_other_tasks_lie_together(lazy):
    images, expected, labels = lazy
    streams = [TaskBatches(kept, labels, 4, seed=0) for kept in (images, expected)]
    for _ in range(7):
        drawn = draw_together(streams)
        assert torch.equal(drawn[0], drawn[1])
