"""Compare step sizes of the meta-update on the meta-training tasks alone: no held-out task is ever loaded into a net.

    python -m cts_fast.examples.tune --grid cts=0.03,0.1,0.3 --grid reptile=0.3,1,2 --out runs/tune

The suite's meta-training tasks are dealt into folds. For each fold, every method and step size meta-trains on the
other folds, and is then fine-tuned on the tasks of this one. The table holds the mean accuracy over all these tasks.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from cts_fast.baselines import METHODS
from cts_fast.data import Task, task_roles
from cts_fast.distributed.launch import Team
from cts_fast.experiments import cli
from cts_fast.experiments.experiment import Experiment, MethodSetup, checked
from cts_fast.experiments.files import write_json
from cts_fast.experiments.meta_test import MetaTestSettings
from cts_fast.experiments.meta_train import MetaTrainSettings
from cts_fast.experiments.run_folder import CONFIG, RunFolder
from cts_fast.experiments.settings import PRESETS, rate_of
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.statistics import mean
from cts_fast.experiments.training import Curve
from cts_fast.experiments.weights import Weights
from cts_fast.models.by_name import Model

LAST = 20  # steps whose mean training loss is shown
Grid = Mapping[str, tuple[str, float]]  # "cts@0.1" to ("cts", 0.1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = cli.new_parser("cts_fast.examples.tune", __doc__)
    grid_help = "step sizes to try; may be repeated"
    p.add_argument("--grid", action="append", required=True, metavar="METHOD=X,Y,...", help=grid_help)
    cli.add_data_arguments(p)
    cli.add_model_arguments(p)
    p.add_argument("--tasks", type=cli.names, metavar="A,B,...", help="tasks to deal out (default: the suite's)")
    for name, kind in (
        ("size", cli.positive),
        ("horizon", cli.positive),
        ("rounds", cli.positive),
        ("lr", cli.number),
        ("batch-size", cli.positive),
        ("held-back", cli.fraction),
        ("test-batch-size", cli.positive),
    ):
        p.add_argument(f"--{name}", type=kind, help="instead of the preset's")
    cli.add_reset_momentum(p)
    p.add_argument("--test-steps", type=cli.positive, help="fine-tuning steps, instead of the preset's")
    p.add_argument("--test-images", type=cli.positive, help="training images to fine-tune on, instead of the preset's")
    p.add_argument("--test-seeds", type=cli.positive, default=1, help="fine-tuning runs per task (default: 1)")
    p.add_argument("--folds", type=cli.positive, default=2)
    cli.add_run_arguments(p, "runs/tune", seed=1000, seed_help="default: 1000, apart from the seeds of final runs")
    cli.add_save_every(p)
    return p


def read_grid(texts: Sequence[str]) -> dict[str, tuple[str, float]]:
    """["cts=0.1,0.3"] to {"cts@0.1": ("cts", 0.1), ...}."""
    grid = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in METHODS:
            raise ValueError(f"--grid {text}: there is no method {name!r}; there are: {', '.join(METHODS)}")
        for key in (f"{name}@{value}" for value in values.split(",")):
            grid[key] = (name, rate_of(key, {}))
    return grid


@dataclasses.dataclass
class Tuning:
    """What a run of this program works on."""

    tasks: Sequence[Task]
    setups: Sequence[Mapping[str, MethodSetup]]  # of each fold: the methods on the tasks of the others
    model: Model
    weights: Weights | None
    train: MetaTrainSettings
    test: MetaTestSettings
    folder: RunFolder


def fold_setups(grid: Grid, tasks: Sequence[Task], fold: int, folds: int) -> dict[str, MethodSetup]:
    """Every method and step size, on the tasks of the other folds."""
    others = tuple(task for i, task in enumerate(tasks) if i % folds != fold)
    ignore = {"nonfinite": "ignore"}  # a step size that is too large is a result
    return {key: MethodSetup(METHODS[name], others, meta_lr, ignore) for key, (name, meta_lr) in grid.items()}


def fold_experiment(args: argparse.Namespace, fold: int, tuning: Tuning) -> Experiment:
    """Meta-train on the tasks of the other folds, fine-tune on those of this one."""
    out = args.out / f"fold{fold}"
    return Experiment(
        out,
        {**tuning.folder.config, "fold": fold},
        tuning.setups[fold],
        tuning.tasks[fold :: args.folds],
        make_net=tuning.model,
        weights=tuning.weights,
        train=tuning.train,
        test=tuning.test,
        snapshots=(),
        seed=args.seed,
        device=args.device,
        resume=tuning.folder.resume and (out / CONFIG).exists(),
        save_every=args.save_every,
        team=tuning.folder.team,
    )


def prepare(args: argparse.Namespace, team: Team) -> Tuning:
    """From arguments to what they ask for; raises ValueError or OSError that says what is wrong with them."""
    cli.check_extras("safetensors", "tqdm")
    cli.check_device(args.device)
    preset = PRESETS[args.preset]
    sizes = cli.sizes(args)
    train = dataclasses.replace(
        preset.train, **sizes, **cli.meta_train_settings(args), **cli.given(args, horizon="horizon")
    )
    test_changes = cli.given(
        args, steps="test_steps", images="test_images", seeds="test_seeds", batch_size="test_batch_size"
    )
    test = dataclasses.replace(preset.test, **sizes, **test_changes)
    grid = read_grid(args.grid)
    names = cli.chosen_names(args.tasks, task_roles(args.suite, args.data_root), "train")
    tasks = cli.load_tasks(args, names, train.size)
    if args.validation:
        tasks = tuple(task.validation() for task in tasks)
    if not 2 <= args.folds <= len(tasks):
        raise ValueError(f"--folds {args.folds}: it takes 2 or more, and no more than there are tasks ({len(tasks)})")
    model, weights = cli.choose_model(args, tasks, train.size, test.size)
    config = {
        "suite": args.suite,
        "preset": args.preset,
        "tasks": [task.name for task in tasks],
        "grid": sorted(grid),
        "folds": args.folds,
        "seed": args.seed,
        **cli.about_model(model, weights),
        **cli.about_data(args, tasks),
        **cli.about_settings(train, test),
    }
    setups = [fold_setups(grid, tasks, fold, args.folds) for fold in range(args.folds)]
    for fold, methods in enumerate(setups):
        checked(config, methods, tasks[fold :: args.folds], train, team)
    options = {"resume": args.resume, "overwrite": args.overwrite, "team": team}
    folder = RunFolder(args.out, config, parts=("fold*", "tune.json"), **options)
    return Tuning(tasks, setups, model, weights, train, test, folder)


def run(args: argparse.Namespace, tuning: Tuning, stop: Stop) -> None:
    """Runs the folds, prints the table and writes tune.json."""
    train = tuning.train
    accuracy: dict[str, dict[str, list[float]]] = {}
    losses: dict[str, list[float]] = {}  # of each fold
    for fold in range(args.folds):
        experiment = fold_experiment(args, fold, tuning)
        with experiment.folder:
            experiment.run(stop)
            stop.check()
            experiment.folder.finish()
        for key, by_task in experiment.final_accuracy().items():
            accuracy.setdefault(key, {}).update(by_task)
        for key, curve in experiment.curves.items():
            losses.setdefault(key, []).append(last_loss(curve))
    means = {
        key: sum(map(sum, by_task.values())) / sum(map(len, by_task.values())) for key, by_task in accuracy.items()
    }
    if tuning.folder.team.is_first:
        found = {"config": tuning.folder.config, "accuracy": accuracy, "mean": means}
        write_json(args.out / "tune.json", found, indent=1)
    tuning.folder.finish()
    print(
        f"horizon {train.horizon}, rounds {train.rounds}, lr {train.lr}, batch {train.batch_size}: "
        f"mean accuracy on {len(tuning.tasks)} validation tasks, mean training loss of the last "
        f"{min(LAST, train.steps)} steps"
    )
    for key in sorted(means, key=means.__getitem__, reverse=True):
        loss = f"   {mean(losses[key]):.3f}" if key in losses else ""
        print(f"{key:24} {100 * means[key]:6.2f} %{loss}")


def last_loss(curve: Curve) -> float:
    """The mean of the last `LAST` steps; a point of a long curve is the mean of several."""
    return mean(loss for step, loss in zip(curve.steps, curve.mean, strict=True) if step > curve.steps[-1] - LAST)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    if args.list_data:
        return cli.show_data(p, args)
    return cli.run_program(p, args, argv, partial(prepare, args), partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
