"""What looking for gradients that are not finite adds to a step: `python -m benchmarks.cpu.nonfinite_cost`.

`raise` looks at each tile's gradients right after it was stepped, when they are in the caches still; `skip` reads all
gradients once more beforehand, T P of the step's (5 T + 2) P numbers.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from benchmarks.common import machine
from benchmarks.common.measure import Budget, paired, summary
from benchmarks.common.setups import Problem, Setup
from benchmarks.cpu.ceiling import CacheFlush
from benchmarks.cpu.method_cost import LONG, make_step

GOALS = {"raise": 1.05, "skip": 1.25}
SETUPS = [Setup("resnet20", 8), Setup("resnet20", 32), Setup("transformer", 8), Setup("resnet18", 8)]


def nonfinite_cost(setup: Setup, budget: Budget, flush: CacheFlush | None) -> dict:
    """Milliseconds of a step that ignores them, and the two others as multiples of it.

    Each is made twice, the second time in reverse order, as in `method_cost`.
    """
    problem = Problem(setup)
    makers = {mode: partial(make_step, "cts", problem, LONG, nonfinite=mode) for mode in ("ignore", *GOALS)}
    steps = {mode: make() for mode, make in makers.items()}
    steps |= {f"{mode} again": make() for mode, make in reversed(makers.items())}
    run = paired(steps, budget, flush)
    seconds = {
        mode: [(a + b) / 2 for a, b in zip(run.seconds[mode], run.seconds[f"{mode} again"], strict=True)]
        for mode in makers
    }
    ratios = {
        mode: sorted(a / b for a, b in zip(seconds[mode], seconds["ignore"], strict=True))[len(seconds[mode]) // 2]
        for mode in GOALS
    }
    return {"setup": str(setup), "caches": "cold" if flush else "warm", **summary(seconds["ignore"]), **ratios}


def main() -> None:
    """Measures, prints the table and, if asked, writes the numbers."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, help="file for the numbers")
    options = p.parse_args()
    flush = CacheFlush(3 * machine.last_level_cache())
    rows = []
    print("| set-up | caches | ignore, ms | raise (goal 1.05) | skip (goal 1.25) |\n|---|---|---|---|---|")
    for setup in SETUPS:
        for cold in (True, False):
            row = nonfinite_cost(setup, Budget(9, 300, 12), flush if cold else None)
            rows.append(row)
            print(
                f"| {row['setup']} | {row['caches']} | {row['ms']:.2f} | {row['raise']:.3f} | {row['skip']:.3f} |",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
