"""Fixtures of `pytest benchmarks/`, and one line for each run: ms, GB/s, fraction of the ceiling."""

import os

# the profiler that counts memory announces itself at every start otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import pytest

from benchmarks.common import machine
from benchmarks.common.setups import Problem, Setup
from benchmarks.cpu import ceiling

LINES = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def flush():
    """Empties the caches."""
    if ceiling.unavailable():
        pytest.skip(ceiling.unavailable())
    return ceiling.CacheFlush(3 * machine.last_level_cache())


@pytest.fixture(scope="module")
def problems():
    """Start values and gradients of a set-up, kept while the tests of a module ask for the same one."""
    kept: dict[Setup, Problem] = {}

    def get(setup: Setup) -> Problem:
        if setup not in kept:
            kept.clear()
            kept[setup] = Problem(setup)
        return kept[setup]

    return get


@pytest.fixture
def report_rate(request, benchmark):
    """Call it with a name and the bytes of a run after the benchmark.

    The rate then stands in the summary and in the saved JSON.
    """

    def report(name: str, moved: int) -> None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["gb_per_s"] = moved / seconds / 1e9
        request.config.stash.setdefault(LINES, []).append((name, 1e3 * seconds, moved / seconds / 1e9))

    return report


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(LINES, [])
    if not lines:
        return
    highest = max((rate for name, _, rate in lines if name == "ceiling"), default=None)
    terminalreporter.section("the step's rates")
    for name, ms, rate in lines:
        share = f"{100 * rate / highest:4.0f} % of the ceiling" if highest else ""
        terminalreporter.write_line(f"{name:55} {ms:9.3f} ms {rate:7.1f} GB/s {share}")
