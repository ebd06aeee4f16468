"""Data for eight tasks beside the training that they feed: ``python -m benchmarks.data [--images N] [--out FILE]``.

Images of noise lie in mapped files at the sizes of the paper's eight tasks. Timed are batches of all tasks (read,
cropped, flipped, normalised) and whole training steps of eight ResNet20s on such batches, in turns. Before that,
private memory (RssAnon) is read after an epoch over more and more images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.common import machine
from cts_fast.baselines import METHODS
from cts_fast.data import ImageSet, Task
from cts_fast.data.images import MappedImages
from cts_fast.experiments.batches import TaskBatches, draw_together
from cts_fast.experiments.meta_train import MetaTrainer, MetaTrainSettings
from cts_fast.experiments.parallel import task_map
from cts_fast.models.resnet20 import ResNet20

TASKS = {  # name: (channels, side length, classes), section 4.2
    "tiny_imagenet_a": (3, 64, 100),
    "tiny_imagenet_b": (3, 64, 100),
    "cifar100": (3, 32, 100),
    "stanford_dogs": (3, 84, 120),
    "aircraft": (3, 84, 100),
    "cub": (3, 84, 200),
    "fashion_mnist": (1, 28, 10),
    "svhn": (3, 32, 10),
}
BATCH = 128
GROWTH = (1, 4, 16)  # times --images


def noise(path: Path, count: int, channels: int, side: int) -> MappedImages:
    """Images of noise in a .npy file."""
    import numpy as np

    shape = (count, channels, side, side)
    generator = np.random.default_rng(0)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for part in torch.arange(count).split(1000):
            file.write(generator.bytes(len(part) * channels * side * side))
    return MappedImages(path)


def tasks(folder: Path, count: int) -> list[Task]:
    """The eight tasks with so many training images each."""
    made = []
    for name, (channels, side, classes) in TASKS.items():
        images = ImageSet(noise(folder / f"{name}.npy", count, channels, side), torch.arange(count) % classes)
        made.append(Task(name, images, images, tuple(map(str, range(classes))), True, "train", name, "noise"))
    return made


def times(folder: Path, count: int, steps: int) -> dict[str, float]:
    """Seconds of the data of a step and of a whole step, median over `steps`."""
    settings = MetaTrainSettings(horizon=1000, rounds=1, batch_size=BATCH)
    seconds: dict[str, list[float]] = {"data": [], "step": []}
    with task_map("cpu") as map_tasks:
        trainer = MetaTrainer(
            METHODS["cts"], tasks(folder, count), settings, make_net=ResNet20, meta_lr=0.01, seed=0, map_tasks=map_tasks
        )
        for _ in range(steps + 1):  # the first is not counted
            start = perf_counter()
            drawn = draw_together(trainer.batches)
            map_tasks(lambda stream, draw: stream.batch(draw), trainer.batches, drawn)
            seconds["data"].append(perf_counter() - start)
            start = perf_counter()
            trainer.train_step()
            seconds["step"].append(perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def private_megabytes() -> float:
    """This process's RssAnon (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in status if line.startswith("RssAnon"))


def memory(folder: Path, count: int) -> list[dict[str, float]]:
    """Private memory after an epoch over 64-pixel images, by their number."""
    found = []
    for images in (count, *(factor * count for factor in GROWTH)):  # the first one warms up
        stream = TaskBatches(noise(folder / "growing.npy", images, 3, 64), torch.zeros(images).long(), BATCH, seed=0)
        for _ in range(-(-images // BATCH)):
            next(stream)
        found.append({"images": images, "MB of images": images * 3 * 64 * 64 / 1e6, "MB private": private_megabytes()})
    return found[1:]


def main() -> None:
    """The command line."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=summary)
    parser.add_argument("--images", type=int, default=2000, help="of each task (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        grown = memory(Path(folder), arguments.images)
        seconds = times(Path(folder), arguments.images, arguments.steps)
    factor = (seconds["step"] - seconds["data"]) / seconds["data"]
    print(f"{torch.get_num_threads()} threads, 8 tasks, batch {BATCH}, median of {arguments.steps} steps:")
    print(f"  data {1e3 * seconds['data']:.1f} ms, whole step {1e3 * seconds['step']:.0f} ms: ", end="")
    print(f"data are {factor:.0f} times as fast as the training that they feed")
    for row in grown:
        print("  " + ", ".join(f"{value:,.0f} {name}" for name, value in row.items()))
    if arguments.out:
        told = {"machine": machine.describe(), "seconds": seconds, "times as fast": factor, "memory": grown}
        arguments.out.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
