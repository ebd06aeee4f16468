"""The image program on several ranks: the same results, checkpoints that any number of ranks goes on with, and faults.

Ranks are processes with gloo between them, started as torchrun starts them, and by torchrun itself. Oracle: one
process.
"""

import json
import os
import shutil
import signal
import time

import pytest
import soak
import torch
from safetensors.torch import load_file
from support import launches
from support.launches import At, Launch

from cts_fast.examples import resnet20
from cts_fast.experiments.files import read_part
from cts_fast.experiments.parallel import deal

SMALL = "--suite tiny --horizon 4 --rounds 3 --test-steps 1 --test-seeds 1 --model support.nets:SmallNet".split()
OFTEN = ["--save-every", "0"]  # at every step, where the ranks meet then, too


@pytest.fixture
def launched(tmp_path):
    """Runs `size` ranks to their end, in a folder of their own."""
    count = iter(range(100))

    def run(size, out, *arguments, methods="cts", **options):
        given = [*SMALL, "--methods", methods, "--out", str(out), *arguments]
        launch = Launch(tmp_path / f"launch {next(count)}", size, *given, **options)
        launch.statuses = launch.wait()
        return launch

    return run


def initializations(out):
    return {path.name: load_file(path) for path in out.glob("initialization-*.safetensors")}


def newest(out, part="cts"):
    return sorted((out / "checkpoints" / part).glob("[0-9]*"))[-1]


def left(out):
    """All that a run leaves, but its figures: bytes by name."""
    return {
        path.name: path.read_bytes() for pattern in ("*.json", "*.csv", "*.safetensors") for path in out.glob(pattern)
    }


def state(folder):
    """What a checkpoint holds by task, and what it holds for all."""
    parts = {path.name: read_part(path) for path in folder.glob("*.pt")}
    shared = {name: value for name, value in parts.pop("shared.pt").items() if name != "spread"}
    tasks = {name: task for part in parts.values() for name, task in part["tasks"].items()}
    return dict(soak.entries("", {"shared": shared, "tasks": dict(sorted(tasks.items()))}))


def test_work_is_dealt_by_cost_and_nobody_is_left_out():
    assert deal([5, 1, 1, 4, 3], 2) == [[0, 1, 2], [3, 4]]
    assert deal([2, 2, 2], 3) == [[0], [1], [2]]
    assert deal([1], 2) == [[0], []]
    assert deal([3, 1, 2], 1) == [[0, 1, 2]]


def test_the_results_are_those_of_one_process(tmp_path, launched):
    methods = "cts,reptile,leap,fomaml,finetune"
    assert resnet20.main([*SMALL, "--methods", methods, "--out", str(tmp_path / "one")]) == 0
    one = initializations(tmp_path / "one")
    expected = json.loads((tmp_path / "one" / "results.json").read_text())
    for size in (2, 3):
        out = tmp_path / str(size)
        launch = launched(size, out, methods=methods)
        assert launch.statuses == [0] * size and not launch.errors
        assert f"over {size} ranks" in launch.out[0] and not any(launch.out[1:])
        for name, phi in initializations(out).items():
            whole = "fomaml" in name or "finetune" in name  # which one rank trains
            for key, tensor in phi.items():
                known = one[name][key]
                assert torch.equal(tensor, known) if whole else (tensor - known).norm() <= 1e-4 * known.norm(), name
        found = json.loads((out / "results.json").read_text())
        assert found["ranks"] == size and found["config"] == expected["config"]
        assert found["meta_test"].keys() == expected["meta_test"].keys()
        for name in ("scratch", "fomaml", "finetune"):
            assert found["meta_test"][name] == expected["meta_test"][name]
        for name, curve in expected["meta_train"].items():
            assert found["meta_train"][name]["steps"] == curve["steps"]
            assert found["meta_train"][name]["loss"] == pytest.approx(curve["loss"], rel=1e-4)


@pytest.mark.parametrize("methods", ["cts", pytest.param("reptile,leap,fomaml++", marks=pytest.mark.slow)])
def test_stopped_on_one_rank_all_save_and_go_on_bit_for_bit(tmp_path, launched, methods):
    assert launched(2, tmp_path / "whole", methods=methods).statuses == [0, 0]
    out = tmp_path / "stopped"
    launch = launched(2, out, *OFTEN, methods=methods, fault=At(1, launches.TRAIN_STEP, 6, launches.asked_to_stop))
    assert launch.statuses == [143, 143]
    (note,) = (line for line in launch.errors if "To go on" in line)
    assert str(out) in note
    again = launched(2, out, *OFTEN, "--resume", methods=methods)
    assert again.statuses == [0, 0] and "goes on from step 6 of 12" in again.out[0]
    assert left(out) == left(tmp_path / "whole")


@pytest.mark.parametrize("first, then", [(2, 3), pytest.param(3, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["cts", pytest.param("leap", marks=pytest.mark.slow)])
def test_another_number_of_ranks_goes_on_with_the_same_state(tmp_path, launched, method, first, then):
    stop = At(0, launches.TRAIN_STEP, 6, launches.asked_to_stop)
    out = tmp_path / "run"
    assert launched(first, out, *OFTEN, methods=method, fault=stop).statuses == [143] * first
    before = state(newest(out, method))
    for size in (then, 1):
        again = tmp_path / f"on {size}"
        shutil.copytree(out, again)
        saved = launched(size, again, "--resume", methods=method, fault=launches.saved_again)
        assert saved.statuses == [143] * size
        assert len(list(newest(again, method).glob("rank-*.pt"))) == size
        assert state(newest(again, method)) == before
        assert launched(size, again, "--resume", methods=method).statuses == [0] * size
    assert launched(first, out, "--resume", methods=method).statuses == [0] * first
    name = f"initialization-{method}.safetensors"
    for size in (then, 1):
        for key, tensor in initializations(tmp_path / f"on {size}")[name].items():
            known = initializations(out)[name][key]
            assert (tensor - known).norm() <= 1e-4 * known.norm()


KILLS = {
    "in a step": At(1, launches.TRAIN_STEP, 6, launches.killed),
    "in an all-reduce": At(1, launches.ALL_REDUCE, 6, launches.killed),
    "in a save": At(1, launches.WRITE_PART, 6, launches.killed),
    "in a save, rank 0": At(0, launches.WRITE_PART, 12, launches.killed),
    "in the meta-test": At(1, launches.FINE_TUNING, 1, launches.killed),
    "before the start": At(1, launches.DATA, 1, launches.killed),
}
QUICK = ("in an all-reduce", "in a save")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "when", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KILLS]
)
def test_a_rank_that_is_killed_ends_the_others_and_a_restart_goes_on(tmp_path, launched, when, size):
    more = ["--tasks", "stripes,dots,waves,rings", "--targets", "stars"]
    assert launched(size, tmp_path / "whole", *more).statuses == [0] * size
    out, fault = tmp_path / "killed", KILLS[when]
    launch = launched(size, out, *OFTEN, *more, fault=fault)
    assert launch.statuses[fault.rank] == -signal.SIGKILL
    others = [status for rank, status in enumerate(launch.statuses) if rank != fault.rank]
    assert others == [1] * (size - 1)
    (line,) = (line for line in launch.errors if "error:" in line)
    assert f"of {size}: an " in line and "Where another rank is gone" in line
    again = launched(size, out, *OFTEN, *more, restarts=1)
    assert again.statuses == [0] * size and "damaged" not in "".join(again.errors)
    assert left(out) == left(tmp_path / "whole")


def test_a_gradient_that_is_not_finite_on_one_rank_is_told_as_in_one_process(tmp_path, launched, capsys):
    (tmp_path / "one").mkdir()
    launch = launched(2, tmp_path / "two", *OFTEN, fault=launches.Poisoned(1, 6))  # the sixth batch of its one task
    assert launch.statuses == [1, 1]
    (line,) = launch.errors
    assert "error: cts, step 6: the gradient of task 'dots', parameter '0.weight' is not finite; its meta_lr" in line
    assert line.endswith(f"the last good checkpoint is {tmp_path / 'two' / 'checkpoints' / 'cts' / '000005'}")
    again = launched(2, tmp_path / "two", "--resume")
    assert again.statuses == [0, 0] and "goes on from step 5 of 12" in again.out[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_lacks_is_told_once_and_ends_all(tmp_path, launched, rank):
    launch = launched(2, tmp_path, *OFTEN, fault=At(rank, launches.LOSS, 9, launches.out_of_memory))
    assert launch.statuses == [1, 1]
    (line,) = launch.errors
    assert f"rank {rank}: out of memory" in line


def test_a_folder_that_is_refused_is_refused_after_a_restart_too(tmp_path, launched):
    assert resnet20.main([*SMALL, "--methods", "cts", "--rounds", "1", "--out", str(tmp_path)]) == 0
    before = left(tmp_path)
    launch = launched(2, tmp_path, restarts=1)
    assert launch.statuses == [2, 2] and left(tmp_path) == before
    (line,) = launch.errors
    assert "holds a finished run" in line


@pytest.mark.slow
def test_what_ranks_cannot_do_is_said_before_anything_starts(tmp_path, launched):
    for size, arguments, words in (
        (4, [], "cts: 3 tasks cannot be spread over 4 ranks: give torchrun --nproc-per-node 3 or fewer"),
        (2, ["--seed", "{rank}"], "rank 1 was given something else than rank 0 (config.seed was 0, now 1)"),
        (2, ["--device", "foo"], "--device foo is none"),
        (2, ["--device", "cuda:7"], "--device cuda:7: every rank takes a GPU of its own"),
    ):
        launch = launched(size, tmp_path / "out", *arguments)
        assert launch.statuses == [2] * size and not (tmp_path / "out").exists()
        (line,) = launch.errors
        assert words in line


def test_an_argument_that_is_wrong_is_told_once(tmp_path, launched):
    launch = launched(2, tmp_path, "--rank-timeout", "0")
    assert launch.statuses == [2, 2]
    assert len([line for line in launch.errors if "is not a time above 0" in line]) == 1


@pytest.mark.parametrize("stopped", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_before_all_ranks_are_there_ends_all(tmp_path, stopped):
    launch = Launch(tmp_path / "launch", 2, *SMALL, "--out", str(tmp_path / "out"), fault=launches.Late(1 - stopped))
    while not launch.store.check([f"hello/{stopped}"]):
        time.sleep(0.01)
    launch.ranks[stopped].terminate()
    launch.ranks[stopped].join(20)
    assert launch.ranks[stopped].exitcode == 143
    launch.store.set("on with it", "")
    assert launch.wait()[1 - stopped] == 1 and not (tmp_path / "out").exists()


def test_a_rank_that_is_asked_to_stop_leaves_the_meta_test_at_once(tmp_path):
    endless = ["--test-steps", "1000000000", "--methods", "cts", "--out", str(tmp_path / "out")]
    fault = At(1, launches.FINE_TUNING_LOSS, 3, launches.asked_to_stop)
    launch = Launch(tmp_path / "launch", 2, *SMALL, *endless, fault=fault)
    launch.ranks[1].join(60)
    alone = launch.ranks[1].exitcode
    launch.ranks[0].terminate()  # as torchrun does, which kills 30 seconds later
    assert launch.wait(20) == [143, 143] and alone == 143
    (note,) = (line for line in launch.errors if "To go on" in line)
    assert str(tmp_path / "out") in note


@pytest.mark.slow
def test_a_slow_rank_only_slows(tmp_path, launched):
    assert launched(2, tmp_path / "whole").statuses == [0, 0]
    assert launched(2, tmp_path / "slow", fault=At(1, launches.TRAIN_STEP, 3, launches.slow)).statuses == [0, 0]
    assert left(tmp_path / "slow") == left(tmp_path / "whole")


def test_torchrun_goes_on_where_a_rank_was_killed(tmp_path):
    process = soak.start(soak.command(tmp_path, 60, "--save-every", "0", ranks=2))
    for line in process.stdout:
        if line.startswith("meta-train cts: 9/"):
            os.kill(soak.ranks_of(process.pid)[1], signal.SIGKILL)
            break
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "meta-train cts: goes on from step" in out and "Where another rank is gone" in errors
    assert json.loads((tmp_path / "results.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_killed_again_and_again_ranks_end_as_if_nobody_had(tmp_path):
    assert soak.soak(tmp_path, steps=200, kills=6, seed=1, ranks=2)["kills"] == 6
