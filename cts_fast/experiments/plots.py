"""The pictures of the image experiments, as PNG files; needs matplotlib (extra "examples")."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cts_fast.experiments.files import save_figure
from cts_fast.experiments.statistics import mean_and_interval

# Okabe and Ito's colours, which remain distinct to the colour-blind; one per method, the same in every figure.
_COLOURS = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D1F",
    "#5B3FA8",
    "#B0A000",
    "#4D4D4D",
    "#7A2048",
)
_SCRATCH = "#9A9A9A"
Layout = Literal["constrained", "compressed", "tight"]  # how matplotlib places the plots of a figure


def new_figure(rows: int, columns: int, width: float, height: float, layout: Layout = "constrained") -> tuple[Any, Any]:
    """A figure that no window shows, and its axes, [rows, columns]; inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _one_plot(width: float, height: float) -> tuple[Any, Any]:
    """A figure of one plot with lines across, and its axes."""
    figure, ((axes,),) = new_figure(1, 1, width, height)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def colours(methods: Sequence[str]) -> dict[str, str]:
    """Method to colour; `scratch` is grey."""
    named = [method for method in methods if method != "scratch"]
    return {"scratch": _SCRATCH} | {method: _COLOURS[i % len(_COLOURS)] for i, method in enumerate(named)}


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without bias at the start: the mean of values weighted by weight^age."""
    average, total, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append(average / total)
    return result


def convergence(
    path: Path, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], labels: Mapping[str, str]
) -> None:
    """Task-average training loss against inner steps: method to (steps, losses); smoothed, raw values behind."""
    figure, axes = _one_plot(7, 4.2)
    palette = colours(list(curves))
    for method, (steps, losses) in curves.items():
        axes.plot(steps, losses, color=palette[method], alpha=0.18, linewidth=0.8)
        smoothed = smooth(losses, 1 - 1 / max(1, len(losses) / 40))
        axes.plot(steps, smoothed, color=palette[method], linewidth=2, label=labels[method])
    axes.set_xlabel("inner steps of each task, all rounds together")
    axes.set_ylabel("training loss, mean over tasks")
    axes.set_title("Meta-training")
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    save_figure(path, figure)


def accuracy_vs_steps(
    path: Path, points: Mapping[str, Mapping[int, Sequence[float]]], scratch: Sequence[float], labels: Mapping[str, str]
) -> None:
    """Held-out accuracy against meta-training steps spent: method to step to accuracies (fractions, one per seed).

    Every curve begins at `scratch`, the random network after no meta-training at all.
    """
    figure, axes = _one_plot(7, 4.6)
    palette = colours(list(points))
    for i, (method, by_step) in enumerate(points.items()):
        by_step = {0: scratch, **by_step}
        steps = sorted(by_step)
        centres, halves = zip(*(mean_and_interval(by_step[step]) for step in steps), strict=True)
        aside = 0.006 * steps[-1] * (i - (len(points) - 1) / 2)  # or intervals would hide each other
        style = {"marker": "o", "markersize": 5, "linewidth": 2, "elinewidth": 1, "capsize": 3}
        x, y = [step + aside for step in steps], [100 * centre for centre in centres]
        axes.errorbar(x, y, _bars(halves), color=palette[method], label=labels[method], **style)
    centre, half = mean_and_interval(scratch)
    axes.axhline(100 * centre, color=_SCRATCH, linestyle="--", label=labels["scratch"])
    if math.isfinite(half):
        axes.axhspan(100 * (centre - half), 100 * (centre + half), color=_SCRATCH, alpha=0.15, linewidth=0)
    axes.set_xlabel("meta-training steps spent (inner steps of each task)")
    axes.set_ylabel("accuracy after fine-tuning, %")
    axes.set_title("Held-out tasks: mean accuracy, 95 % intervals")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(frameon=False, ncols=2 if len(points) < 6 else 4, loc="outside lower center")
    save_figure(path, figure)


def final_accuracy(
    path: Path, accuracy: Mapping[str, Mapping[str, Sequence[float]]], labels: Mapping[str, str]
) -> None:
    """Bars with 95 % intervals: method to held-out task to accuracies (fractions, one per seed)."""
    methods = list(accuracy)
    targets = list(accuracy[methods[0]])
    figure, axes = _one_plot(max(6.0, 1.2 + 0.32 * (len(methods) + 1) * len(targets)), 4.2 + 0.12 * len(methods))
    palette = colours(methods)
    width = 0.8 / len(methods)
    lowest = 1.0
    for i, method in enumerate(methods):
        centres, halves = zip(*(mean_and_interval(accuracy[method][target]) for target in targets), strict=True)
        finite = [half if math.isfinite(half) else 0 for half in halves]  # a single seed has no interval
        lowest = min(lowest, *(centre - half for centre, half in zip(centres, finite, strict=True)))
        places = [j + (i - (len(methods) - 1) / 2) * width for j in range(len(targets))]
        heights = [100 * centre for centre in centres]
        style = {"yerr": _bars(halves), "capsize": 2, "error_kw": {"elinewidth": 1}}
        axes.bar(places, heights, 0.92 * width, color=palette[method], label=labels[method], **style)
        if len(methods) <= 4:
            style = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 7}
            for place, height, half in zip(places, heights, finite, strict=True):
                axes.annotate(f"{height:.1f}", (place, height + 100 * half), (0, 2), **style)
    axes.set_xticks(range(len(targets)), targets)
    axes.set_ylim(bottom=max(0.0, 10 * math.floor(10 * lowest - 0.5)))
    axes.set_ylabel("accuracy after fine-tuning, %" + (" (axis cut)" if axes.get_ylim()[0] else ""))
    axes.set_title("Held-out tasks: accuracy by initialization, 95 % intervals")
    axes.grid(axis="x", visible=False)
    figure.legend(frameon=False, ncols=2 if len(methods) < 6 else 4, loc="outside lower center")
    save_figure(path, figure)


def _bars(halves: Sequence[float]) -> list[float] | None:
    """Interval halves in percent; None where a single seed gives no interval."""
    return [100 * half for half in halves] if all(map(math.isfinite, halves)) else None
