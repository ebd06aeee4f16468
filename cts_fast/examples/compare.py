"""Put finished runs of `resnet20` together that differ in their seed alone: what holds over meta-training seeds.

    python -m cts_fast.examples.compare runs/long-0 runs/long-1 runs/long-2 --out runs/long

prints the accuracies, the paired differences to the other methods at every point of the curves, and how many steps one
method takes to reach what another has, each with a 95 % interval over the seeds; writes them into compare.json, and
draws the accuracy against the steps spent.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cts_fast.experiments import cli, plots
from cts_fast.experiments.comparison import Comparison
from cts_fast.experiments.files import write_json
from cts_fast.experiments.report import aligned, fill, percent, reference, table
from cts_fast.experiments.run_folder import CONFIG
from cts_fast.experiments.statistics import (
    EqualAccuracy,
    mean_over_log_steps,
    paired_differences,
    steps_to_equal_accuracy,
)
from cts_fast.experiments.weights import UNTRAINED

Differences = dict[str, dict[int, list[float]]]  # other method to steps to fractions, one per seed
# who has an accuracy, who is to reach it, after how many steps of the first
Equal = dict[str, dict[str, dict[int, EqualAccuracy]]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.new_parser("cts_fast.examples.compare", __doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs, one for each seed")
    out_help = "folder for compare.json and the figures, which are replaced (default: %(default)s)"
    p.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help=out_help)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    try:
        cli.check_extras("matplotlib", "scipy")
        if (args.out / CONFIG).exists():
            raise ValueError(f"--out {args.out} is a run itself: choose another folder")
        compared = Comparison(args.runs)
        best = reference(compared.methods)
        if best is None:
            raise ValueError("these runs hold no method beside scratch: there is nothing to compare")
        ahead, equal = differences(compared, best), equal_accuracy(compared, best)
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "compare.json", results(compared, best, ahead, equal), indent=1)
        draw(args.out, compared, best)
    except (ValueError, OSError) as error:  # CheckpointError among them
        p.exit(2, f"{p.prog}: error: {error}\n")
    print(report(compared, best, ahead, equal))
    print(f"\nIn {args.out}: compare.json, accuracy-vs-steps.png, accuracy.png.")
    return 0


def differences(compared: Comparison, of: str) -> Differences:
    """What `of` is ahead of each other method after equal steps, and of starts without meta-training."""
    ahead = {}
    for other in compared.labels:
        if other != of:
            curve = compared.curve(other)
            ahead[other] = {
                step: paired_differences(values, curve[0 if other in UNTRAINED else step])
                for step, values in compared.curve(of).items()
            }
    return ahead


def over_the_curve(ahead: Mapping[int, Sequence[float]]) -> list[float]:
    """Differences after each number of steps, one per seed, to every seed's mean along the log axis of steps."""
    seeds = range(len(next(iter(ahead.values()))))
    return [mean_over_log_steps({step: values[i] for step, values in ahead.items()}) for i in seeds]


def equal_accuracy(compared: Comparison, of: str) -> Equal:
    """Steps that each other method takes to reach what `of` has at each point; and `of`, to reach their last."""
    curves = {name: compared.curve(name) for name in compared.methods}
    others = [name for name in curves if name != of]
    last = max(curves[of])
    equal: Equal = {of: {}}
    for other in others:
        equal[of][other] = {step: steps_to_equal_accuracy(curves[of], step, curves[other]) for step in curves[of]}
        equal[other] = {of: {last: steps_to_equal_accuracy(curves[other], last, curves[of])}}
    return equal


def results(compared: Comparison, best: str, ahead: Differences, equal: Equal) -> dict:
    """The content of compare.json; steps that were not reached, and intervals of one seed, become null."""

    def finite(steps: float) -> float | None:
        return steps if math.isfinite(steps) else None

    return {
        "config": compared.config,
        "seeds": compared.seeds,
        "meta_test": [
            {"method": method, "step": step, "accuracy": by_target}
            for (method, step), by_target in compared.accuracy.items()
        ],
        "paired_differences": {best: ahead},
        "paired_differences_over_the_curve": {best: {other: over_the_curve(at) for other, at in ahead.items()}},
        "steps_to_equal_accuracy": [
            {
                "of": one,
                "after": step,
                "by": other,
                "steps": finite(found.steps),
                "interval": [finite(found.low), finite(found.high)],
                "seeds_that_reach_it": found.reached,
            }
            for one, by_other in equal.items()
            for other, by_step in by_other.items()
            for step, found in by_step.items()
        ],
    }


def draw(out: Path, compared: Comparison, best: str) -> None:
    """The figures, with intervals over meta-training seeds."""
    points = {name: compared.curve(name) for name in compared.methods}
    levels = {name: compared.curve(name)[0] for name in compared.config["methods"] if name in UNTRAINED}
    over = "meta-training"
    plots.accuracy_vs_steps(out / "accuracy-vs-steps.png", points, levels, compared.labels, reference=best, seeds=over)
    plots.final_accuracy(out / "accuracy.png", compared.final, compared.labels, seeds=over)


def report(compared: Comparison, best: str, ahead: Differences, equal: Equal) -> str:
    """What is printed."""
    named, steps = compared.labels, list(compared.curve(best))
    rows = [[f"{named[best]} minus ... after steps", *(f"{step:,}" for step in steps), "whole curve"]]
    rows += [
        [named[other], *(percent(at[step], "+") for step in steps), percent(over_the_curve(at), "+")]
        for other, at in ahead.items()
    ]
    parts = [table(compared.final, named), account(compared), aligned(rows)]
    if others := list(equal[best]):
        rows = [[f"to reach {named[best]} after", *(named[other] for other in others)]]
        rows += [
            [f"{step:,}", *(shown(equal[best][other][step], other, compared) for other in others)] for step in steps
        ]
        back = [[f"to reach, after {steps[-1]:,}, ...", named[best]]]
        back += [[named[other], shown(equal[other][best][steps[-1]], best, compared)] for other in others]
        parts += [
            "Steps to equal accuracy",
            aligned(rows),
            aligned(back),
            fill(
                "The number of steps after which the mean curve of the method above a column first reaches it, between "
                "points on a log axis; 95 % interval by bootstrap over seeds; seeds whose own curve reaches it."
            ),
        ]
    return "\n\n".join(parts)


def shown(found: EqualAccuracy, method: str, compared: Comparison) -> str:
    """Steps, interval, and how many seeds reached it."""
    first = min(compared.curve(method))

    def steps(value: float) -> str:
        if not math.isfinite(value):
            return "not reached"
        return f"{'up to ' * (value <= first)}{value:,.0f}"

    interval = "" if math.isnan(found.low) else f" [{steps(found.low)}; {steps(found.high)}]"
    return f"{steps(found.steps)}{interval}, {found.reached} of {found.seeds}"


def account(compared: Comparison) -> str:
    """What the table and the differences are of."""
    count = len(compared.seeds)
    over = (
        f"± is the 95 % interval over the {count} (Student's t)"
        if count > 1
        else "one gives no interval; that over its fine-tuning seeds stands in the run's own table"
    )
    return fill(
        f"Accuracy in % on tasks that meta-training never saw, of {count} meta-training seed{'s' * (count > 1)} "
        f"({', '.join(map(str, compared.seeds))}), each the mean of {compared.config['meta_test']['seeds']} "
        f"fine-tuning runs: {over}. Differences are paired: both of a pair have the same seeds, batches and tasks; of "
        "the whole curve: their mean along a log axis of steps."
    )


if __name__ == "__main__":
    sys.exit(main())
