"""Contact sheet of a suite: ``python -m cts_fast.data.show [--out FILE.png] [--tasks A,B,...]``.

One block per task: its name, what it asks, size, number of classes and images, and samples in columns by class (20
columns at most). Needs matplotlib (the extra ``[examples]``).
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.data import Storage, Task, load_suite

ROLES = {"train": "meta-training", "target": "held out", "": "no role"}
COLUMNS, ROWS, CELL = 20, 3, 34  # images across, images down, pixels of a cell


def samples(task: Task) -> tuple[Tensor, list[tuple[float, str]]]:
    """Tile [ROWS * CELL, width, 3] (uint8), and for each class shown the place of its middle (pixels) and its name.

    Classes are spread over all of the task's; few classes get several columns each. The last row holds test images.
    """
    classes = len(task.classes)
    shown = torch.linspace(0, classes - 1, min(COLUMNS, classes)).round().long().tolist()
    each = COLUMNS // len(shown)
    tile = torch.full((ROWS * CELL, len(shown) * each * CELL, 3), 255, dtype=torch.uint8)
    for place, label in enumerate(shown):
        members = [(part.labels == label).nonzero().squeeze(1).tolist() for part in (task.train, task.test)]
        for column in range(place * each, (place + 1) * each):
            for row in range(ROWS):
                test = row == ROWS - 1
                if not members[test]:  # a small class
                    continue
                image = (task.test if test else task.train).images[members[test].pop(0)]
                if image.shape[-1] > CELL:
                    image = torch.nn.functional.interpolate(image[None].float(), size=CELL - 2, mode="area")[0].byte()
                height, width = image.shape[1:]
                y, x = row * CELL + (CELL - height) // 2, column * CELL + (CELL - width) // 2
                tile[y : y + height, x : x + width] = image.permute(1, 2, 0).expand(-1, -1, 3)
    return tile, [((place + 0.5) * each * CELL, task.classes[label]) for place, label in enumerate(shown)]


def sheet(tasks: dict[str, Task], path: Path) -> None:
    """Write the contact sheet of ``tasks`` as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.3, 0.6 + 2.15 * len(tasks)), dpi=110, layout="constrained")
    axes = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axis, task in zip(axes, tasks.values(), strict=True):
        tile, names = samples(task)
        axis.imshow(tile.numpy(), interpolation="nearest")
        room = tile.shape[1] / len(names) / 4  # letters of a name before it touches the next one
        wide = max(len(name) for _, name in names) > room
        places = [place for place, _ in names]
        shown = [textwrap.shorten(name, 20, placeholder=" …") for _, name in names]
        turned = {"rotation": 20, "ha": "right"} if wide else {"rotation": 0, "ha": "center"}
        axis.set_xticks(places, shown, fontsize=8, rotation_mode="anchor", **turned)
        axis.set_anchor("W")
        axis.set_yticks([(row + 0.5) * CELL for row in range(ROWS)], ["train"] * (ROWS - 1) + ["test"], fontsize=8)
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
        channels, height, width = task.train.images.shape[1:]
        size = f"{height}×{width} {'colour' if channels == 3 else 'grey'}{', shown smaller' if height > CELL else ''}"
        axis.set_title(
            f"{task.name}: {task.title}  ({ROLES[task.role]}; {size}; {len(task.classes)} classes; "
            f"{len(task.train):,} training and {len(task.test):,} test images)",
            loc="left",
            fontsize=10,
        )
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    """The command line (``argv``: arguments, None for those of the process); exits with status 2 on bad ones."""
    summary = (__doc__ or "").partition("\n")[0]  # python -OO drops it
    parser = argparse.ArgumentParser(prog="python -m cts_fast.data.show", description=summary)
    parser.add_argument("--out", type=Path, default=Path("tasks.png"), help="PNG to write (default: %(default)s)")
    parser.add_argument("--suite", default="builtin", help="suite (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the suite's data")
    parser.add_argument("--partial", action="store_true", help="show data sets of which images are missing as they are")
    parser.add_argument(
        "--tasks", type=lambda names: names.split(","), metavar="A,B,...", help="tasks to show (default: all)"
    )
    arguments = parser.parse_args(argv)
    try:
        tasks = load_suite(arguments.suite, arguments.root, arguments.tasks, Storage(partial=arguments.partial))
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    sheet(tasks, arguments.out)
    print(f"wrote {arguments.out} ({len(tasks)} tasks)")


if __name__ == "__main__":
    main()
