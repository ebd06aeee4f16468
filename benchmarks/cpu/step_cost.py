"""Time, bandwidth and memory of every variant's step on one set-up."""

from __future__ import annotations

from functools import partial

from benchmarks.common import machine
from benchmarks.common.measure import Budget, paired, paired_ratio, summary
from benchmarks.common.memory import step_memory
from benchmarks.common.setups import Problem, Setup
from benchmarks.common.variants import VARIANTS, check
from benchmarks.cpu.ceiling import CacheFlush, Read3Write2

CEILING, SAME_BYTES = "ceiling", "3-read-2-write, same bytes"
CEILING_BYTES = 450_000_000  # each of the five streams a read or write of 90 MB
OURS, NATIVE = "step(), cpu", "native call, cpu"
SPARE = 4 << 30  # bytes of memory that stay free


def build(setup: Setup) -> tuple[dict[str, object], dict[str, dict], dict[str, str]]:
    """Checked variants of a set-up, their memory in MiB, and why others are missing.

    Raises AssertionError for a wrong variant.
    """
    problem, parameter_bytes = Problem(setup), setup.tasks * setup.parameters * 4
    _ = problem.flat_gradients, problem.expected  # made before memory is counted
    variants, memory, missing = {}, {}, {}
    for name, kind in VARIANTS.items():
        reason = kind.unavailable(setup)
        if reason is None and machine.available_bytes() < 4 * parameter_bytes + SPARE:
            reason = "not enough free memory beside the other variants"
        if reason is None:
            make = partial(kind, problem)
            memory[name] = step_memory(make, partial(check, problem=problem), parameter_bytes)
            variants[name] = memory[name].pop("variant")
        else:
            missing[name] = reason
    return variants, memory, missing


def step_cost(setup: Setup, budget: Budget, flush: CacheFlush, shape: tuple[int, int, int]) -> list[dict[str, object]]:
    """One table for cold and one for warm caches.

    Large set-ups, whose data no cache holds from step to step, have a cold one only.

    gb_per_s counts the floor's bytes whatever a variant really moves; of_ceiling compares with the large 3-read-2-write
    of the same repeats; times_step and times_native: the variant's time over that of `step()` and of the native call,
    as paired medians.
    """
    variants, memory, missing = build(setup)
    rows, tile, ahead = shape
    ceiling = Read3Write2(rows, CEILING_BYTES // 20 // rows, tile, ahead)
    same = Read3Write2(rows, setup.floor_bytes // 20 // rows, tile, ahead)
    runs = {name: variant.step for name, variant in variants.items()} | {CEILING: ceiling.step, SAME_BYTES: same.step}
    tables = []
    for caches in ("cold", "warm") if setup.floor_bytes < 8 * machine.last_level_cache() else ("cold",):
        measured = paired(runs, budget, flush if caches == "cold" else None)
        seconds = measured.seconds
        rate = [ceiling.bytes / t for t in seconds[CEILING]]
        table = {}
        for name, times in seconds.items():
            moved = {CEILING: ceiling.bytes, SAME_BYTES: same.bytes}.get(name, setup.floor_bytes)
            row = {**summary(times), **memory.get(name, {})}
            row["gb_per_s"] = moved / row["ms"] / 1e6
            row["of_ceiling"] = paired_ratio([moved / t for t in times], rate)
            for key, base in (("times_step", OURS), ("times_native", NATIVE)):
                if base in seconds and name != CEILING:
                    row[key] = paired_ratio(times, seconds[base])
            table[name] = row
        tables.append(
            {
                "network": setup.network,
                "tasks": setup.tasks,
                "parameters": setup.parameters,
                "floor_bytes": setup.floor_bytes,
                "caches": caches,
                "quiet_repeats": measured.quiet,
                "repeats": measured.repeats,
                "variants": table,
                "missing": missing,
            }
        )
    return tables
