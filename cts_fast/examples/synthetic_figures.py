"""Figures 4 and 5 of the synthetic experiment; needs matplotlib (extra "examples")."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.examples.landscapes import ANGLES, MIDDLE, Landscape, centres, template
from cts_fast.experiments.files import save_figure
from cts_fast.experiments.plots import new_figure

COLOURS = {"reptile": "#0072B2", "cts": "#D55E00", "cts-accurate": "#009E73"}
SHORT = {"reptile": "Reptile", "cts": "cts", "cts-accurate": "cts, exact"}
LOW, HIGH = -5.0, 15.0  # the plotted square


def figure_4(
    path: Path, landscape: Landscape, bias: Tensor, reptile: Mapping[int, Tensor], task_steps: Mapping[str, int]
) -> None:
    """(a) the template, (b) the loss of task 1, (c) loss after 100 steps against φ*'s horizon, (d) cost.

    bias: [K], see `short_horizon_bias`. reptile: horizon k → final losses over starts. task_steps: inner steps of all
    tasks.
    """
    figure, ((template_axes, task_axes, bias_axes, cost_axes),) = new_figure(1, 4, 17, 3.9, "compressed")
    axis = torch.linspace(LOW, HIGH, 201, dtype=torch.float64)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    _surface(template_axes, axis, template((x - MIDDLE) / 3, (y - MIDDLE) / 3))
    template_axes.set_title("(a) template, moved to (5, 5)")

    points = torch.stack((x, y), -1).view(-1, 2).to(landscape.device)
    shown = _surface(task_axes, axis, landscape.losses(points)[0].view(x.shape).cpu())
    places = centres().tolist()
    task_axes.scatter(*zip(*places, strict=True), s=22, color="#E8000B", zorder=3)
    task_axes.annotate("", places[0], (MIDDLE, MIDDLE), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.4})
    box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
    rotated = f"rotated by {ANGLES[0]:.2f} rad"
    task_axes.annotate(rotated, places[0], (6, 4), textcoords="offset points", fontsize=8, bbox=box)
    task_axes.set_title("(b) loss of task 1; dots: the 8 centres")
    figure.colorbar(shown, ax=[template_axes, task_axes], label="log10(1 + loss)", shrink=0.85)

    figure.get_layout_engine().set(wspace=0.05)

    best_of_map = "φ*: the best 1 % of the square after k steps"
    bias_axes.plot(range(1, len(bias) + 1), bias.tolist(), color="black", lw=2, label=best_of_map)
    means = [values[values.isfinite()].mean().item() for values in reptile.values()]
    all_starts = "Reptile with k inner steps, all starts"
    bias_axes.plot(list(reptile), means, "o--", color=COLOURS["reptile"], ms=5, lw=1, label=all_starts)
    bias_axes.set_yscale("log")
    bias_axes.set_xlabel("k, the horizon that φ* was obtained for")
    bias_axes.set_ylabel("task-average loss after 100 steps")
    bias_axes.set_title("(c) short-horizon bias")
    bias_axes.legend(frameon=False, fontsize=8, loc="upper right")
    bias_axes.set_ylim(top=8)

    names, colours = [SHORT[name] for name in task_steps], [COLOURS[name] for name in task_steps]
    bars = cost_axes.bar(names, task_steps.values(), color=colours, width=0.6)
    cost_axes.bar_label(bars, [f"{steps:,}" for steps in task_steps.values()], padding=2)
    cost_axes.set_yscale("log")
    cost_axes.set_ylim(1e3, 1e6)
    cost_axes.set_ylabel("inner-gradient steps of all tasks")
    cost_axes.set_title("(d) cost of 300 meta-updates")
    for axes in (bias_axes, cost_axes):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


def figure_5(
    path: Path,
    background: Mapping[str, Tensor],
    maps: Mapping[int, tuple[Tensor, Tensor]],
    runs: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """(a, b) Reptile from a grid of starts and where it comes to rest; (c, d) all methods over the map of quality.

    background: `quality_map`. maps: horizon → (path [updates + 1, S, 2], attractors [A, 2]). runs: method → its path
    from each start.
    """
    figure, (panels,) = new_figure(1, 4, 17, 4.3, "compressed")
    for axes, letter, (k, (paths, rests)) in zip(panels, "ab", maps.items(), strict=False):
        for line in paths.transpose(0, 1).cpu():
            if line.isfinite().all():
                axes.plot(*line.T.tolist(), color="#5B6770", lw=0.5, alpha=0.7)
        axes.scatter(*rests.T.tolist(), s=42, color="#E8000B", zorder=3, label=f"{len(rests)} points of rest")
        axes.set_title(f"({letter}) Reptile, k = {k}")
        axes.legend(loc="lower left", fontsize=8)
    side = round(len(background["points"]) ** 0.5)
    axis = torch.linspace(LOW, HIGH, side, dtype=torch.float64)
    quality = background["losses"][-1].view(side, side).T.cpu()
    starts = next(iter(runs.values()))["path"][0].cpu()
    for axes, letter, start in zip(panels[2:], "cd", ((-5.0, 5.0), (15.0, -5.0)), strict=True):
        levels = torch.linspace(-2, 2, 17).tolist()
        shown = axes.contourf(axis, axis, quality.clamp(1e-2, 1e2).log10(), levels=levels, cmap="Blues_r")
        i = int((starts - torch.tensor(start, dtype=torch.float64)).norm(dim=1).argmin())
        for name, one in runs.items():
            line = one["path"][:, i].cpu()
            loss = one["quality"][i].item()
            axes.plot(*line.T.tolist(), color=COLOURS[name], lw=1.8, label=f"{SHORT[name]}: ends at {loss:.2f}")
            axes.plot(*line[-1].tolist(), "o", color=COLOURS[name], mec="white", ms=8)
        axes.plot(*start, "s", color="black", ms=7)
        axes.set_title(f"({letter}) from ({start[0]:.0f}, {start[1]:.0f}), over the map of quality".replace("-", "−"))
        axes.legend(loc="upper right", fontsize=8)
    figure.colorbar(shown, ax=list(panels), label="log10 task-average loss after 100 steps", shrink=0.85)
    for axes in panels:
        square = (LOW - 0.7, HIGH + 0.7)
        axes.set(xlim=square, ylim=square, aspect="equal", xlabel="φ, first coordinate")
    panels[0].set_ylabel("φ, second coordinate")
    save_figure(path, figure)


def _surface(axes, axis: Tensor, loss: Tensor):
    """Filled contours of log10(1 + loss) over the plotted square; loss: [y, x]."""
    shown = axes.contourf(axis, axis, loss.log1p() / torch.log(torch.tensor(10.0)), levels=24, cmap="viridis")
    axes.set(aspect="equal", xlim=(LOW, HIGH), ylim=(LOW, HIGH))
    return shown
