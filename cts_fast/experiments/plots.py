"""The pictures of the image experiments, as PNG files; needs matplotlib (extra "examples")."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cts_fast.experiments.files import save_figure
from cts_fast.experiments.statistics import mean_and_interval, paired_differences
from cts_fast.experiments.weights import UNTRAINED

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
_SCRATCH, _GIVEN = "#9A9A9A", "#1A1A1A"  # without meta-training: a random body, the given weights
TEXT = 10  # points of titles, labels and legends
LINE = 0.2  # inches between two lines of it
Layout = Literal["constrained", "compressed", "tight"]  # how matplotlib places the plots of a figure


def new_figure(
    rows: int,
    columns: int,
    width: float,
    height: float,
    layout: Layout = "constrained",
    ratios: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """A figure that no window shows, and its axes, [rows, columns]; inches; ratios: of the rows' heights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, height_ratios=ratios)


def _one_plot(width: float, height: float) -> tuple[Any, Any]:
    """A figure of one plot with lines across, and its axes."""
    figure, ((axes,),) = new_figure(1, 1, width, height)
    _bare(axes)
    return figure, axes


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)


def _plain(name: str) -> str:
    """A task's name, in which two dollars are not a formula."""
    return name.replace("$", r"\$")


def _wrapped(text: str, inches: float) -> str:
    """Text in lines of this width."""
    letters = len(text) * inches / _inches(text)
    return textwrap.fill(text, max(1, int(0.95 * letters)), break_on_hyphens=False)


def _inches(text: str) -> float:
    """How wide one line of text is."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=TEXT, usetex=False).get_extents().width / 72


def _around(figure: Any, title: str, handles: Sequence[Any], named: Sequence[str]) -> None:
    """A title above the plots of a figure and a legend below, in as many lines as its width asks for; the figure grows.

    Each line of `title` is wrapped on its own.
    """
    inches = figure.get_figwidth() - 0.2
    text = "\n".join(_wrapped(line, inches) for line in title.splitlines())
    figure.suptitle(text, fontsize=TEXT)
    sign = 0.6  # inches of a line or patch, and of the gaps around it
    named = [_wrapped(name, inches - sign) for name in named]
    longest = max(_inches(line) for name in named for line in name.splitlines())
    columns = max(1, min(len(named), int(inches / (sign + longest))))
    rows = math.ceil(len(named) / columns)
    lines = rows * max(name.count("\n") + 1 for name in named)
    figure.legend(handles, named, frameon=False, fontsize=TEXT, ncols=columns, loc="outside lower center")
    figure.set_figheight(figure.get_figheight() + LINE * (text.count("\n") + lines))


def _within_percent(axes: Any) -> None:
    """Show nothing below 0 % or above 100 %, where intervals of few seeds end too."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.0), min(high, 100.0))


def colours(methods: Sequence[str]) -> dict[str, str]:
    """Method to colour; without meta-training `scratch` is grey, `none` nearly black."""
    named = [method for method in methods if method not in UNTRAINED]
    return {"scratch": _SCRATCH, "none": _GIVEN} | {
        method: _COLOURS[i % len(_COLOURS)] for i, method in enumerate(named)
    }


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
    figure, axes = _one_plot(7, 4)
    palette = colours(list(curves))
    for method, (steps, losses) in curves.items():
        axes.plot(steps, losses, color=palette[method], alpha=0.18, linewidth=0.8)
        smoothed = smooth(losses, 1 - 1 / max(1, len(losses) / 40))
        axes.plot(steps, smoothed, color=palette[method], linewidth=2, label=labels[method])
    axes.set_xlabel("inner steps of each task, all rounds together")
    axes.set_ylabel("training loss, mean over tasks")
    axes.margins(x=0.01)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _around(figure, "Meta-training", *axes.get_legend_handles_labels())
    save_figure(path, figure)


def accuracy_vs_steps(
    path: Path,
    points: Mapping[str, Mapping[int, Sequence[float]]],
    untrained: Mapping[str, Sequence[float]],
    labels: Mapping[str, str],
    *,
    reference: str,
    seeds: str,
) -> None:
    """Held-out accuracy against meta-training steps spent, and below it what `reference` is ahead of the others.

    points: method to step to accuracies (fractions, one per seed, the same seeds for all); untrained: what was not
    meta-trained to its accuracies; seeds: "fine-tuning" or "meta-training".
    """
    rows = min(len(points), 2)
    figure, grid = new_figure(rows, 1, 7, 2.5 + 2 * rows, ratios=[2, 1][:rows])
    (top,), (bottom,) = grid[0], grid[-1]
    if rows > 1:
        bottom.sharex(top)
        top.tick_params(labelbottom=False)
    palette = colours(list(points))
    steps = sorted({step for by_step in points.values() for step in by_step})
    for i, (method, by_step) in enumerate(points.items()):
        aside = (steps[-1] / steps[0]) ** (0.006 * (i - (len(points) - 1) / 2))  # or intervals would hide each other
        _curve(top, by_step, aside, palette[method], labels[method])
        if method != reference:
            ahead = {step: paired_differences(points[reference][step], values) for step, values in by_step.items()}
            _curve(bottom, ahead, aside, palette[method])
    for name, values in untrained.items():
        _level(top, values, palette[name], labels[name])
    top.set_ylabel("accuracy after fine-tuning, %")
    values = points[reference][steps[-1]]
    _within_percent(top)
    for (axes,) in grid:
        _bare(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [f"{step:,}" for step in steps])
        axes.minorticks_off()
    if rows > 1:
        bottom.axhline(0, color="#4D4D4D", linewidth=1)
        bottom.set_ylabel("ahead, points")
        bottom.set_title(_wrapped(f"{labels[reference]} minus the others, paired", 6), fontsize=TEXT)
    bottom.set_xlabel("meta-training steps spent (inner steps of each task), log scale")
    title = f"Held-out tasks: mean accuracy, {intervals(values, seeds)}"
    _around(figure, title, *top.get_legend_handles_labels())
    save_figure(path, figure)


def _curve(axes: Any, by_step: Mapping[int, Sequence[float]], aside: float, colour: str, label: str = "") -> None:
    """Means with 95 % intervals of values by step, in percent; aside: a factor on the steps."""
    centres, halves = zip(*map(mean_and_interval, by_step.values()), strict=True)
    style = {"marker": "o", "markersize": 5, "linewidth": 2, "elinewidth": 1, "capsize": 3}
    x, y = [step * aside for step in by_step], [100 * centre for centre in centres]
    axes.errorbar(x, y, _bars(halves), color=colour, label=label or None, **style)


def _level(axes: Any, values: Sequence[float], colour: str, label: str = "") -> None:
    """A line across at the mean, with its interval, of values in percent."""
    centre, half = mean_and_interval(values)
    axes.axhline(100 * centre, color=colour, linestyle="--", label=label or None)
    if math.isfinite(half):
        axes.axhspan(100 * (centre - half), 100 * (centre + half), color=colour, alpha=0.15, linewidth=0)


def by_target(
    path: Path,
    curves: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    labels: Mapping[str, str],
    *,
    x: str,
    y: str,
    title: str,
    levels: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    differences: bool = False,
) -> None:
    """A plot for each held-out task: method to x to fractions (one per seed), on a log axis of x.

    curves: by held-out task; levels: by held-out task, method to the values of a line across; x, y: what the axes are;
    differences: whether values are differences of accuracies, which have a line at zero.
    """
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, grid = new_figure(rows, columns, max(5.5, 1 + 3.2 * columns), 1 + 2.5 * rows)
    palette = colours(list(labels))  # all of a run's, for what one figure shows as levels another has as curves
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, (target, methods) in zip(grid.flat, curves.items(), strict=False):
        across = (levels or {}).get(target, {})
        _bare(axes)
        if differences:
            axes.axhline(0, color="#4D4D4D", linewidth=1)
        for name, values in across.items():
            _level(axes, values, palette[name], labels[name])
        for method, points in methods.items():
            _curve(axes, dict(sorted(points.items())), 1.0, palette[method], labels[method])
        if not differences:
            _within_percent(axes)
        ticks = sorted({point for points in methods.values() for point in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30 if len(ticks) > 4 else 0, fontsize="small")
        axes.minorticks_off()
        axes.set_title(_plain(target), fontsize=TEXT)
    for axes in grid[:, 0]:
        axes.set_ylabel(_wrapped(y, 2.3))
    # x is named above: under the plots it would hide the legend
    _around(figure, f"{title}\nagainst {x}, log scale", *grid.flat[0].get_legend_handles_labels())
    save_figure(path, figure)


def final_accuracy(
    path: Path, accuracy: Mapping[str, Mapping[str, Sequence[float]]], labels: Mapping[str, str], *, seeds: str
) -> None:
    """Bars with 95 % intervals: method to held-out task to accuracies (fractions, one per seed); seeds: as above."""
    methods = list(accuracy)
    targets = list(accuracy[methods[0]])
    figure, axes = _one_plot(max(6.0, 1.2 + 0.32 * (len(methods) + 1) * len(targets)), 4)
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
                axes.annotate(f"{height:.1f}", (place, min(height + 100 * half, 100)), (0, 2), **style)
    axes.set_xticks(range(len(targets)), list(map(_plain, targets)))
    axes.set_ylim(max(0.0, 10 * math.floor(10 * lowest - 0.5)), min(105.0, axes.get_ylim()[1]))
    axes.set_ylabel("accuracy after fine-tuning, %" + (" (axis cut)" if axes.get_ylim()[0] else ""))
    axes.grid(axis="x", visible=False)
    title = f"Held-out tasks: accuracy by initialization\n{intervals(accuracy[methods[0]][targets[0]], seeds)}"
    _around(figure, title, *axes.get_legend_handles_labels())
    save_figure(path, figure)


def intervals(values: Sequence[float], seeds: str) -> str:
    """Over what the intervals of a figure are."""
    return f"95 % intervals over {len(values)} {seeds} seeds" if len(values) > 1 else f"one {seeds} seed"


def _bars(halves: Sequence[float]) -> list[float] | None:
    """Interval halves in percent; None where a single seed gives no interval."""
    return [100 * half for half in halves] if all(map(math.isfinite, halves)) else None
