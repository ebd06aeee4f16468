"""What a run of an image program leaves behind: results.json, initializations, figures and the printed table."""

import math
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cts_fast.experiments import plots
from cts_fast.experiments.experiment import Experiment
from cts_fast.experiments.files import save_tensors, write_json
from cts_fast.experiments.settings import LABELS, labels
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.statistics import mean_and_interval, paired_differences, per_seed_mean

Accuracy = Mapping[str, Mapping[str, Sequence[float]]]  # method to held-out task to fractions, one per seed
Files = list[tuple[str, Callable[[Path], None]]]
PAIRED = (
    "Differences of the last column, paired: with equal fine-tuning seeds, images, batches and last layers are equal. "
    "The interval is over these seeds. All is of one meta-training seed, and what another one would change is not in "
    "it: cts_fast.examples.compare puts several together."
)


def report(experiment: Experiment, out: Path, started: float, stop: Stop) -> None:
    """Writes the files into `out`, marks the run as finished and prints the table; on rank 0.

    started: when the program was, by time.monotonic(). Raises `Interrupted` between two files if `stop` was requested:
    a resumed run reports anew.
    """
    if not experiment.team.is_first:
        return
    accuracy = experiment.final_accuracy()
    named = labels(list(accuracy), experiment.config["meta_lr"])
    best = reference(experiment.methods)
    names = []
    for name, write in (*initializations(experiment, best), *drawings(experiment, accuracy, named)):
        stop.check()
        write(out / name)
        names.append(name)
    write_json(out / "results.json", results(experiment, accuracy), indent=1)
    stop.check()
    experiment.folder.finish()
    print(f"\n{table(accuracy, named)}\n")
    for images in experiment.more_images:
        print(f"Fine-tuned on {images:,} images:\n\n{table(experiment.final_accuracy(images), named)}\n")
    if best:
        print(f"{table_of_differences(accuracy, best, named)}\n\n{fill(PAIRED)}\n")
    print(f"{account(experiment)}\n")
    files = ", ".join(["results.json", "metrics.csv", *names])
    print(fill(f"In {out}: {files}. This took {(time.monotonic() - started) / 60:.1f} minutes."))


def results(experiment: Experiment, accuracy: Accuracy) -> dict:
    """The content of results.json; a loss that is not finite becomes null."""
    return {
        "config": experiment.config,
        "ranks": experiment.team.size,
        **meta_train(experiment),
        "meta_test": by_method(accuracy),
        **more_images(experiment),
        "paired_differences": differences(accuracy, reference(experiment.methods)),
    }


def meta_train(experiment: Experiment) -> dict:
    """Its part of results.json."""
    return {
        "meta_train": {
            name: {"steps": curve.steps, "loss": [x if math.isfinite(x) else None for x in curve.mean]}
            for name, curve in experiment.curves.items()
        }
    }


def by_method(accuracy: Accuracy) -> dict:
    """Accuracies as results.json has them."""
    return {
        name: {target: {"accuracy": values} for target, values in by_target.items()}
        for name, by_target in accuracy.items()
    }


def more_images(experiment: Experiment) -> dict:
    """The meta-test with other numbers of images, number to accuracies; nothing where there is one number."""
    found = {str(images): by_method(experiment.final_accuracy(images)) for images in experiment.more_images}
    return {"meta_test_by_images": found} if found else {}


def reference(methods: Iterable[str]) -> str | None:
    """The method that the others are compared with: cts, or the first of a run without it."""
    methods = list(methods)
    return "cts" if "cts" in methods else next(iter(methods), None)


def differences(accuracy: Accuracy, of: str | None) -> dict[str, dict[str, list[float]]]:
    """The method `of` to every other one to the paired differences between the two, a fraction per seed."""
    if of is None:
        return {}
    means = {name: per_seed_mean(by_target) for name, by_target in accuracy.items()}
    return {of: {name: paired_differences(means[of], values) for name, values in means.items() if name != of}}


def initializations(experiment: Experiment, best: str | None) -> Files:
    """(name, what writes it) of one file per method, and of `initialization.safetensors` for the method `best`.

    Of a method that trains one task also its body with batch-norm statistics, which are fit to be given as --weights.
    """
    files = [("initialization", best)] if best else []
    files += [(f"initialization-{name}", name) for name in experiment.methods]
    last = experiment.train.steps
    bodies = [
        (f"body-{name}.safetensors", partial(save_tensors, tensors=body, metadata={"method": name}))
        for name, body in experiment.bodies.items()
    ]
    return bodies + [
        (
            f"{file}.safetensors",
            partial(save_tensors, tensors=experiment.snapshots[name][last], metadata={"method": name}),
        )
        for file, name in files
    ]


def drawings(experiment: Experiment, accuracy: Accuracy, named: Mapping[str, str]) -> Files:
    """(name, what draws it) of the plots."""
    over = "fine-tuning"
    drawn: Files = [("accuracy.png", lambda path: plots.final_accuracy(path, accuracy, named, seeds=over))]
    best = reference(experiment.methods)
    if best is None:
        return drawn
    curves = {name: (curve.steps, curve.mean) for name, curve in experiment.curves.items()}
    tested = {
        name: {step: experiment.accuracy_at(name, step) for step in sorted(kept)}
        for name, kept in experiment.snapshots.items()
    }
    levels = {name: accuracy[name] for name in experiment.untrained}
    means = {name: {step: per_seed_mean(found) for step, found in steps.items()} for name, steps in tested.items()}
    across = {name: per_seed_mean(found) for name, found in levels.items()}
    vs_steps = partial(plots.accuracy_vs_steps, reference=best, seeds=over)
    drawn.append(("convergence.png", lambda path: plots.convergence(path, curves, named)))
    by_target = partial(plots.by_target, labels=named, y="accuracy after fine-tuning, %")
    by_steps = partial(
        by_target,
        curves=turned(tested),
        levels={task.name: {name: found[task.name] for name, found in levels.items()} for task in experiment.targets},
        x="meta-training steps spent (inner steps of each task)",
        title=f"Each held-out task, {plots.intervals(next(iter(across.values())), over)}",
    )
    if len(experiment.snapshot_steps) > 1:
        drawn.append(("accuracy-vs-steps.png", lambda path: vs_steps(path, means, across, named)))
        drawn.append(("accuracy-vs-steps-by-task.png", by_steps))
    if experiment.more_images:
        drawn.append(("gain-by-images.png", partial(plots.by_target, labels=named, **gain_by_images(experiment))))
    return drawn


def turned(tested: Mapping[str, Mapping[int, Mapping[str, Sequence[float]]]]) -> dict:
    """From method to number to held-out task, to held-out task to method to number."""
    targets = dict.fromkeys(target for points in tested.values() for found in points.values() for target in found)
    return {
        target: {name: {x: found[target] for x, found in points.items()} for name, points in tested.items()}
        for target in targets
    }


def gain_by_images(experiment: Experiment) -> dict:
    """What a figure as the paper's Figure 9 shows: points gained over the start without meta-learning, paired."""
    base = "none" if "none" in experiment.untrained else next(iter(experiment.untrained))
    found = {images: experiment.final_accuracy(images) for images in (None, *experiment.more_images)}

    def gains(task: Any, name: str) -> dict[int, list[float]]:
        return {
            images or experiment.test.images or len(task.train.labels): paired_differences(
                accuracy[name][task.name], accuracy[base][task.name]
            )
            for images, accuracy in found.items()
        }

    some = found[None][base][experiment.targets[0].name]
    return {
        "curves": {task.name: {name: gains(task, name) for name in experiment.methods} for task in experiment.targets},
        "x": "training images of the held-out task",
        "y": f"ahead of {LABELS[base]}, points",
        "title": f"What meta-training adds, by the number of images, paired\n{plots.intervals(some, 'fine-tuning')}",
        "differences": True,
    }


def table(accuracy: Accuracy, named: Mapping[str, str]) -> str:
    """Accuracy in percent by starting point and held-out task, the best starting point first."""
    rows = [["starting point of the network", *next(iter(accuracy.values())), "mean"]]
    for name in sorted(accuracy, key=lambda name: -sum(per_seed_mean(accuracy[name]))):
        columns = [*accuracy[name].values(), per_seed_mean(accuracy[name])]
        rows.append([named[name], *map(percent, columns)])
    return aligned(rows)


def table_of_differences(accuracy: Accuracy, of: str, named: Mapping[str, str]) -> str:
    """Paired differences in points, the largest first."""
    others = sorted(differences(accuracy, of)[of].items(), key=lambda item: -sum(item[1]))
    rows = [[f"{named[of]} minus ...", "points"], *([named[name], percent(values, "+")] for name, values in others)]
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table: the first row above a rule, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def account(experiment: Experiment) -> str:
    """What the table shows and what was run, for a reader who knows no paper."""
    test, targets = experiment.test, experiment.config["targets"]
    validation = experiment.config.get("validation", False)
    images = "training images held back from fine-tuning (--validation)" if validation else "the test sets"
    unseen = " that meta-training never saw" if experiment.methods else ""
    interval = " ± 95 % interval" if test.seeds > 1 else ""
    means = "; the last column is the mean over these tasks" if len(targets) > 1 else ""
    paragraphs = [
        f"Accuracy in % on {images} of {number_of(len(targets), 'image task')}{unseen}: "
        f"mean of {number_of(test.seeds, 'fine-tuning run')}{interval}{means}.",
        " ".join(["What was run:", *trainings(experiment), fine_tunings(experiment)]),
    ]
    if experiment.team.size > 1:
        paragraphs.append(f"The tasks were spread over {experiment.team.size} ranks when it came to its end.")
    return "\n\n".join(map(fill, paragraphs))


def trainings(experiment: Experiment) -> list[str]:
    """Sentences on what was trained before the meta-test; none where nothing was."""
    config, train = experiment.config, experiment.train
    size = f", images of {train.size} x {train.size} pixels" if train.size else ""
    rounds = f"in {train.rounds} rounds of {train.horizon}" if train.rounds > 1 else "in one round"
    steps = f"{number_of(train.steps, 'step')} of batch {train.batch_size} per task"
    found = []
    if any(name != "finetune" for name in experiment.methods):
        found.append(
            f"each method meta-trained {experiment.model_name} on the tasks {', '.join(config['tasks'])}: "
            f"{steps} {rounds}{size}."
        )
    if "finetune" in experiment.methods:
        sources = ", ".join(task.name for task in experiment.methods["finetune"].tasks)
        found.append(f"finetune trained {experiment.model_name} on {sources} alone: {steps}{size}.")
    if len(experiment.methods) > 1:
        found.append("All began at the same weights and saw the same batches of a task.")
    return found


def fine_tunings(experiment: Experiment) -> str:
    """A sentence on the meta-test."""
    test = experiment.test
    size = f" of {test.size} x {test.size} pixels" if test.size and not experiment.methods else ""
    images = f"{number_of(test.images, 'training image')}{size}" if test.images else f"all its training images{size}"
    if fewer := experiment.config.get("fewer_images"):  # a mapping of those that have not as many
        images += f" (all there are: {', '.join(f'{count:,} of {name}' for name, count in fewer.items())})"
    begun = "Then each starting point" if experiment.methods else experiment.model_name
    return (
        f"{begun} was fine-tuned on each held-out task: {images}, {number_of(test.steps, 'step')} of batch "
        f"{test.batch_size}, with a new last layer."
    )


def number_of(count: int, what: str) -> str:
    """A count of things."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def fill(text: str) -> str:
    """A paragraph of lines of up to 120 letters."""
    return textwrap.fill(text, 120, break_on_hyphens=False)


def percent(values: Sequence[float], sign: str = "") -> str:
    """Mean and 95 % interval of fractions, in percent; sign: "+" to write that of a positive mean, too."""
    mean, half = mean_and_interval(values)
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * half:.1f}" if math.isfinite(half) else "")
