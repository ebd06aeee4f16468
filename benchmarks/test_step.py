"""The step's variants, one after the other: `pytest benchmarks/`.

Paired runs and all set-ups: `python -m benchmarks.report`.
"""

import pytest

from benchmarks.common.setups import Setup
from benchmarks.common.variants import VARIANTS, check
from benchmarks.cpu.ceiling import Read3Write2
from benchmarks.cpu.step_cost import CEILING_BYTES

SETUPS = {Setup("resnet20", 8): 30, Setup("mlp", 8): 10, Setup("resnet20", 32): 10}  # set-up → rounds
LARGE = {Setup("resnet18", 8): 3}
LARGE_VARIANTS = ("naive loop", "foreach", "fused + foreach", "step(), cpu")


@pytest.mark.benchmark(group="ceiling")
def test_ceiling(benchmark, flush, report_rate):
    kernel = Read3Write2(8, CEILING_BYTES // 20 // 8, 4096, 256)
    benchmark.pedantic(kernel.step, rounds=10, warmup_rounds=1)
    report_rate("ceiling", kernel.bytes)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_step_with_cold_caches(benchmark, flush, problems, report_rate, setup, name):
    _measure(benchmark, flush, problems, report_rate, setup, name, SETUPS[setup])


@pytest.mark.parametrize("setup", LARGE, ids=str)
@pytest.mark.parametrize("name", LARGE_VARIANTS)
def test_step_of_a_large_network(benchmark, flush, problems, report_rate, setup, name):
    _measure(benchmark, flush, problems, report_rate, setup, name, LARGE[setup])


def _measure(benchmark, flush, problems, report_rate, setup, name, rounds):
    kind = VARIANTS[name]
    if kind.unavailable(setup):
        pytest.skip(kind.unavailable(setup))
    problem = problems(setup)
    variant = kind(problem)
    check(variant, problem)
    benchmark.group = f"{setup}, cold caches"
    benchmark.pedantic(variant.step, setup=flush, rounds=rounds, warmup_rounds=1)
    report_rate(f"{setup}, {name}", setup.floor_bytes)
