"""A step of each first-order method beside the fused inner step; the ratios: `python -m benchmarks.report`."""

import pytest

from benchmarks.common.setups import Setup
from benchmarks.cpu.method_cost import ADDED, LONG, make_step

SETUP = Setup("resnet20", 8)


@pytest.mark.benchmark(group=f"methods, {SETUP}, a step within a round")
@pytest.mark.parametrize("method", ["inner step", *ADDED])
def test_step_of_a_method(benchmark, flush, problems, method):
    problem = problems(SETUP)
    if method == "inner step":
        step = make_step("cts", problem, LONG, meta_interval=LONG)
    else:
        step = make_step(method, problem, LONG)
    benchmark.pedantic(step, setup=flush, rounds=20, warmup_rounds=2)
