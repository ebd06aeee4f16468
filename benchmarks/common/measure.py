"""Paired timing: participants take turns within every repeat, so that what disturbs the machine disturbs all."""

from __future__ import annotations

import gc
import os
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.cpu.ceiling import CacheFlush

BUSY = 0.1  # of one core: a repeat in which other processes took more is no quiet one


@dataclass(frozen=True)
class Budget:
    """How long to measure: between `least` and `most` repeats, and no new one after `seconds`."""

    least: int
    most: int
    seconds: float


@dataclass(frozen=True)
class Paired:
    """Seconds of each participant, repeat by repeat; how many of the repeats were quiet, and how many there were."""

    seconds: dict[str, list[float]]
    quiet: int
    repeats: int


def paired(participants: Mapping[str, Callable[[], object]], budget: Budget, flush: CacheFlush | None) -> Paired:
    """Times every participant in every repeat; the order within a repeat is drawn anew each time.

    flush: walked before each run for cold caches; None for warm ones, where an untimed run of the same participant goes
    first. Repeats in which other processes were busy are left out as long as `least` quiet ones remain; else all count.
    """
    names = list(participants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    others: list[float] = []
    order = random.Random(0)
    began = perf_counter()
    gc.collect()
    gc.disable()
    try:
        for repeat in range(budget.most):
            if repeat >= budget.least and perf_counter() - began > budget.seconds:
                break
            order.shuffle(names)
            before, started = _others_cpu_seconds(), perf_counter()
            for name in names:
                run = participants[name]
                run() if flush is None else flush()
                start = perf_counter()
                run()
                seconds[name].append(perf_counter() - start)
            others.append((_others_cpu_seconds() - before) / (perf_counter() - started))
    finally:
        gc.enable()
    quiet = [i for i, share in enumerate(others) if share < BUSY]
    if len(quiet) >= budget.least:
        seconds = {name: [times[i] for i in quiet] for name, times in seconds.items()}
    return Paired(seconds, len(quiet), len(others))


def _others_cpu_seconds() -> float:
    """Processor time that all other processes and the host have taken so far; 0 where the system does not tell."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = fields
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and the 16th and 84th percentile, in milliseconds, and the number of runs."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    ms = {"ms": 1e3 * statistics.median(seconds), "ms_low": 1e3 * cuts[15], "ms_high": 1e3 * cuts[83]}
    return {**ms, "runs": len(seconds)}


def paired_ratio(of: list[float], to: list[float]) -> float:
    """Median over the repeats of of/to."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def paired_difference(of: list[float], to: list[float]) -> float:
    """Median over the repeats of of − to, in seconds."""
    return statistics.median(a - b for a, b in zip(of, to, strict=True))
