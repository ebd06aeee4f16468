"""Sweeps, several numbers of images and `finetune` on two tasks over ranks. Oracle: one process."""

import json

import pytest
from safetensors.torch import load_file
from support.image_tasks import make_suite
from support.launches import Launch

from cts_fast.data import suite
from cts_fast.examples import resnet20

SMALL = "--suite tiny --rounds 2 --test-steps 1 --test-seeds 1 --points 1 --model support.nets:SmallNet".split()
SWEEP = [*SMALL, "--horizon", "4,2", "--methods", "cts,finetune", "--images", "20,8", "--source", "dots,stripes"]


def test_a_sweep_over_ranks_has_the_results_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setitem(suite.SUITES, "tiny", make_suite)
    assert resnet20.main([*SWEEP, "--out", str(tmp_path / "one")]) == 0
    launch = Launch(tmp_path / "launch", 3, *SWEEP, "--out", str(tmp_path / "ranks"))
    assert launch.wait() == [0, 0, 0], launch.errors
    assert not any(launch.out[1:])
    one, ranks = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "ranks"))
    assert ranks["config"] == one["config"]
    for horizon, found in ranks["horizons"].items():
        expected = one["horizons"][horizon]
        for name in ("finetune", "scratch"):  # two tasks for three ranks: one of them trains both
            assert found["meta_test"][name] == expected["meta_test"][name]
        assert found["meta_train"]["cts"]["loss"] == pytest.approx(expected["meta_train"]["cts"]["loss"], rel=1e-4)
        own = [json.loads((tmp_path / out / f"horizon-{horizon}/results.json").read_text()) for out in ("one", "ranks")]
        by_images = [results["meta_test_by_images"]["8"]["scratch"] for results in own]
        assert by_images[0] == by_images[1]


def test_the_body_of_a_method_that_one_rank_trains_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(suite.SUITES, "tiny", make_suite)
    small = [*SMALL, "--horizon", "2", "--methods", "cts,finetune", "--targets", "rings", "--source", "dots"]
    assert resnet20.main([*small, "--out", str(tmp_path / "one")]) == 0
    launch = Launch(tmp_path / "launch", 2, *small, "--out", str(tmp_path / "ranks"))
    assert launch.wait() == [0, 0], launch.errors
    one, ranks = (load_file(tmp_path / out / "body-finetune.safetensors") for out in ("one", "ranks"))
    assert one.keys() == ranks.keys() and all(one[name].equal(ranks[name]) for name in one)


def test_a_dry_run_over_ranks_is_refused(tmp_path):
    launch = Launch(tmp_path / "launch", 2, *SMALL, "--dry-run", "--out", str(tmp_path / "out"))
    assert launch.wait() == [2, 2]
    assert "without torchrun" in "".join(launch.errors)


def test_a_sweep_over_more_ranks_than_tasks_is_refused_before_there_is_a_folder(tmp_path):
    few = ["--tasks", "dots,stripes", "--methods", "cts", "--out", str(tmp_path / "ranks")]
    launch = Launch(tmp_path / "launch", 3, *SWEEP, *few)
    assert launch.wait() == [2, 2, 2]
    [line] = launch.errors
    assert "cts: 2 tasks cannot be spread over 3 ranks" in line and not (tmp_path / "ranks").exists()
