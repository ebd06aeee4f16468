"""What tasks over ranks cost: `python -m benchmarks.scaling`.

Measured here: the step of one process, its two passes over ranks, and 1, 2 and 4 gloo ranks that share eight tasks on
this machine. From these and a link's latency and bandwidth follow step time and efficiency of 8 to 64 ranks that hold
one task each, as in the paper's runs. The all-reduce is priced as a ring of R ranks, which sends each rank's N bytes
around in 2 (R − 1) messages of N / R (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009):

    t = 2 (R − 1) (latency + N / (R · bandwidth))
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.common import machine
from benchmarks.common.measure import Budget, paired
from benchmarks.common.setups import BETA, SGD, Problem, Setup
from benchmarks.cpu.method_cost import LONG
from cts_fast import ShiftingMetaOptimizer
from cts_fast.distributed.flags import FLAGS
from cts_fast.engine.plan import Control

NETWORKS, TASKS, RANKS = ("resnet20", "resnet18"), 8, (1, 2, 4)
MANY = (8, 16, 32, 64)  # ranks that are predicted
HORIZON = 1000  # K: the interval of Reptile
INTERVALS = (1, 10, HORIZON)
TRAINING = (3.0, 300.0)  # milliseconds that a rank's forward and backward passes may take
H100 = Path(__file__).parent / "results" / "nvidia-h100-80gb-hbm3-2026-11-27.json"
WARM_UP, STEPS = 3, 15


class Link(NamedTuple):
    """What joins two ranks: microseconds before the first byte of a message arrives, and gigabytes a second one way."""

    name: str
    latency_us: float
    gb_per_s: float
    source: str


LINKS = (
    Link("25 Gb/s", 25.0, 25 / 8, "Ethernet's rate; the latency of a TCP message within a rack is an assumption"),
    Link("400 Gb/s", 14.0, 400 / 8, "InfiniBand NDR's rate; NCCL's figure for a step of a ring over a network"),
    Link("NVLink", 3.4, 450.0, "NVLink 4 of an H100, one way; NCCL's figure for a step of a ring over NVLink"),
)  # NCCL's figures: hwLat in its src/graph/tuning.cc, protocol Simple


class Costs(NamedTuple):
    """Seconds of a rank with some tasks: a step in one process, one without a meta-update, the two passes over ranks,
    and what a step over ranks does beside passes and all-reduce.
    """

    step: float
    inner: float
    partial: float
    finish: float
    beside: float

    def over_ranks(self, all_reduce: float, interval: int) -> float:
        """Mean seconds of a step with a meta-update every `interval` steps."""
        return self._mean(self.partial + all_reduce + self.finish + self.beside, interval)

    def alone(self, interval: int) -> float:
        """As `over_ranks`, where these tasks are all."""
        return self._mean(self.step, interval)

    def _mean(self, meta_update: float, interval: int) -> float:
        return self.inner + (meta_update - self.inner) / interval


def ring_seconds(ranks: int, size: int, link: Link) -> float:
    """Seconds of an all-reduce of `size` bytes."""
    return 2 * (ranks - 1) * (link.latency_us / 1e6 + size / ranks / (link.gb_per_s * 1e9))


def make(problem: Problem, group=None, **options) -> ShiftingMetaOptimizer:
    """An optimizer of the problem's tasks; its round does not end."""
    tasks = [zip(problem.names, task, strict=True) for task in problem.replicas()]
    options = {"horizon": LONG, "meta_lr": BETA, **SGD, **options}
    return ShiftingMetaOptimizer(tasks, process_group=group, **options)


# Measured ---------------------------------------------------------------------------------------------------------


def measured_costs(setup: Setup, budget: Budget) -> Costs:
    """In this process alone, which is a group of one rank. Large networks leave no cache warm by themselves."""
    problem, one = Problem(setup), dist.group.WORLD
    alone, inner, over = make(problem), make(problem, meta_interval=LONG), make(problem, one)
    over.step()  # the first one of the round; its passes run by themselves too
    ((backend, _),) = over.engine.shared  # one device and precision
    (total,), (gradients,) = over.ranks.totals, over.engine.collect(over.param_groups)
    hyper, control = over.read_hyper(), Control(True, False, True, setup.tasks)
    runs = {
        "step": alone.step,
        "inner": inner.step,
        "partial": lambda: backend.partial_(gradients, hyper, control, total),
        "finish": lambda: backend.finish_(hyper, control, total),
        "over": over.step,
    }
    seconds = paired(runs, budget, None).seconds
    found = {name: statistics.median(times) for name, times in seconds.items()}
    beside = [o - p - f for o, p, f in zip(seconds["over"], seconds["partial"], seconds["finish"], strict=True)]
    return Costs(found["step"], found["inner"], found["partial"], found["finish"], max(0.0, statistics.median(beside)))


def measured_ranks(setup: Setup, ranks: int) -> dict[str, float]:
    """Milliseconds of a step of `ranks` processes that share the tasks and this machine, and of its all-reduce."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(ranks)]
        given = (ranks, str(Path(folder) / "store"), setup, max(1, torch.get_num_threads() // ranks))
        processes = [
            context.Process(target=_rank, args=(rank, *given, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        found = [ours.recv() for ours, _ in pipes]
        for process in processes:
            process.join()
    step, reduce = (
        statistics.median(max(times) for times in zip(*each, strict=True)) for each in zip(*found, strict=True)
    )
    return {"ranks": ranks, "tasks": setup.tasks, "step_ms": 1e3 * step, "all_reduce_ms": 1e3 * reduce}


def _rank(rank: int, ranks: int, store: str, setup: Setup, threads: int, pipe) -> None:
    torch.set_num_threads(threads)
    init(rank, ranks, store)
    problem = Problem(Setup(setup.network, setup.tasks // ranks))
    opt = make(problem, dist.group.WORLD)
    numbers = torch.zeros(setup.parameters + FLAGS)
    pipe.send([_timed(run) for run in (opt.step, lambda: dist.all_reduce(numbers))])


def _timed(run) -> list[float]:
    """Seconds of each run, which all ranks begin together."""
    seconds = []
    for step in range(WARM_UP + STEPS):
        dist.barrier()
        began = perf_counter()
        run()
        if step >= WARM_UP:
            seconds.append(perf_counter() - began)
    return seconds


def init(rank: int, ranks: int, store: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    method = dist.FileStore(store, ranks)
    dist.init_process_group("gloo", store=method, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))


# Predicted --------------------------------------------------------------------------------------------------------


def h100_costs(setup: Setup) -> Costs:
    """By the bytes of each pass over the measured bandwidth of a copy, plus an empty kernel for each launch."""
    sections = json.loads(H100.read_text())["sections"]
    bandwidth = sections["bandwidth"]["bytes_per_second"]
    launch = next(row["us"]["device_warm"] for row in sections["steps"]["rows"] if row["network"] == "none") / 1e6
    rows = {"step": 5 * setup.tasks + 2, "inner": 5 * setup.tasks, "partial": 5 * setup.tasks + 2}
    rows["finish"] = 2 * setup.tasks + 3
    return Costs(**{name: launch + 4 * setup.parameters * n / bandwidth for name, n in rows.items()}, beside=2 * launch)


def predicted(costs: Costs, setup: Setup) -> list[dict]:
    """Of every link, number of ranks and interval: milliseconds of a step, and efficiency: the time of a rank's tasks
    alone over their time among the others, of the step by itself and with forward and backward passes.
    """
    rows = []
    for link in LINKS:
        for ranks in MANY:
            reduce = ring_seconds(ranks, 4 * (setup.parameters + FLAGS), link)
            for interval in INTERVALS:
                alone, over = costs.alone(interval), costs.over_ranks(reduce, interval)
                row = {"link": link.name, "ranks": ranks, "meta_interval": interval, "all_reduce_ms": 1e3 * reduce}
                row |= {"step_ms": 1e3 * over, "efficiency": alone / over}
                row |= {f"efficiency_{ms:g}": (ms / 1e3 + alone) / (ms / 1e3 + over) for ms in TRAINING}
                rows.append(row)
    return rows


# Tables -----------------------------------------------------------------------------------------------------------


def print_measured(network: str, costs: dict[int, Costs], shared: list[dict]) -> None:
    print(f"\n### {network}, this machine\n")
    print("| tasks | step, ms | inner step | partial_ | finish_ | beside |\n|---|---|---|---|---|---|")
    for tasks, found in costs.items():
        print(f"| {tasks} | " + " | ".join(f"{1e3 * seconds:.2f}" for seconds in found) + " |")
    print(f"\n| ranks that share {TASKS} tasks | step, ms | all-reduce alone, ms |\n|---|---|---|")
    for row in shared:
        print(f"| {row['ranks']} | {row['step_ms']:.2f} | {row['all_reduce_ms']:.2f} |", flush=True)


def print_predicted(title: str, rows: list[dict]) -> None:
    """A cell: milliseconds of a step, and its efficiency in per cent: step alone / with the shorter / longer passes."""
    print(f"\n### {title}\n\n| link | meta_interval | " + " | ".join(f"{ranks} ranks" for ranks in MANY) + " |")
    print("|---|---|" + "---|" * len(MANY))
    for link in LINKS:
        for interval in INTERVALS:
            cells = []
            for row in rows:
                if row["link"] == link.name and row["meta_interval"] == interval:
                    shares = [row["efficiency"], *(row[f"efficiency_{ms:g}"] for ms in TRAINING)]
                    cells.append(f"{row['step_ms']:.3g} ({' / '.join(f'{100 * share:.0f}' for share in shares)})")
            print(f"| {link.name} | {interval} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Measures, prints the tables and, if asked, writes the numbers."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="file for the numbers")
    p.add_argument("--seconds", type=float, default=15.0, help="for the passes of one network and number of tasks")
    options = p.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        init(0, 1, str(Path(folder) / "store"))
        for network in NETWORKS:
            one, many = Setup(network, 1), Setup(network, TASKS)
            costs = {s.tasks: measured_costs(s, Budget(9, 300, options.seconds)) for s in (one, many)}
            shared = [measured_ranks(many, ranks) for ranks in RANKS]
            print_measured(network, costs, shared)
            places = {"this machine": costs[1], "an H100 a rank": h100_costs(one)}
            ahead = {place: predicted(found, one) for place, found in places.items()}
            for place, rows in ahead.items():
                print_predicted(f"{network}, one task a rank, {place}", rows)
            measured = {tasks: found._asdict() for tasks, found in costs.items()}
            results.append({"network": network, "measured": measured, "shared": shared, "predicted": ahead})
        dist.destroy_process_group()
    if options.out:
        links = [link._asdict() for link in LINKS]
        text = json.dumps({"machine": machine.describe(), "links": links, "networks": results}, indent=1)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
