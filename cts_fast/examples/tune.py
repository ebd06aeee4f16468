"""Compare step sizes of the meta-update on the meta-training tasks alone: no held-out task is ever loaded into a net.

    python -m cts_fast.examples.tune --grid cts=0.03,0.1,0.3 --grid reptile=0.3,1,2 --out runs/tune

The suite's meta-training tasks are dealt into folds. For each fold, every method and step size meta-trains on the
other folds, and is then fine-tuned on the tasks of this one. The table holds the mean accuracy over all these tasks.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cts_fast.baselines import METHODS
from cts_fast.data import DamagedFile, load_suite
from cts_fast.examples.resnet20 import add_folder_arguments
from cts_fast.experiments.experiment import Entry, Experiment
from cts_fast.experiments.run_folder import Interrupted, stop_on_signals, write_json
from cts_fast.experiments.settings import PRESETS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m cts_fast.examples.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--grid", action="append", required=True, metavar="METHOD=X,Y,...", help="step sizes to try; may be repeated"
    )
    p.add_argument("--suite", default="builtin")
    p.add_argument("--data-root", type=Path, metavar="DIR")
    p.add_argument("--preset", choices=PRESETS, default="quick")
    for name, kind in (("horizon", int), ("rounds", int), ("lr", float), ("batch-size", int)):
        p.add_argument(f"--{name}", type=kind, help="instead of the preset's")
    p.add_argument("--test-steps", type=int, help="fine-tuning steps, instead of the preset's")
    p.add_argument("--test-images", type=int, help="training images to fine-tune on, instead of the preset's")
    p.add_argument("--test-seeds", type=int, default=1, help="fine-tuning runs per task (default: 1)")
    p.add_argument("--folds", type=int, default=2)
    p.add_argument("--out", type=Path, default=Path("runs/tune"), metavar="DIR")
    p.add_argument("--seed", type=int, default=1000, help="default: 1000, apart from the seeds of final runs")
    p.add_argument("--device", default="cpu")
    add_folder_arguments(p)
    return p


def read_grid(texts: Sequence[str]) -> dict[str, tuple[str, float]]:
    """["cts=0.1,0.3"] to {"cts@0.1": ("cts", 0.1), ...}."""
    grid = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in METHODS:
            raise ValueError(f"--grid {text}: there is no method {name!r}; there are: {', '.join(METHODS)}")
        for value in values.split(","):
            grid[f"{name}@{value}"] = (name, float(value))
    return grid


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the folds, prints the table and writes tune.json."""
    p = parser()
    args = p.parse_args(argv)
    preset = PRESETS[args.preset]
    changes = {
        key: value for key in ("horizon", "rounds", "lr", "batch_size") if (value := getattr(args, key)) is not None
    }
    train = dataclasses.replace(preset.train, **changes)
    test_changes = {"steps": args.test_steps, "images": args.test_images, "seeds": args.test_seeds}
    test = dataclasses.replace(preset.test, **{key: value for key, value in test_changes.items() if value is not None})
    accuracy: dict[str, dict[str, list[float]]] = {}
    loss: dict[str, list[float]] = {}
    try:
        with stop_on_signals() as stop:
            grid = read_grid(args.grid)
            tasks = [task for task in load_suite(args.suite, args.data_root).values() if task.role == "train"]
            for fold in range(args.folds):
                held, others = (
                    tasks[fold :: args.folds],
                    tuple(task for i, task in enumerate(tasks) if i % args.folds != fold),
                )
                entries = {key: Entry(METHODS[name], others, meta_lr) for key, (name, meta_lr) in grid.items()}
                config = {
                    "fold": fold,
                    "folds": args.folds,
                    "grid": sorted(grid),
                    "seed": args.seed,
                    "meta_train": dataclasses.asdict(train),
                    "meta_test": json.loads(json.dumps(dataclasses.asdict(test))),
                }
                experiment = Experiment(
                    args.out / f"fold{fold}",
                    config,
                    entries,
                    held,
                    train=train,
                    test=test,
                    snapshots=(),
                    seed=args.seed,
                    device=args.device,
                    resume=args.resume and (args.out / f"fold{fold}").exists(),
                    overwrite=args.overwrite,
                )
                experiment.run(stop)
                stop.check()
                experiment.folder.finish()
                for key, by_task in experiment.final_accuracy().items():
                    accuracy.setdefault(key, {}).update(by_task)
                for key, curve in experiment.curves.items():
                    loss.setdefault(key, []).append(sum(curve.mean[-20:]) / len(curve.mean[-20:]))
        means = {
            key: sum(map(sum, by_task.values())) / sum(map(len, by_task.values())) for key, by_task in accuracy.items()
        }
        write_json(args.out / "tune.json", {"accuracy": accuracy, "mean": means}, indent=1)
    except Interrupted as stopped:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return stopped.status
    except (ValueError, OSError, DamagedFile) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    print(
        f"horizon {train.horizon}, rounds {train.rounds}, lr {train.lr}, batch {train.batch_size}: "
        f"mean accuracy on {len(tasks)} validation tasks, mean training loss of the last 20 steps"
    )
    for key in sorted(means, key=means.__getitem__, reverse=True):
        print(
            f"{key:24} {100 * means[key]:6.2f} %" + (f"   {sum(loss[key]) / len(loss[key]):.3f}" if key in loss else "")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
