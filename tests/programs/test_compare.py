"""`python -m cts_fast.examples.compare`: several seeds together, against their own files, and what it refuses."""

import csv
import json
import math
import shutil

import pytest
import torch
from support.image_tasks import make_suite
from support.nets import SmallNet
from support.processes import SMALL_NET

from cts_fast.data import suite
from cts_fast.examples import compare, resnet20
from cts_fast.experiments.settings import LABELS
from cts_fast.experiments.statistics import mean_and_interval

SMALL = "--suite tiny --horizon 2 --rounds 1 --test-steps 1 --test-seeds 2 --methods reptile@1,cts".split()
SMALL += SMALL_NET


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of one run with seeds 0 and 1."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suite.SUITES, "tiny", make_suite)
        for seed in range(2):
            assert resnet20.main([*SMALL, "--seed", str(seed), "--out", str(root / str(seed))]) == 0
    return root


def compared(capsys, out, *folders):
    """What the program prints, and compare.json."""
    capsys.readouterr()
    assert compare.main([*map(str, folders), "--out", str(out)]) == 0
    return capsys.readouterr().out, json.loads((out / "compare.json").read_text())


def refused(capsys, *arguments):
    """What the program says when it ends with status 2."""
    with pytest.raises(SystemExit) as end:
        compare.main(list(map(str, arguments)))
    assert end.value.code == 2
    return capsys.readouterr().err


def means(folder):
    """(method, step) to the mean of all accuracies in metrics.csv: targets have equally many fine-tuning seeds."""
    found = {}
    with open(folder / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["phase"] == "meta-test":
                found.setdefault((row["method"], int(row["step"])), []).append(float(row["accuracy"]))
    return {point: sum(values) / len(values) for point, values in found.items()}


def test_means_and_differences_are_those_of_the_runs_in_the_order_of_their_seeds(runs, tmp_path, capsys):
    text, found = compared(capsys, tmp_path, runs / "1", runs / "0")
    assert found["seeds"] == [0, 1]
    of_runs = [means(runs / str(seed)) for seed in range(2)]
    for entry in found["meta_test"]:
        values = [sum(values) / 2 for values in zip(*entry["accuracy"].values(), strict=True)]
        assert values == pytest.approx([run[entry["method"], entry["step"]] for run in of_runs])
    ahead = found["paired_differences"]["cts"]
    assert set(ahead) == {"reptile@1", "scratch"}
    for other, by_step in ahead.items():
        assert set(by_step) == {"1", "2"}
        for step, values in by_step.items():
            of_other = [run[other, 0 if other == "scratch" else int(step)] for run in of_runs]
            assert values == pytest.approx(
                [run["cts", int(step)] - x for run, x in zip(of_runs, of_other, strict=True)]
            )
        along = found["paired_differences_over_the_curve"]["cts"][other]  # two points: their mean
        assert along == pytest.approx([(x + y) / 2 for x, y in zip(by_step["1"], by_step["2"], strict=True)])
    centre, half = mean_and_interval(ahead["reptile@1"]["2"])
    assert f"{100 * centre:+.1f} ± {100 * half:.1f}" in text and "2 meta-training seeds (0, 1)" in text
    assert "Reptile, β = 1" in text and "Steps to equal accuracy" in text
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("accuracy.png", "accuracy-vs-steps.png")
    )
    pairs = [(entry["of"], entry["by"], entry["after"]) for entry in found["steps_to_equal_accuracy"]]
    assert sorted(pairs) == [("cts", "reptile@1", 1), ("cts", "reptile@1", 2), ("reptile@1", "cts", 2)]
    assert all(entry["steps"] is None or 1 <= entry["steps"] <= 2 for entry in found["steps_to_equal_accuracy"])


def test_given_weights_are_one_point_that_others_are_compared_with_at_every_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(suite.SUITES, "tiny", make_suite)
    torch.save(SmallNet(2).state_dict(), tmp_path / "weights.pt")
    weights = ["--weights", str(tmp_path / "weights.pt")]
    for seed in ("0", "1"):
        assert resnet20.main([*SMALL, *weights, "--methods", "cts", "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    text, found = compared(capsys, tmp_path / "compared", tmp_path / "0", tmp_path / "1")
    of_runs = [means(tmp_path / seed) for seed in ("0", "1")]
    assert {name for name, _ in of_runs[0]} == {"cts", "none", "scratch"} and LABELS["none"] in text
    for step, values in found["paired_differences"]["cts"]["none"].items():
        assert values == pytest.approx([run["cts", int(step)] - run["none", 0] for run in of_runs])


def test_one_run_has_no_interval_and_that_is_said(runs, tmp_path, capsys):
    text, found = compared(capsys, tmp_path, runs / "1")
    assert "one gives no interval" in text and "±" not in text.replace("± is", "")
    assert all(entry["interval"] == [None, None] for entry in found["steps_to_equal_accuracy"])
    assert math.isfinite(found["paired_differences"]["cts"]["reptile@1"]["2"][0])


def test_runs_that_cannot_be_compared_are_named(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(suite.SUITES, "tiny", make_suite)
    other, out = tmp_path / "other", tmp_path / "out"
    assert resnet20.main([*SMALL, "--targets", "rings", "--seed", "9", "--out", str(other)]) == 0
    message = refused(capsys, runs / "0", other, "--out", out)
    assert str(other) in message and "targets" in message and "only the seed may" in message
    assert str(runs / "0") in refused(capsys, runs / "0", runs / "0", "--out", out)
    assert f"{runs / '1'} is a run itself" in refused(capsys, runs / "0", "--out", runs / "1")
    shutil.copytree(runs / "1", tmp_path / "half")
    (tmp_path / "half" / "finished.json").unlink()
    assert "no finished run" in refused(capsys, runs / "0", tmp_path / "half", "--out", out)
    assert "no finished run" in refused(capsys, tmp_path / "nowhere", "--out", out)
    (tmp_path / "half" / "finished.json").write_text("{}")
    (tmp_path / "half" / "metrics.csv").write_text("phase,method\nmeta-test,cts\n")
    assert f"{tmp_path / 'half'} cannot be compared" in refused(capsys, tmp_path / "half", "--out", out)
    assert not out.exists()
