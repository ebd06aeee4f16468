"""What a checkpoint costs: `python -m benchmarks.cpu.checkpoint_cost`.

A run's state is saved as the image program saves it, again and again, and set against the time between two saves at
the default `--save-every`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.common import machine
from cts_fast.baselines import METHODS
from cts_fast.data import load_suite
from cts_fast.experiments.checkpoint import SAVE_EVERY, SHARE, Checkpoints
from cts_fast.experiments.meta_train import MetaTrainer
from cts_fast.experiments.settings import PRESETS
from cts_fast.models.resnet20 import ResNet20

SAVES = 7


def checkpoint_cost(tasks: int) -> dict:
    """Bytes, and the median of the seconds that a save takes; `due_every`: seconds between two of them by default."""
    chosen = [task for task in load_suite().values() if task.role == "train"][:tasks]
    trainer = MetaTrainer(METHODS["cts"], chosen, PRESETS["quick"].train, make_net=ResNet20, meta_lr=0.05, seed=0)
    trainer.train_step()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(Path(folder) / "cts", {})
        for step in range(SAVES):
            started = perf_counter()
            parts = {
                "rank-0.pt": {"trainer": trainer.state_dict()},
                "initialization.safetensors": trainer.initialization,
            }
            kept.save(parts, f"step {step}")
            seconds.append(perf_counter() - started)
        size = sum(file.stat().st_size for file in kept.newest.iterdir()) if kept.newest else 0
    cost = statistics.median(seconds)
    every = max(SAVE_EVERY, cost / SHARE)
    return {"tasks": tasks, "mib": size / 2**20, "seconds": cost, "due_every": every, "share": cost / every}


def main() -> None:
    """Measures, prints the table and, if asked, writes the numbers."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, help="file for the numbers")
    options = p.parse_args()
    rows = [checkpoint_cost(tasks) for tasks in (2, 5, 11)]
    print("| ResNet20s | MiB | ms a save | share of the time, % |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['tasks']} | {row['mib']:.1f} | {1e3 * row['seconds']:.0f} | {100 * row['share']:.2f} |")
    if options.out:
        options.out.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
