"""Small image tasks for tests: a few pixels, a few classes, learnable."""

import torch
from torch import nn

from cts_fast.data import ImageSet, Task


def make_task(
    name: str, *, classes: int = 4, channels: int = 1, images: int = 60, role: str = "train", seed: int = 0
) -> Task:
    """Noisy copies of one random 8 x 8 picture per class."""
    generator = torch.Generator().manual_seed(seed)
    pictures = 255 * torch.rand(classes, channels, 8, 8, generator=generator)

    def draw(count: int) -> ImageSet:
        labels = torch.arange(count) % classes
        noise = 60 * torch.randn(count, channels, 8, 8, generator=generator)
        return ImageSet((pictures[labels] + noise).clamp(0, 255).byte(), labels)

    return Task(
        name, draw(images), draw(images // 2), tuple(map(str, range(classes))), channels == 3, role, name, "test"
    )


def make_suite(root=None, names=None) -> dict[str, Task]:
    """Three tasks to meta-train on and two held-out ones, in the form of a suite's loader."""
    tasks = [
        make_task("stripes"),
        make_task("dots", classes=6, channels=3, seed=1),
        make_task("waves", classes=5, images=80, seed=2),
        make_task("rings", role="target", seed=3),
        make_task("stars", classes=3, channels=3, role="target", seed=4),
    ]
    return {task.name: task for task in tasks if names is None or task.name in names}


def with_dropout(num_classes: int) -> nn.Module:
    """A network that draws random numbers while it trains, for `--model support.image_tasks:with_dropout`."""
    side = 16  # as every preset of the built-in suite has it
    return nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * side * side, 8), nn.Dropout(0.5), nn.Linear(8, num_classes)
    )
