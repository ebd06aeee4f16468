"""The same experiment with several horizons: a run in a folder for each, and what they say together (Figure 6c, d)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cts_fast.distributed.launch import ALONE, Team
from cts_fast.experiments import plots
from cts_fast.experiments.experiment import Experiment
from cts_fast.experiments.files import write_csv, write_json
from cts_fast.experiments.report import aligned, by_method, fill, meta_train, percent, report, turned
from cts_fast.experiments.run_folder import CONFIG, SWEPT, RunFolder
from cts_fast.experiments.settings import labels
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.statistics import per_seed_mean

FIGURE = "accuracy-by-horizon.png"
ByHorizon = Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]]  # K to method to held-out task to fractions


class Sweep:
    """Runs of one experiment in the folders `horizon-K` of `out`, one after the other.

    configs: of the runs; experiments: what makes one, given its folder and what to do with an older run there;
    started: when the program was, by time.monotonic(); team: the ranks that share the work. Raises CheckpointError as
    `RunFolder` does.
    """

    def __init__(
        self,
        out: Path,
        configs: Sequence[Mapping[str, Any]],
        experiments: Sequence[Callable[..., Experiment]],
        started: float,
        *,
        resume: bool = False,
        overwrite: bool = False,
        save_every: float | None = None,
        team: Team = ALONE,
    ) -> None:
        self.out, self.started, self.save_every, self.team = out, started, save_every, team
        self.make = {config["meta_train"]["horizon"]: make for config, make in zip(configs, experiments, strict=True)}
        shared = {key: value for key, value in configs[0].items() if key != "meta_train"}
        self.config = {
            **shared,
            "meta_train": {str(k): c["meta_train"] for k, c in zip(self.make, configs, strict=True)},
        }
        options = {"resume": resume, "overwrite": overwrite, "team": team}
        self.folder = RunFolder(out, self.config, parts=(SWEPT,), **options)

    def run(self, stop: Stop) -> None:
        """All runs, each with a report of its own, then the report on all of them."""
        accuracy, losses = {}, {}
        for horizon, make in self.make.items():
            out = self.out / SWEPT.replace("*", str(horizon))
            print(f"\nhorizon {horizon}, in {out}", flush=True)
            begun = time.monotonic()
            resume = self.folder.resume and (out / CONFIG).exists()
            experiment = make(out, resume=resume, save_every=self.save_every, team=self.team)
            with experiment.folder:
                experiment.run(stop)
                report(experiment, out, begun, stop)
            accuracy[horizon], losses[horizon] = experiment.final_accuracy(), meta_train(experiment)
        stop.check()
        if self.team.is_first:
            self._report(accuracy, losses)

    def _report(self, accuracy: ByHorizon, losses: Mapping[int, dict]) -> None:
        named = labels(self.config["methods"], self.config["meta_lr"])
        write_csv(self.out / "metrics.csv", ("horizon", "method", "task", "seed", "accuracy"), _rows(accuracy))
        trained = turned({name: {k: found[name] for k, found in accuracy.items()} for name in self.config["meta_lr"]})
        untrained = [name for name in self.config["methods"] if name not in self.config["meta_lr"]]
        first = next(iter(accuracy.values()))
        levels = {target: {name: first[name][target] for name in untrained} for target in trained}
        seeds = per_seed_mean(next(iter(first.values())))
        over = plots.intervals(seeds, "fine-tuning")
        if trained:
            plots.by_target(
                self.out / FIGURE,
                trained,
                named,
                x="inner steps per round (horizon) in meta-training",
                y="accuracy after fine-tuning, %",
                title=f"Held-out tasks by the horizon of meta-training, {over}",
                levels=levels,
            )
        results = {"horizons": {str(k): {**losses[k], "meta_test": by_method(accuracy[k])} for k in accuracy}}
        write_json(self.out / "results.json", {"config": self.config, **results}, indent=1)
        self.folder.finish()
        print(f"\n{table(accuracy, named)}\n")
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
                f"In {self.out}: results.json, metrics.csv, {FIGURE}, and a folder for each horizon. This took "
                f"{minutes:.1f} minutes."
            )
        )


def table(accuracy: ByHorizon, named: Mapping[str, str]) -> str:
    """Mean accuracy in percent by starting point and horizon."""
    rows = [["horizon", *(f"K = {horizon:,}" for horizon in accuracy)]]
    for name in next(iter(accuracy.values())):
        rows.append([named[name], *(percent(per_seed_mean(found[name])) for found in accuracy.values())])
    return aligned(rows)


def _rows(accuracy: ByHorizon) -> Iterator[tuple]:
    for horizon, by_name in accuracy.items():
        for name, targets in by_name.items():
            for target, values in targets.items():
                for seed, value in enumerate(values):
                    yield horizon, name, target, seed, value
