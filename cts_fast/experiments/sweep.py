"""The same experiment with several horizons: a run in a folder for each, and what they say together (Figure 6c, d)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cts_fast.distributed.launch import ALONE, Team
from cts_fast.experiments import plots
from cts_fast.experiments.experiment import Experiment, at_images
from cts_fast.experiments.files import write_csv, write_json
from cts_fast.experiments.report import aligned, by_method, fill, meta_train, more_images, percent, report, turned
from cts_fast.experiments.run_folder import CONFIG, SWEPT, RunFolder
from cts_fast.experiments.settings import labels
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.statistics import per_seed_mean

FIGURE = "accuracy-by-horizon"
ByHorizon = Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]]  # K to method to held-out task to fractions
ByImages = Mapping[int | None, ByHorizon]  # a further number of images, or None for `test.images`, to accuracies


class Planned(Protocol):
    """A run before there is a folder for it."""

    @property
    def config(self) -> Mapping[str, Any]:
        """What defines it."""
        ...

    def check(self, config: Mapping[str, Any], team: Team) -> None:
        """Raises ValueError where it cannot run over these ranks, which were all given `config`."""
        ...

    def experiment(self, out: Path, **folder: Any) -> Experiment:
        """The run in its folder; `folder`: what to do with an older run there."""
        ...


class Sweep:
    """Runs of one experiment in the folders `horizon-K` of `out`, one after the other.

    plans: the runs; started: when the program was, by time.monotonic(); team: the ranks that share the work. Raises
    ValueError for a run that cannot be, CheckpointError as `RunFolder` does.
    """

    def __init__(
        self,
        out: Path,
        plans: Sequence[Planned],
        started: float,
        *,
        resume: bool = False,
        overwrite: bool = False,
        save_every: float | None = None,
        team: Team = ALONE,
    ) -> None:
        self.out, self.started, self.save_every, self.team = out, started, save_every, team
        self.plans = {plan.config["meta_train"]["horizon"]: plan for plan in plans}
        shared = {key: value for key, value in plans[0].config.items() if key != "meta_train"}
        self.config = {
            **shared,
            "meta_train": {str(horizon): plan.config["meta_train"] for horizon, plan in self.plans.items()},
        }
        for plan in plans:
            plan.check(self.config, team)
        options = {"resume": resume, "overwrite": overwrite, "team": team}
        self.folder = RunFolder(out, self.config, parts=(SWEPT,), **options)

    def run(self, stop: Stop) -> None:
        """All runs, each with a report of its own, then the report on all of them."""
        accuracy: dict[int | None, dict] = {}
        found = {}
        for horizon, plan in self.plans.items():
            out = self.out / SWEPT.replace("*", str(horizon))
            print(f"\nhorizon {horizon}, in {out}", flush=True)
            begun = time.monotonic()
            resume = self.folder.resume and (out / CONFIG).exists()
            experiment = plan.experiment(out, resume=resume, save_every=self.save_every, team=self.team)
            with experiment.folder:
                experiment.run(stop)
                report(experiment, out, begun, stop)
            for images in (None, *experiment.more_images):
                accuracy.setdefault(images, {})[horizon] = experiment.final_accuracy(images)
            tested = {"meta_test": by_method(experiment.final_accuracy()), **more_images(experiment)}
            found[str(horizon)] = {**meta_train(experiment), **tested}
        stop.check()
        if self.team.is_first:
            self._report(accuracy, found)

    def _report(self, accuracy: ByImages, found: Mapping[str, dict]) -> None:
        named = labels(self.config["methods"], self.config["meta_lr"])
        write_csv(self.out / "metrics.csv", ("horizon", "method", "task", "seed", "accuracy"), _rows(accuracy))
        figures = [name for images, by_horizon in accuracy.items() for name in self._draw(images, by_horizon, named)]
        write_json(self.out / "results.json", {"config": self.config, "horizons": found}, indent=1)
        self.folder.finish()
        for images, by_horizon in accuracy.items():
            heading = f"Fine-tuned on {self._count(images)}:\n\n" if len(accuracy) > 1 else ""
            print(f"\n{heading}{table(by_horizon, named)}\n")
        steps = next(iter(self.config["meta_train"].values()))["steps"]
        print(
            fill(
                f"Mean accuracy in % on the held-out tasks, ± 95 % interval over fine-tuning runs; {steps:,} steps "
                "per task with every horizon. What makes no rounds is the same run each time."
            )
        )
        minutes = (time.monotonic() - self.started) / 60
        print(
            fill(
                f"In {self.out}: {', '.join(['results.json', 'metrics.csv', *figures])}, and a folder for each "
                f"horizon. This took {minutes:.1f} minutes."
            )
        )

    def _count(self, images: int | None) -> str:
        """Which number of images it is, in words."""
        count = images or self.config["meta_test"]["images"]
        return f"{count:,} images" if count else "all images"

    def _draw(self, images: int | None, accuracy: ByHorizon, named: Mapping[str, str]) -> list[str]:
        """The figure of one number of images; returns its name, or nothing where nothing was meta-trained."""
        trained = turned({name: {k: found[name] for k, found in accuracy.items()} for name in self.config["meta_lr"]})
        untrained = [name for name in self.config["methods"] if name not in self.config["meta_lr"]]
        first = next(iter(accuracy.values()))
        levels = {target: {name: first[name][target] for name in untrained} for target in trained}
        seeds = per_seed_mean(next(iter(first.values())))
        over = plots.intervals(seeds, "fine-tuning")
        if not trained:
            return []
        name = f"{at_images(FIGURE, images)}.png"
        plots.by_target(
            self.out / name,
            trained,
            named,
            x="inner steps per round (horizon) in meta-training",
            y="accuracy after fine-tuning, %",
            title=f"Held-out tasks by the horizon of meta-training, fine-tuned on {self._count(images)}, {over}",
            levels=levels,
        )
        return [name]


def table(accuracy: ByHorizon, named: Mapping[str, str]) -> str:
    """Mean accuracy in percent by starting point and horizon."""
    rows = [["horizon", *(f"K = {horizon:,}" for horizon in accuracy)]]
    for name in next(iter(accuracy.values())):
        rows.append([named[name], *(percent(per_seed_mean(found[name])) for found in accuracy.values())])
    return aligned(rows)


def _rows(accuracy: ByImages) -> Iterator[tuple]:
    for images, by_horizon in accuracy.items():
        for horizon, by_name in by_horizon.items():
            for name, targets in by_name.items():
                for target, values in targets.items():
                    for seed, value in enumerate(values):
                        yield horizon, name, at_images(target, images), seed, value
