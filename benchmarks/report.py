"""`python -m benchmarks.report`: every table and figure of the benchmarks, into benchmarks/results."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

# the profiler that counts memory announces itself at every start otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from benchmarks.common import machine
from benchmarks.common.figures import draw
from benchmarks.common.measure import Budget
from benchmarks.common.setups import NETWORKS, TASKS, Setup
from benchmarks.common.tables import markdown
from benchmarks.common.variants import Ours
from benchmarks.cpu import ceiling
from benchmarks.cpu.host import host_time
from benchmarks.cpu.method_cost import method_cost
from benchmarks.cpu.step_cost import step_cost
from benchmarks.cpu.whole_step import whole_step

RESULTS = Path(__file__).with_name("results")
FULL = [
    *(Setup("resnet20", tasks) for tasks in TASKS),
    *(Setup(network, 8) for network in ("mlp", "transformer", "resnet18")),
]
QUICK = [Setup("resnet20", 8), Setup("resnet20", 32), Setup("mlp", 8)]


def in_own_process(study: Callable, *arguments):
    """study(*arguments) in a process of its own, so that what one leaves scattered in memory does not slow the next."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(study, *arguments).result()


def measure(quick: bool, setups: list[Setup], say: Callable[[str], object], save: Callable[[dict], object]) -> dict:
    """All numbers of the report, as one JSON-like dict; what is known is saved after each part."""
    began = perf_counter()
    budget = Budget(5, 30, 4) if quick else Budget(7, 300, 6)
    flush = ceiling.CacheFlush(3 * machine.last_level_cache())
    say("the machine's ceiling")
    shape, rates = ceiling.best_shape(3 if quick else 10)
    chosen = f" --setups {','.join(map(str, setups))}" if setups not in (QUICK, FULL) else ""
    result: dict[str, object] = {
        "command": "python -m benchmarks.report" + " --quick" * quick + chosen,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "ceiling": {
            "shape": shape,
            "gb_per_s": rates,
            "alone_gb_per_s": ceiling.alone_gb_per_s(3 if quick else 10),
            "gflops_per_thread": ceiling.gflops_per_thread(),
        },
        "steps": [],
        "methods": [],
        "whole_steps": {},
        "host": None,
    }

    def next_part(name: str) -> None:
        result["seconds"] = round(perf_counter() - began)
        save(result)
        say(f"{name}: {result['seconds']} s so far")

    for setup in setups:
        next_part(str(setup))
        result["steps"] += in_own_process(step_cost, setup, budget, flush, shape)
    backend = "torch" if Ours.unavailable(Setup("resnet20", 8)) else "cpu"
    next_part("host time")
    result["host"] = {"backend": backend, **in_own_process(host_time, backend, 10 if quick else 60, flush)}
    for setup in [Setup("resnet20", 8)] if quick else [Setup("transformer", 8), Setup("resnet20", 8)]:
        next_part(f"methods, {setup}")
        result["methods"].append(
            in_own_process(method_cost, setup, replace(budget, seconds=4 * budget.seconds), flush, shape)
        )
    for network in ["resnet20"] if quick else ["resnet20", "resnet18"]:
        next_part(f"whole step, {network}")
        result["whole_steps"][network] = {
            "backend": backend,
            **in_own_process(whole_step, network, backend, 2 if quick else 5),
        }
    next_part("done")
    return result


def parse_setups(text: str) -> list[Setup]:
    """Set-ups by their names, such as resnet20-T8, with commas between them."""
    known = {str(setup): setup for network in NETWORKS for tasks in TASKS for setup in [Setup(network, tasks)]}
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown set-up {name!r}; known: {', '.join(known)}")
    return [known[name] for name in text.split(",")]


def write(stem: Path, result: dict) -> None:
    """The numbers as JSON, beside the tables and figures to come."""
    stem.with_name(stem.name + ".json").write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Measure, or read what was measured before, and write `<machine>-<date>.json`, `.md` and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three set-ups and fewer repeats")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results, or the JSON's)")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="make tables and figures of an earlier run anew")
    parser.add_argument("--setups", type=parse_setups, metavar="NETWORK-T8,…", help="these set-ups instead")
    parser.add_argument("--note", help="what a reader must know of the conditions; stands at the top of the tables")
    options = parser.parse_args(arguments)
    out = options.out or (options.redraw.parent if options.redraw else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    if options.redraw:
        stem, result = out / options.redraw.stem, json.loads(options.redraw.read_text())
    else:
        today = f"{datetime.now(timezone.utc):%Y-%m-%d}"
        stem = out / f"{machine.name()}-{today}{'-quick' if options.quick else ''}"
        setups = options.setups or (QUICK if options.quick else FULL)
        result = measure(options.quick, setups, partial(print, file=sys.stderr, flush=True), partial(write, stem))
    if options.note:
        result["note"] = options.note
        write(stem, result)
    figures = draw(result, stem)
    text = markdown(result, [path.name for path in figures])
    stem.with_name(stem.name + ".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
