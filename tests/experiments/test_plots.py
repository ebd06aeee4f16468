"""The figures of the image programs: all of their text is in the picture."""

from functools import partial
from pathlib import Path

import pytest

from cts_fast.experiments import plots
from cts_fast.experiments.settings import LABELS
from cts_fast.experiments.weights import UNTRAINED

TRAINED = [name for name in LABELS if name not in UNTRAINED]
STEPS = (100, 200, 500)
ACCURACIES = [0.02, 0.5]  # of two seeds: an interval beyond 0 and 100 %
DRAWN = {
    "final": lambda methods, targets: partial(
        plots.final_accuracy,
        accuracy={name: dict.fromkeys(targets, ACCURACIES) for name in (*methods, *UNTRAINED)},
        seeds="fine-tuning",
    ),
    "steps": lambda methods, targets: partial(
        plots.accuracy_vs_steps,
        points={name: dict.fromkeys(STEPS, ACCURACIES) for name in methods},
        untrained=dict.fromkeys(UNTRAINED, ACCURACIES),
        reference="cts",
        seeds="fine-tuning",
    ),
    "convergence": lambda methods, targets: partial(
        plots.convergence, curves={name: (STEPS, (3.0, 2.0, 1.0)) for name in methods}
    ),
    "by target": lambda methods, targets: partial(
        plots.by_target,
        curves=dict.fromkeys(targets, {name: dict.fromkeys(STEPS, ACCURACIES) for name in methods}),
        levels=dict.fromkeys(targets, dict.fromkeys(UNTRAINED, ACCURACIES)),
        x="meta-training steps spent (inner steps of each task)",
        y="accuracy after fine-tuning, %",
        title="Held-out tasks by the horizon of meta-training, 95 % intervals over 2 fine-tuning seeds",
    ),
    "differences": lambda methods, targets: partial(
        plots.by_target,
        curves=dict.fromkeys(targets, {name: dict.fromkeys(STEPS, [-0.1, 0.1]) for name in methods}),
        x="training images of the held-out task",
        y=f"ahead of {LABELS['none']}, points",
        title="What meta-training adds, by the number of images, paired\n95 % intervals over 2 fine-tuning seeds",
        differences=True,
    ),
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    found, save = [], plots.save_figure

    def kept(path, figure):
        save(path, figure)
        found.append(figure)

    monkeypatch.setattr(plots, "save_figure", kept)
    return found


@pytest.mark.parametrize("name", DRAWN)
def test_a_tasks_name_is_no_formula(name: str, tmp_path: Path):
    DRAWN[name](["cts"], ["$5_and_$10", "$x"])(tmp_path / "f.png", labels=LABELS)
    assert (tmp_path / "f.png").stat().st_size


@pytest.mark.parametrize("targets", [["emoji"], ["emoji", "photos"]], ids=len)
@pytest.mark.parametrize("methods", [["cts", "reptile"], TRAINED], ids=len)
@pytest.mark.parametrize("name", DRAWN)
def test_all_text_of_a_figure_is_in_the_picture(name: str, methods, targets, figures, tmp_path: Path):
    DRAWN[name](methods, targets)(tmp_path / "f.png", labels=LABELS)
    (figure,) = figures
    width, height = figure.bbox.size
    shown = [*figure.texts, *figure.legends[0].get_texts()]
    shown += [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    for text in shown:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()
    assert {LABELS[name] for name in methods} <= {text.get_text().replace("\n", " ") for text in shown}


def test_accuracies_are_shown_from_0_to_100_percent_and_differences_around_a_line_at_zero(figures, tmp_path: Path):
    for name in ("final", "steps", "by target", "differences"):
        DRAWN[name](["cts", "reptile"], ["emoji"])(tmp_path / "f.png", labels=LABELS)
    *accuracies, differences = (figure.axes[0] for figure in figures)
    assert all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] <= 105 for axes in accuracies)
    assert differences.get_ylim()[0] < 0
    assert any(list(line.get_ydata()) == [0, 0] for line in differences.lines)


def test_a_method_has_the_same_colour_as_a_line_and_as_a_level(figures, tmp_path: Path):
    """As in a sweep, where `finetune` makes no rounds: it stands between others in the figures of each run."""
    named = {name: LABELS[name] for name in ("cts", "finetune", "mtl", "scratch")}
    curve = dict.fromkeys(STEPS, ACCURACIES)
    draw = partial(plots.by_target, tmp_path / "f.png", labels=named, x="steps", y="accuracy", title="title")
    draw({"emoji": dict.fromkeys(("cts", "finetune", "mtl"), curve)}, levels={"emoji": {"scratch": ACCURACIES}})
    draw(
        {"emoji": dict.fromkeys(("cts", "mtl"), curve)}, levels={"emoji": dict.fromkeys(("finetune", "scratch"), [0.1])}
    )
    colours = [
        {
            label: handle.lines[0].get_color() if hasattr(handle, "lines") else handle.get_color()
            for handle, label in found
        }
        for found in (zip(*figure.axes[0].get_legend_handles_labels(), strict=True) for figure in figures)
    ]
    assert colours[0] == colours[1] and len({*colours[0].values()}) == 4
