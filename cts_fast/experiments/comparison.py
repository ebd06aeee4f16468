"""Several finished runs of one configuration, each with a meta-training seed of its own, as one body of evidence."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cts_fast.experiments.checkpoint import CheckpointError
from cts_fast.experiments.files import first_line
from cts_fast.experiments.run_folder import CONFIG, FINISHED, SWEPT
from cts_fast.experiments.settings import labels
from cts_fast.experiments.statistics import mean, per_seed_mean
from cts_fast.experiments.weights import UNTRAINED

ByTarget = dict[str, list[float]]  # held-out task to accuracies (fractions), one per meta-training seed


class Comparison:
    """Accuracies of the runs in these folders, meant over fine-tuning seeds: what is left is one value per run.

    Raises CheckpointError that names the folder: not a finished run, another configuration, a seed that is there
    already.

    Attributes:
        config: of the runs, without their seed; seeds: of meta-training, in ascending order.
        methods: names; targets: names of held-out tasks; labels: what methods are called.
        accuracy: (method, step) to accuracies by held-out task; those of `UNTRAINED` have step 0 alone.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        runs: dict[int, tuple[Path, dict, dict]] = {}
        for folder in folders:
            config, accuracy = read_run(folder)
            seed = config.pop("seed")
            if seed in runs:
                raise CheckpointError(f"{folder} has the seed {seed} of {runs[seed][0]}: give each seed once")
            for path, other, _ in runs.values():
                if config != other:
                    keys = ", ".join(key for key in {**config, **other} if config.get(key) != other.get(key))
                    raise CheckpointError(f"{folder} is no run like {path}: {keys} differ; only the seed may")
            runs[seed] = folder, config, accuracy
        self.seeds = sorted(runs)
        _, self.config, first = runs[self.seeds[0]]
        self.methods = [name for name in self.config["methods"] if name not in UNTRAINED]
        self.targets = list(self.config["targets"])
        self.labels = labels(self.config["methods"], self.config["meta_lr"])
        self.accuracy: dict[tuple[str, int], ByTarget] = {
            point: {target: [runs[seed][2][point][target] for seed in self.seeds] for target in self.targets}
            for point in first
        }

    @property
    def final(self) -> dict[str, ByTarget]:
        """Method to the accuracies of its last phi; `UNTRAINED` ones are among them."""
        last = {name: max(step for method, step in self.accuracy if method == name) for name in self.config["methods"]}
        return {name: self.accuracy[name, step] for name, step in last.items()}

    def curve(self, method: str) -> dict[int, list[float]]:
        """Meta-training steps to accuracies, meant over held-out tasks, one per meta-training seed."""
        steps = sorted(step for name, step in self.accuracy if name == method)
        return {step: per_seed_mean(self.accuracy[method, step]) for step in steps}


def read_run(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, int], dict[str, float]]]:
    """config, and (method, step) to held-out task to accuracy, meant over fine-tuning seeds, of a finished run."""
    if runs := sorted(path.name for path in folder.glob(SWEPT)):
        raise CheckpointError(f"{folder} is a sweep, not a run: give one of its folders, {', '.join(runs)}")
    if not (folder / FINISHED).exists():
        raise CheckpointError(f"{folder} holds no finished run")
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["phase"] == "meta-test":
                    by_target = found.setdefault((row["method"], int(row["step"])), {})
                    by_target.setdefault(row["task"], []).append(float(row["accuracy"]))
    except (LookupError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be compared: {first_line(error)}") from error
    return config, {
        point: {target: mean(values) for target, values in by_target.items()} for point, by_target in found.items()
    }
