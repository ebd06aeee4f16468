"""Meta-train a ResNet20 on many image tasks, then fine-tune it on tasks that it has never seen.

    python -m cts_fast.examples.resnet20

trains an initialization with continual trajectory shifting and one with Reptile, for equally many steps from the same
start on the same batches, fine-tunes both and a random initialization on held-out tasks, and prints a table.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cts_fast import figures
from cts_fast.baselines import METHODS
from cts_fast.data import DamagedFile, Task, load_suite
from cts_fast.examples.presets import LABELS, PRESETS
from cts_fast.experiment import Entry, Experiment, Interrupted
from cts_fast.metatest import mean_and_interval

PSEUDO_METHODS = ("finetune", "scratch")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m cts_fast.examples.resnet20", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*METHODS, *PSEUDO_METHODS)
    p.add_argument("--suite", default="builtin", help="builtin (default: comes with the package) or paper")
    p.add_argument("--data-root", type=Path, metavar="DIR", help="where the suite's data are (paper)")
    p.add_argument("--preset", choices=PRESETS, default="quick", help="settings: quick (default; minutes on two CPU cores) or paper")
    p.add_argument("--methods", type=_names, default=["cts", "reptile"], metavar="A,B,...",
                   help=f"all, or some of {', '.join(names)} (default: cts,reptile; scratch is always tested)")
    p.add_argument("--tasks", type=_names, metavar="A,B,...", help="tasks to meta-train on (default: the suite's)")
    p.add_argument("--targets", type=_names, metavar="C,D,...", help="held-out tasks to meta-test on (default: the suite's)")
    p.add_argument("--source", metavar="TASK", help="the task that finetune trains on (default: the one with most images)")
    p.add_argument("--horizon", type=_positive, metavar="K", help="inner steps per round")
    p.add_argument("--rounds", type=_positive, metavar="M", help="rounds")
    p.add_argument("--meta-lr", type=_rates, default={}, metavar="A=X,B=Y,...", help="step size of the meta-update, by method")
    p.add_argument("--test-steps", type=_positive, metavar="N", help="fine-tuning steps of the meta-test")
    p.add_argument("--test-seeds", type=_positive, metavar="N", help="fine-tuning runs per held-out task")
    p.add_argument("--out", type=Path, default=Path("runs/resnet20"), metavar="DIR", help="folder for all results (default: runs/resnet20)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
    p.add_argument("--tensorboard", action="store_true", help="write TensorBoard files into --out as well")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    p = parser()
    args = p.parse_args(argv)
    started = time.monotonic()
    try:
        experiment = prepare(args)
        experiment.run()
    except Interrupted:
        print(f"\nstopped; everything so far is in {args.out}. To go on:\n  {resume_command(argv)}", file=sys.stderr)
        return 130
    except (ValueError, OSError, DamagedFile) as error:
        p.exit(2, f"{p.prog}: error: {error}\n")
    report(experiment, args.out, time.monotonic() - started)
    return 0


def prepare(args: argparse.Namespace) -> Experiment:
    """From arguments to an experiment; raises ValueError or OSError that says what is wrong with them."""
    preset = PRESETS[args.preset]
    changes = {key: value for key in ("horizon", "rounds") if (value := getattr(args, key)) is not None}
    train = dataclasses.replace(preset.train, **changes)
    test_changes = {"steps": args.test_steps, "seeds": args.test_seeds}
    test = dataclasses.replace(preset.test, **{key: value for key, value in test_changes.items() if value is not None})
    check_device(args.device)

    known = (*METHODS, *PSEUDO_METHODS)
    methods = list(known) if args.methods == ["all"] else list(dict.fromkeys(args.methods))
    for name in (*methods, *args.meta_lr):
        if name not in known:
            raise ValueError(f"there is no method {name!r}; there are: {', '.join(known)}, all")
    meta_lr = {**preset.meta_lr, **args.meta_lr}

    tasks, targets = choose_tasks(args)
    source = choose_source(args.source, tasks)
    entries = {}
    for name in methods:
        if name == "finetune":    # plain SGD on one task: phi takes the whole of every step
            entries[name] = Entry(METHODS["no-shift"], (source,), 1.0, {"horizon": None})
        elif name != "scratch":
            if name not in meta_lr:
                raise ValueError(f"the preset has no meta_lr for {name!r}: give --meta-lr {name}=X")
            entries[name] = Entry(METHODS[name], tasks, meta_lr[name])
    config = {"suite": args.suite, "preset": args.preset, "methods": [*entries, "scratch"], "seed": args.seed,
              "tasks": [task.name for task in tasks], "targets": [task.name for task in targets],
              "source": source.name if "finetune" in entries else None,
              "meta_lr": {name: entry.meta_lr for name, entry in entries.items() if name != "finetune"},
              "meta_train": dataclasses.asdict(train),
              "meta_test": json.loads(json.dumps(dataclasses.asdict(test)))}
    points = min(preset.snapshots, train.steps)
    return Experiment(args.out, config, entries, targets, train=train, test=test, seed=args.seed, device=args.device,
                      snapshots=[round(train.steps * (i + 1) / points) for i in range(points)],
                      resume=args.resume, tensorboard=args.tensorboard)


def choose_tasks(args: argparse.Namespace) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """The tasks to meta-train on and those to meta-test on, by `--tasks` and `--targets` or by their role."""
    wanted = None if args.tasks is None or args.targets is None else [*args.tasks, *args.targets]
    suite = load_suite(args.suite, args.data_root, wanted)
    chosen = []
    for names, role in ((args.tasks, "train"), (args.targets, "target")):
        for name in names or ():
            if name not in suite:
                raise ValueError(f"suite {args.suite!r} has no task {name!r}; it has: {', '.join(suite)}")
        chosen.append(tuple(suite[name] for name in dict.fromkeys(names)) if names is not None else
                      tuple(task for task in suite.values() if task.role == role))
    tasks, targets = chosen
    both = {task.name for task in tasks} & {task.name for task in targets}
    if both:
        raise ValueError(f"{', '.join(sorted(both))}: a task is either meta-trained on or held out; take it out of --tasks or --targets")
    return tasks, targets


def choose_source(name: str | None, tasks: Sequence[Task]) -> Task:
    """The task that `finetune` trains on."""
    if name is None:
        return max(tasks, key=lambda task: len(task.train.labels))
    for task in tasks:
        if task.name == name:
            return task
    raise ValueError(f"--source {name}: not one of the tasks to meta-train on: {', '.join(task.name for task in tasks)}")


def check_device(name: str) -> None:
    """Raises ValueError if tensors cannot be made on the device."""
    import torch
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def report(experiment: Experiment, out: Path, seconds: float) -> None:
    """Writes results.json, the initializations and the figures, and prints the table."""
    from safetensors.torch import save_file

    accuracy = experiment.final_accuracy()
    results = {"config": experiment.config,
               "meta_train": {name: {"steps": curve.steps, "loss": [x if math.isfinite(x) else None for x in curve.mean]}
                              for name, curve in experiment.curves.items()},
               "meta_test": {name: {target: {"accuracy": values} for target, values in by_target.items()}
                             for name, by_target in accuracy.items()}}
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    best = "cts" if "cts" in experiment.entries else next(iter(experiment.entries), None)
    for name in experiment.entries:
        phi = experiment.snapshots[name][experiment.train.steps]
        tensors = {key: tensor.cpu().contiguous() for key, tensor in phi.items()}
        for file in (f"initialization-{name}.safetensors", *(["initialization.safetensors"] if name == best else [])):
            save_file(tensors, out / file, {"method": name})
    draw(experiment, accuracy, out)
    print(table(experiment, accuracy))
    print(f"\nEverything is in {out}: initialization.safetensors ({best}), results.json, metrics.csv, "
          f"convergence.png, accuracy-vs-steps.png, accuracy.png. It took {seconds / 60:.1f} minutes.")


def draw(experiment: Experiment, accuracy: dict[str, dict[str, list[float]]], out: Path) -> None:
    """The three figures."""
    if experiment.entries:
        figures.convergence(out / "convergence.png", {name: (curve.steps, curve.mean) for name, curve in experiment.curves.items()}, LABELS)
        targets, seeds = [task.name for task in experiment.targets], range(experiment.test.seeds)
        points = {name: {step: [sum(experiment.accuracy[name, step, target, seed] for target in targets) / len(targets) for seed in seeds]
                         for step in experiment.snapshots[name]} for name in experiment.entries}
        figures.accuracy_vs_steps(out / "accuracy-vs-steps.png", points, per_seed_mean(accuracy["scratch"]), LABELS)
    figures.final_accuracy(out / "accuracy.png", accuracy, LABELS)


def per_seed_mean(by_target: dict[str, list[float]]) -> list[float]:
    """Mean over held-out tasks, for every seed."""
    return [sum(values) / len(values) for values in zip(*by_target.values())]


def table(experiment: Experiment, accuracy: dict[str, dict[str, list[float]]]) -> str:
    """The result in words and numbers, best initialization first."""
    config, train, test = experiment.config, experiment.train, experiment.test
    targets = config["targets"]
    rows = sorted(accuracy, key=lambda name: -sum(per_seed_mean(accuracy[name])))
    cells = [["starting point of the network", *targets, "mean"]]
    for name in rows:
        columns = [*accuracy[name].values(), per_seed_mean(accuracy[name])]
        cells.append([LABELS.get(name, name), *(_percent(values) for values in columns)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))
             for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    images = f"{test.images} training images" if test.images else "all training images"
    size = f" at {train.size} x {train.size} pixels" if train.size else ""
    words = [
        "",
        f"Accuracy (%) on {len(targets)} image tasks that meta-training never saw: mean of {test.seeds} fine-tuning runs ± 95 % interval.",
        "",
        *lines,
        "",
        f"What was run: a ResNet20 was meta-trained on {len(config['tasks'])} tasks{size} ({', '.join(config['tasks'])}),",
        f"{train.steps} steps of batch {train.batch_size} on each task in {train.rounds} rounds of {train.horizon}; every method began at the same weights and saw the same batches.",
        f"Then each starting point was fine-tuned on each held-out task: {images}, {test.steps} steps of batch {test.batch_size}, a new last layer; the whole test set was scored.",
    ]
    return "\n".join(words)


def _percent(values: Sequence[float]) -> str:
    mean, half = mean_and_interval(values)
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if math.isfinite(half) else "")


def resume_command(argv: Sequence[str] | None, module: str = "cts_fast.examples.resnet20") -> str:
    """The command that goes on with this run of a program."""
    import shlex
    arguments = list(sys.argv[1:] if argv is None else argv)
    return shlex.join(["python", "-m", module, *arguments, *([] if "--resume" in arguments else ["--resume"])])


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("give at least one name")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _rates(text: str) -> dict[str, float]:
    rates = {}
    for part in _names(text):
        name, equals, value = part.partition("=")
        try:
            rates[name] = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not METHOD=NUMBER") from None
        if not 0 <= rates[name] < math.inf:
            raise argparse.ArgumentTypeError(f"{part!r}: the step size must be finite and not negative")
    return rates


if __name__ == "__main__":
    sys.exit(main())
