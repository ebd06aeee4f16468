"""Figures of the report: time against T, time against P, and a roofline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402

from benchmarks.common.tables import TITLES  # noqa: E402

# name → (colour, marker); colours that tell apart with any colour vision
SHOWN = {
    "released form": ("#7f7f7f", "s"),
    "naive loop": ("#000000", "v"),
    "foreach": ("#d55e00", "^"),
    "fused + foreach": ("#e69f00", "D"),
    "compiled flat + copy": ("#56b4e9", "P"),
    "compiled unrolled + copy": ("#0072b2", "X"),
    "step(), torch": ("#cc79a7", "*"),
    "step(), cpu": ("#009e73", "o"),
    "3-read-2-write, same bytes": ("#009e73", None),
}
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
FLOPS = 9  # for each of the T·P coordinates: weight decay 2, momentum 2, descent 2, mean of differences 2, shift 1
# numbers read or written for each of the T·P coordinates, op by op, where no cache helps from one op to the next
MOVED = {
    "released form": 34,
    "naive loop": 20,
    "foreach": 20,
    "fused + foreach": 14,
    "compiled flat + copy": 10,
    "compiled unrolled + copy": 7,
    "step(), cpu": 5,
}


def draw(result: Mapping, stem: Path) -> list[Path]:
    """Writes the PNGs beside `stem` and returns their paths; leaves out what has too few points."""
    made = []
    cold = [table for table in result["steps"] if table["caches"] == "cold"]
    for network in ("resnet20",):
        tables = sorted((t for t in cold if t["network"] == network), key=lambda t: t["tasks"])
        if len(tables) > 1:
            label = f"tasks T ({TITLES[network]}, {tables[0]['parameters'] / 1e6:.2f} M)"
            made.append(_lines(tables, "tasks", label, stem, "time-against-tasks"))
    tables = sorted((t for t in cold if t["tasks"] == 8), key=lambda t: t["parameters"])
    if len(tables) > 1:
        made.append(_lines(tables, "parameters", "parameters P of one task (T = 8)", stem, "time-against-parameters"))
    for network in ("resnet18", "resnet20"):
        table = next((t for t in cold if t["network"] == network and t["tasks"] == 8), None)
        if table:
            made.append(_roofline(table, result, stem))
    return made


def _roofline(table: Mapping, result: Mapping, stem: Path) -> Path:
    """Where each variant stands under the memory's roof.

    Its bytes are counted op by op; its useful operations are the same for all.
    """
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    memory = table["variants"]["ceiling"]["gb_per_s"]
    compute = result["ceiling"]["gflops_per_thread"] * result["machine"]["threads"]
    x = [0.05, compute / memory, 10]
    axes.plot(x, [memory * x[0], compute, compute], color="black", linewidth=1.5)
    axes.text(0.9, memory, f"memory, {memory:.0f} GB/s", ha="right", fontsize=8)
    axes.text(x[-1], compute * 1.08, f"arithmetic, {compute:.0f} GFLOP/s", ha="right", fontsize=8)
    flop = FLOPS * table["tasks"] * table["parameters"]
    for variant, numbers in MOVED.items():
        if variant in table["variants"]:
            moved = 4 * table["parameters"] * (numbers * table["tasks"] + 2)
            colour, marker = SHOWN[variant]
            rate = flop / table["variants"][variant]["ms"] / 1e6
            axes.plot(flop / moved, rate, color=colour, marker=marker, linestyle="", label=variant)
    axes.set(xscale="log", xlabel="useful operations for each byte moved, op by op")
    axes.set(yscale="log", ylabel="useful GFLOP/s")
    axes.set(title=f"{TITLES[table['network']]}, T = {table['tasks']}, cold caches")
    axes.xaxis.set_major_formatter(PLAIN)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.set_ylim(top=compute * 1.6)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, stem, f"roofline-{table['network']}")


def _lines(tables: Iterable[Mapping], key: str, label: str, stem: Path, name: str) -> Path:
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for variant, (colour, marker) in SHOWN.items():
        points = [(t[key], t["variants"][variant]) for t in tables if variant in t["variants"]]
        if points:
            x, rows = zip(*points, strict=True)
            low, ms, high = ([row[key] for row in rows] for key in ("ms_low", "ms", "ms_high"))
            style = dict(linestyle="-" if marker else "--", linewidth=2.4 if variant == "step(), cpu" else 1.3)
            axes.plot(x, ms, color=colour, marker=marker, markersize=5, label=variant, **style)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="one step, ms (cold caches)")
    ticks = [t[key] for t in tables]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    if key == "tasks":
        labels = [str(tick) for tick in ticks]
    else:
        labels = [f"{TITLES[t['network']]}\n{t[key] / 1e6:.2f} M" for t in tables]
    axes.set_xticklabels(labels)
    axes.yaxis.set_major_formatter(PLAIN)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _save(figure, stem, name)


def _save(figure, stem: Path, name: str) -> Path:
    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
