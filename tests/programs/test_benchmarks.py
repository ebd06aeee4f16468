"""The benchmarks' factory and variants: every variant is the same step, on shapes small enough for seconds."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import pytest
import torch

from benchmarks import report, scaling
from benchmarks.common import setups
from benchmarks.common.measure import Budget, paired, paired_difference, paired_ratio
from benchmarks.common.memory import step_memory
from benchmarks.common.setups import NETWORKS, Problem, Setup, parameter_layout
from benchmarks.common.tables import markdown
from benchmarks.common.variants import VARIANTS, check
from benchmarks.cpu import ceiling
from benchmarks.cpu.method_cost import ADDED, Traffic, make_step

SHAPES = (
    ("conv.weight", torch.Size((4, 3, 3, 3)), (27, 1, 9, 3)),
    ("bias", torch.Size((5,)), (1,)),
    ("fc.weight", torch.Size((7, 2)), (2, 1)),
)


@pytest.fixture(params=[1, 3])
def problem(request, monkeypatch):
    monkeypatch.setitem(setups.NETWORKS, "tiny", None)
    monkeypatch.setattr(setups, "parameter_layout", lambda network: SHAPES)
    return Problem(Setup("tiny", request.param))


@pytest.mark.parametrize("name", [name for name in VARIANTS if "compiled" not in name])
def test_variant_agrees_with_the_float64_reference(problem, name):
    reason = VARIANTS[name].unavailable(problem.setup)
    if reason:
        pytest.skip(reason)
    check(VARIANTS[name](problem), problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if "compiled" in name])
def test_compiled_variant_agrees_with_the_float64_reference(problem, name):
    check(VARIANTS[name](problem), problem)


def test_uncompiled_form_of_a_compiled_variant_agrees_with_the_float64_reference(problem, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda update, **options: update)
    for name in VARIANTS:
        if "compiled" in name:
            check(VARIANTS[name](problem), problem)


def test_check_notices_a_step_that_forgets_the_shift(problem, monkeypatch):
    monkeypatch.setattr("benchmarks.common.variants.shift_by_name", lambda base, tasks: None)
    with pytest.raises(AssertionError, match="NaiveLoop, tiny"):
        check(VARIANTS["naive loop"](problem), problem)


@pytest.mark.parametrize(
    ("network", "tensors", "numbers"),
    [("resnet20", 57, 269_072), ("resnet18", 60, 11_176_512), ("mlp", 4, 1_853_440), ("transformer", 48, 3_159_040)],
)
def test_set_up_has_the_parameters_of_its_network(network, tensors, numbers):
    assert network in NETWORKS
    assert len(parameter_layout(network)) == tensors
    assert Setup(network, 8).parameters == numbers
    assert Setup(network, 8).floor_bytes == 42 * numbers * 4


def test_paired_runs_give_every_participant_as_many_times():
    calls = {"a": 0, "b": 0}

    def run(name):
        calls[name] += 1

    measured = paired({name: lambda name=name: run(name) for name in calls}, Budget(3, 3, 60), None)
    assert {len(times) for times in measured.seconds.values()} == {3}
    assert calls == {"a": 6, "b": 6}  # each timed run has a warm one before it


def test_paired_median_of_ratios_is_no_ratio_of_medians():
    assert paired_ratio([1, 2, 30], [1, 4, 10]) == 1
    assert paired_difference([1, 2, 30], [1, 4, 10]) == 0


def test_memory_counts_what_a_step_keeps_and_what_it_takes_for_a_moment():
    class Variant:
        def __init__(self):
            self.kept = torch.ones(1 << 18)

        def step(self):
            self.kept += torch.ones(1 << 19)[: 1 << 18]

    memory = step_memory(Variant, lambda variant: None, parameter_bytes=0)
    assert memory["kept_mib"] == pytest.approx(1, abs=0.1)
    assert memory["peak_mib"] == pytest.approx(3, abs=0.1)


@pytest.mark.skipif(ceiling.unavailable() is not None, reason="no C compiler")
@pytest.mark.parametrize(("rows", "columns", "tile", "ahead"), [(1, 64, 64, 0), (3, 80, 32, 128)])
def test_ceiling_kernel_reads_three_streams_and_writes_two(rows, columns, tile, ahead):
    kernel = ceiling.Read3Write2(rows, columns, tile, ahead)
    kernel.step()
    start = torch.tensor(1e-3)
    moment = 0.9 * start + start
    theta = start - 0.01 * moment
    values = kernel.buffer.unique()
    assert kernel.bytes == 20 * rows * columns
    torch.testing.assert_close(values, torch.stack([theta, start, moment]))
    assert int((kernel.buffer > 1.5e-3).sum()) == rows * columns


@pytest.mark.parametrize(
    ("traffic", "mixed", "read", "written"),
    [
        (Traffic(3, 2, 0, 0), 40, 0, 0),  # of eight tasks, as the step itself
        (Traffic(1, 0, 0, 0), 0, 8, 0),
        (Traffic(0, 1, 0, 0), 0, 0, 8),
        (Traffic(3, 4, 0, 0), 40, 0, 16),
        (Traffic(2, 0, 1, 1), 2.5, 15.5, 0),
    ],
)
def test_bytes_beyond_three_read_for_two_written_are_told_from_the_others(traffic, mixed, read, written):
    setup = Setup("resnet20", 8)
    assert [size / (4 * setup.parameters) for size in traffic.moved(setup)] == pytest.approx([mixed, read, written])


def test_a_fill_leaves_zeros_alone():
    buffer = torch.ones(1001)
    ceiling.Fill(buffer)()
    assert not buffer.any()


@pytest.mark.parametrize("method", ADDED)
@pytest.mark.parametrize("horizon", [1, 5])
def test_method_to_be_timed_steps(problem, method, horizon):
    step = make_step(method, problem, horizon)
    for _ in range(3):
        step()


def test_report_names_a_missed_goal_beside_what_was_measured():
    row = dict(ms=2.0, ms_low=1.0, ms_high=3.0, gb_per_s=20.0, of_ceiling=0.5, times_step=4.0, times_native=5.0)
    names = ["released form", "naive loop", "foreach", "fused + foreach", "compiled flat + copy"]
    table = {
        "network": "resnet20",
        "tasks": 8,
        "parameters": 269_072,
        "floor_bytes": 45_204_096,
        "caches": "cold",
        "quiet_repeats": 3,
        "repeats": 4,
        "missing": {"flat": "no room"},
        "variants": dict.fromkeys([*names, "step(), cpu", "native call, cpu"], row),
    }
    facts = "processor family_model cores threads memory_gib vectors system python torch cts_fast compiler".split()
    result = {
        "machine": {**dict.fromkeys(facts, "x"), "last_level_cache_bytes": 1 << 25},
        "command": "c",
        "date": "d",
        "seconds": 1,
        "ceiling": {"gb_per_s": {"one": 40.0}},
        "steps": [table],
        "methods": [],
        "whole_steps": {},
        "host": {"backend": "cpu", "gradients": 472, "rows": {"native call": row}},
    }
    text = markdown(result, ["a.png"])
    assert "0.50 / 0.85" in text and "5.0 / 28" in text and "Left out: flat (no room)" in text


def test_an_earlier_run_is_drawn_anew_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda result, stem: [])
    monkeypatch.setattr(report, "markdown", lambda result, figures: result["text"])
    earlier = tmp_path / "earlier" / "machine-2026-01-01.json"
    earlier.parent.mkdir()
    earlier.write_text('{"text": "tables"}')
    report.main(["--redraw", str(earlier), "--out", str(tmp_path / "new")])
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name]
    assert (tmp_path / "new" / "machine-2026-01-01.md").read_text() == "tables"
    report.main(["--redraw", str(earlier)])
    assert earlier.with_suffix(".md").read_text() == "tables"


def test_a_ring_and_a_mean_step_over_ranks_are_priced_as_the_page_says():
    link = scaling.Link("a link", latency_us=1.0, gb_per_s=1.0, source="")
    assert scaling.ring_seconds(4, 4000, link) == pytest.approx(6 * (1e-6 + 1e-6))  # 2 (R − 1) messages of N / R
    costs = scaling.Costs(step=3.0, inner=1.0, partial=2.0, finish=1.0, beside=1.0)
    assert costs.alone(2) == 2.0 and costs.over_ranks(1.0, 2) == 3.0 and costs.over_ranks(1.0, 1) == 5.0
