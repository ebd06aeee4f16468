"""The paper's synthetic experiment (section 4.1, Figures 4 and 5): eight tasks in two dimensions, everything visible.

    python -m cts_fast.examples.synthetic

Meta-trains with continual trajectory shifting, with its exact counterpart and with Reptile, for equally many
meta-updates from the same starts, and scores each initialization by the task-average loss after 100 steps of Adam.
Nothing in it is random: the seed is only noted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cts_fast.baselines import METHODS
from cts_fast.examples import synthetic_figures
from cts_fast.examples.landscapes import Landscape, attractors, meta_train
from cts_fast.examples.synthetic_figures import HIGH, LOW
from cts_fast.experiments import study
from cts_fast.experiments.settings import LABELS

INNER = {"lr": 0.05, "momentum": 0.9, "meta_lr": 0.1}
HORIZON, ROUNDS = 100, 3
COMPARED = ("reptile", "cts", "cts-accurate")
START_AXIS = (-5.0, 5.0, 15.0)  # the scored starts are its square
REPTILE_HORIZONS = (5, 10, 25, 50, HORIZON)
MAP_SIDE, GRID_SIDE = 121, 15  # points a side of the quality map, and of the grid that Reptile starts from


def square(axis: Tensor) -> Tensor:
    """All points with both coordinates in the axis, [n², 2]."""
    return torch.cartesian_prod(axis, axis)


def quality_map(landscape: Landscape, advance=lambda: None) -> dict[str, Tensor]:
    """The points of the map, and their task-average losses after 1 … K steps of Adam, [K, MAP_SIDE²]."""
    points = square(torch.linspace(LOW, HIGH, MAP_SIDE, dtype=torch.float64, device=landscape.device))
    losses = []

    def keep(theta: Tensor) -> None:
        losses.append(landscape.losses(theta).mean(0))
        advance()

    landscape.quality(points, HORIZON, on_step=keep)
    return {"points": points, "losses": torch.stack(losses)}


def trajectories(
    landscape: Landscape, name: str, starts: Tensor, horizon: int, meta_updates: int, advance=lambda: None
) -> dict[str, Tensor]:
    """φ along meta-training, [updates + 1, S, 2], the quality of its end, [S], and all tasks' inner steps."""
    path, steps = meta_train(landscape, partial(METHODS[name], **INNER, horizon=horizon), starts, meta_updates, advance)
    return {
        "path": path,
        "quality": landscape.quality(path[-1]),
        "task_steps": torch.tensor(steps * landscape.num_tasks),
    }


def config(seed: int) -> dict:
    """What defines a run; nothing in it is drawn at random."""
    return {
        **INNER,
        "horizon": HORIZON,
        "rounds": ROUNDS,
        "starts": list(START_AXIS),
        "reptile_horizons": list(REPTILE_HORIZONS),
    }


def run(work: study.Study) -> str:
    """All stages, the figures and the files; returns the table."""
    updates = HORIZON * ROUNDS
    landscape = Landscape(work.device)
    scored = square(torch.tensor(START_AXIS, dtype=torch.float64, device=work.device))
    grid = square(torch.linspace(LOW, HIGH, GRID_SIDE, dtype=torch.float64, device=work.device))
    everywhere = torch.cat([scored, grid])

    background = work.stage("quality", HORIZON, partial(quality_map, landscape))
    runs = {
        name: work.stage(name, updates, partial(trajectories, landscape, name, scored, HORIZON, updates))
        for name in COMPARED
        if name != "reptile"
    }
    reptile = {
        k: work.stage(f"reptile-{k}", updates, partial(trajectories, landscape, "reptile", everywhere, k, updates))
        for k in REPTILE_HORIZONS
    }
    whole = reptile[HORIZON]
    runs["reptile"] = {
        "path": whole["path"][:, : len(scored)],
        "quality": whole["quality"][: len(scored)],
        "task_steps": whole["task_steps"],
    }
    runs = {name: runs[name] for name in COMPARED}

    rests = {k: attractors(one["path"][:, len(scored) :], LOW, HIGH) for k, one in reptile.items()}
    bias = short_horizon_bias(background)
    found = results(runs, reptile, scored, rests, bias)
    work.write(
        found,
        ("method", "horizon", "start_x", "start_y", "meta_update", "phi_x", "phi_y"),
        rows(runs, reptile, everywhere, updates),
        {"starts": scored, **{name: one["path"][-1] for name, one in runs.items()}},
    )
    quality = {k: one["quality"] for k, one in reptile.items()}
    synthetic_figures.figure_4(work.out / "figure-4.png", landscape, bias, quality, found["task_steps"])
    maps = {k: (reptile[k]["path"], rests[k]) for k in (5, HORIZON)}
    synthetic_figures.figure_5(work.out / "figure-5.png", background, maps, runs)
    return table(found)


def results(runs: dict, reptile: dict, scored: Tensor, rests: dict[int, Tensor], bias: Tensor) -> dict[str, Any]:
    """The content of results.json beside the config; a loss that is not finite becomes null."""
    finite = torch.stack([one["quality"] for one in runs.values()]).isfinite().all(0)
    return {
        "final_loss": {name: one["quality"][finite].mean().item() for name, one in runs.items()},
        "final_loss_by_start": {
            name: [x if math.isfinite(x) else None for x in one["quality"].tolist()] for name, one in runs.items()
        },
        "starts": scored.tolist(),
        "finite_for_all": finite.tolist(),
        "task_steps": {name: int(one["task_steps"]) for name, one in runs.items()},
        "attractors": {str(k): points.tolist() for k, points in rests.items()},
        "short_horizon_bias": {"k": list(range(1, HORIZON + 1)), "loss_after_100": bias.tolist()},
        "reptile_mean_loss": {str(k): _finite_mean(one["quality"]) for k, one in reptile.items()},
    }


def short_horizon_bias(background: dict[str, Tensor]) -> Tensor:
    """For each k: the task-average loss after K steps from what is best after k steps on the map, [K].

    The best hundredth of the square is averaged: a single best point of the map is too much a matter of chance.
    """
    losses = background["losses"].nan_to_num(torch.inf)
    best = losses.topk(losses.shape[1] // 100, largest=False).indices  # [K, n]
    return losses[-1][best].mean(1)


def rows(runs: dict, reptile: dict, everywhere: Tensor, updates: int) -> Iterator[tuple]:
    """The lines of metrics.csv: φ at every tenth meta-update of every trajectory that is still finite."""
    paths = [(name, HORIZON, runs[name]["path"]) for name in ("cts", "cts-accurate")]
    paths += [("reptile", k, one["path"]) for k, one in reptile.items()]
    for name, horizon, path in paths:
        for update in range(0, updates + 1, 10):
            for start, phi in zip(everywhere.tolist(), path[update].tolist(), strict=False):
                if all(map(math.isfinite, phi)):
                    yield name, horizon, *start, update, *phi


def table(found: dict[str, Any]) -> str:
    """The results in words and numbers."""
    losses, task_steps = found["final_loss"], found["task_steps"]
    starts, updates = sum(found["finite_for_all"]), HORIZON * ROUNDS
    places = ", ".join(f"k = {k}: {len(points)}" for k, points in found["attractors"].items())
    width = max(len(LABELS[name]) for name in losses)
    lines = [
        "",
        f"{'meta-trained with':<{width}}  final loss  inner steps, all",
        f"{'-' * width}  {'-' * 10}  {'-' * 16}",
    ]
    lines += [f"{LABELS[name]:<{width}}  {loss:10.2f}  {task_steps[name]:15,}" for name, loss in losses.items()]
    lines += [
        "",
        f"Final loss: mean over the 8 tasks after 100 steps of Adam from the initialization, and over the {starts} of",
        f"{len(START_AXIS) ** 2} starts from which every method stays finite; each made {updates} meta-updates.",
        f"Places in the square where Reptile with k inner steps comes to rest: {places}.",
    ]
    return "\n".join(lines)


def _finite_mean(values: Tensor) -> float:
    return values[values.isfinite()].mean().item()


def main(argv=None) -> int:
    """Runs the program; returns the exit status."""
    return study.main("cts_fast.examples.synthetic", __doc__, config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
