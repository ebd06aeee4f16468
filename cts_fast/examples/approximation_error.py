"""How far a shifted trajectory is from the one it stands for (section 3.3 of the paper, Eq. (5) and Figure 3).

    python -m cts_fast.examples.approximation_error

Measures the norm of U_k(φ + Δ_1 + … + Δ_{k−1}) − U_1(… U_1(U_1(φ) + Δ_1) … + Δ_{k−1}) against the inner rate α, the
meta rate β, the length k, and the kind of activation and pooling, and fits the order of growth. The paper's set-up is
in a supplement that is not available; this one is our own choice: three 5-class tasks of noisy random prototypes, 8 × 8
pixels, a convolutional network with three layers, plain SGD on batches of 16, float64, φ after 100 steps of joint
training.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cts_fast.examples.error_runs import Draw, Networks, errors, warmed_up
from cts_fast.experiments import study
from cts_fast.experiments.files import save_figure
from cts_fast.experiments.plots import new_figure
from cts_fast.experiments.statistics import mean_and_interval

DRAWS, TASKS = 10, 3
ALPHA, BETA, K = 0.02, 0.02, 20  # what the other panels hold fixed
GRIDS = {"alpha": (0.005, 0.01, 0.02, 0.04, 0.08), "beta": (0.002, 0.0063, 0.02, 0.063, 0.2), "k": (3, 5, 10, 20, 40)}
THEORY = {"alpha": "0 to 1", "beta": "1 to 2", "k": "1 to 2"}  # orders of β α h k² + β² k
COMBINATIONS = (("softplus", "average"), ("relu", "average"), ("softplus", "max"), ("relu", "max"))
COLOURS = {"softplus": "#0072B2", "relu": "#D55E00"}
NAMES = {
    "softplus": "Softplus",
    "relu": "ReLU",
    "alpha": "inner learning rate α",
    "beta": "meta learning rate β",
    "k": "trajectory length k",
}


def measure(activation: str, pool: str, draw: Draw, panels: Sequence[str], advance=lambda: None) -> dict[str, Tensor]:
    """Errors [grid, DRAWS] of each panel; advance is called 2 K times for rates and 2 max k times for lengths."""
    networks = Networks(activation, pool)
    draw = warmed_up(networks, draw)
    result = {}
    settings = {
        "alpha": [(x, BETA) for x in GRIDS["alpha"]],
        "beta": [(ALPHA, x) for x in GRIDS["beta"]],
        "default": [(ALPHA, BETA)],
    }
    rates = [panel for panel in panels if panel != "k"]
    found = errors(networks, draw, [one for panel in rates for one in settings[panel]], [K], advance)[:, 0]
    result.update(zip(rates, found.split([len(settings[panel]) for panel in rates]), strict=True))
    if "k" in panels:
        result["k"] = errors(networks, draw, [(ALPHA, BETA)], GRIDS["k"], advance)[0]
    return result | {"phi": draw.phi}


def exponent(grid: Sequence[float], values: Tensor) -> float:
    """The slope of log error over log grid by least squares; values: [grid]."""
    x, y = torch.tensor(grid, dtype=torch.float64).log(), values.cpu().log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def config(seed: int) -> dict:
    """What defines a run."""
    return {
        "draws": DRAWS,
        "tasks": TASKS,
        "alpha": ALPHA,
        "beta": BETA,
        "k": K,
        "grids": {name: list(grid) for name, grid in GRIDS.items()},
    }


def run(work: study.Study) -> str:
    """All stages, the figure and the files; returns the table."""
    draw = Draw.new(work.config["seed"], DRAWS, TASKS, max(GRIDS["k"]), work.device)
    found = {}
    for activation, pool in COMBINATIONS:
        panels = ("alpha", "beta", "k") if pool == "average" else ("default",)
        total = 2 * K + 2 * max(GRIDS["k"]) * ("k" in panels)
        compute = partial(measure, activation, pool, draw, panels)
        found[activation, pool] = work.stage(f"{activation}-{pool}", total, compute)
    curves = {panel: {a: found[a, "average"][panel] for a in COLOURS} for panel in GRIDS}
    middle = GRIDS["k"].index(K)
    kinds = {(a, p): found[a, p]["default"][0] if p == "max" else found[a, p]["k"][middle] for a, p in COMBINATIONS}
    orders = {
        panel: {a: exponent(GRIDS[panel], values.mean(1)) for a, values in by_activation.items()}
        for panel, by_activation in curves.items()
    }
    error = {
        panel: {"grid": list(GRIDS[panel]), **{a: values.tolist() for a, values in by_activation.items()}}
        for panel, by_activation in curves.items()
    }
    error_by_kind = {f"{a}, {p} pooling": values.tolist() for (a, p), values in kinds.items()}
    work.write(
        {"error": error, "error_by_kind": error_by_kind, "exponent": orders, "theory": THEORY},
        ("panel", "value", "activation", "pooling", "draw", "error"),
        rows(curves, kinds),
        {f"{a}-{p}": one["phi"] for (a, p), one in found.items()},
    )
    figure_3(work.out / "figure-3.png", curves, kinds, orders)
    return table(kinds, orders)


def rows(curves: dict, kinds: dict) -> Iterator[tuple]:
    """The lines of metrics.csv: the error of every draw."""
    for panel, by_activation in curves.items():
        for activation, values in by_activation.items():
            for x, draws in zip(GRIDS[panel], values.tolist(), strict=True):
                for i, error in enumerate(draws):
                    yield panel, x, activation, "average", i, error
    for (activation, pool), values in kinds.items():
        for i, error in enumerate(values.tolist()):
            yield "kind", "", activation, pool, i, error


def figure_3(path: Path, curves: dict, kinds: dict, orders: dict) -> None:
    """Error against α, β and k for both activations, and for each kind of network; mean and 95 % interval."""
    figure, (axes,) = new_figure(1, 4, 16, 3.8)
    held = {"alpha": f"β = {BETA}, k = {K}", "beta": f"α = {ALPHA}, k = {K}", "k": f"α = {ALPHA}, β = {BETA}"}
    for ax, letter, (panel, by) in zip(axes, "abc", curves.items(), strict=False):
        for activation, values in by.items():
            centres, halves = zip(*(mean_and_interval(v) for v in values.tolist()), strict=True)
            label = f"{NAMES[activation]}: order {orders[panel][activation]:.1f}"
            style = {"color": COLOURS[activation], "marker": "o", "ms": 4, "lw": 1.8, "capsize": 3}
            ax.errorbar(GRIDS[panel], centres, halves, label=label, **style)
        ax.set(xscale="log", yscale="log", ylim=(1e-4, 1e-1), xlabel=NAMES[panel], title=f"({letter}) {held[panel]}")
        ax.set_xticks(GRIDS[panel], [f"{x:g}" for x in GRIDS[panel]])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=9)
    axes[0].set_ylabel("norm of the approximation error ε")
    centres, halves = zip(*(mean_and_interval(v.tolist()) for v in kinds.values()), strict=True)
    labels = [f"{NAMES[a]},\n{p} pool" for a, p in kinds]
    axes[3].bar(labels, centres, yerr=halves, capsize=4, color=[COLOURS[a] for a, _ in kinds], width=0.65)
    axes[3].tick_params(axis="x", labelsize=8)
    axes[3].set_title(f"(d) α = {ALPHA}, β = {BETA}, k = {K}")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


def table(kinds: dict, orders: dict) -> str:
    """Orders of growth beside the theory's, and the error of each kind of network."""
    lines = ["", f"{'the error grows with':<24}{'Softplus':>10}{'ReLU':>10}{'Eq. (5)':>10}", "-" * 54]
    for panel, by in orders.items():
        lines.append(f"{NAMES[panel]:<24}{by['softplus']:>10.2f}{by['relu']:>10.2f}{THEORY[panel]:>10}")
    lines += [
        "",
        "Fitted exponents. Eq. (5) bounds the error by O(β α h k² + β² k) for a meta-gradient of order 1;",
        "where θ − φ itself grows as α k, as at the start of a trajectory, its first term is of order β α² h k³.",
        "",
        f"{'network':<26}{'error':>10}{'± 95 %':>10}",
        "-" * 46,
    ]
    for (activation, pool), values in kinds.items():
        centre, half = mean_and_interval(values.tolist())
        lines.append(f"{NAMES[activation] + ', ' + pool + ' pooling':<26}{centre:>10.4f}{half:>10.4f}")
    lines += ["", f"Mean over {DRAWS} draws of data, network and batches, at α = {ALPHA}, β = {BETA}, k = {K}."]
    return "\n".join(lines)


def main(argv=None) -> int:
    """Runs the program; returns the exit status."""
    return study.main("cts_fast.examples.approximation_error", __doc__, config, run, argv)


if __name__ == "__main__":
    sys.exit(main())
