"""What a program does about faults: one line, the right status, and nothing lost that was saved."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import soak
import torch
from support.image_tasks import make_suite
from support.processes import SLOW_ENOUGH, SMALL_NET, driven

from cts_fast.data import suite
from cts_fast.examples import resnet20, tune
from cts_fast.experiments import meta_train

SMALL = ["--suite", "tiny", "--horizon", "4", "--rounds", "3", "--methods", "cts", "--targets", "rings"]
SMALL += ["--test-steps", "1", "--test-seeds", "1", *SMALL_NET]


def ends_with(status, capsys, out, *arguments):
    """The one line that the program says when it ends with this status."""
    with pytest.raises(SystemExit) as end:
        resnet20.main([*SMALL, "--out", str(out), *arguments])
    assert end.value.code == status
    message = capsys.readouterr().err
    lines = [line for line in message.splitlines() if not line.startswith(("warning", "  warn"))]
    assert len(lines) == 1 and "error:" in lines[0], message
    return lines[0]


def state_files(out):
    return {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}


@pytest.fixture
def one_thread():
    """Tasks take their steps in their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_gradient_that_is_not_finite_is_named_and_the_last_good_checkpoint_stays(
    one_thread, tmp_path, capsys, monkeypatch
):
    whole, calls = meta_train.loss, [0]

    def poisoned(net, x, y, precision="fp32"):
        calls[0] += 1
        value = whole(net, x, y, precision)
        return value * float("nan") if calls[0] == 3 * 5 + 2 else value  # the second of three tasks, sixth step

    monkeypatch.setattr(meta_train, "loss", poisoned)
    line = ends_with(1, capsys, tmp_path, "--save-every", "0")
    assert "cts, step 6: the gradient of task 'dots', parameter '0.weight' is not finite" in line
    assert "meta_lr" in line and str(tmp_path / "checkpoints" / "cts" / "000005") in line
    monkeypatch.setattr(meta_train, "loss", whole)
    assert resnet20.main([*SMALL, "--out", str(tmp_path), "--resume"]) == 0
    assert "goes on from step 5 of 12" in capsys.readouterr().out


@pytest.mark.parametrize("method, call", [("fomaml", 7), ("fomaml", 8), ("fomaml++", 36)])
def test_a_held_out_loss_that_is_not_finite_poisons_no_checkpoint(
    method, call, one_thread, tmp_path, capsys, monkeypatch
):
    whole, calls = meta_train.HeldOutLoss.__call__, [0]

    def poisoned(self):
        calls[0] += 1
        return whole(self) * (float("nan") if calls[0] == call else 1.0)

    monkeypatch.setattr(meta_train.HeldOutLoss, "__call__", poisoned)
    arguments = ["--methods", method, "--save-every", "0"]
    line = ends_with(1, capsys, tmp_path, *arguments)  # the last one in the last step, behind which comes no other
    assert f"{method}, at or before step" in line and "is not finite" in line
    monkeypatch.setattr(meta_train.HeldOutLoss, "__call__", whole)
    assert resnet20.main([*SMALL, "--out", str(tmp_path), *arguments, "--resume"]) == 0


def test_an_initialization_that_is_not_finite_in_the_last_step_is_no_result(tmp_path, capsys):
    arguments = ["--methods", "reptile", "--meta-lr", "reptile=1e300", "--rounds", "1"]
    line = ends_with(1, capsys, tmp_path, *arguments)
    assert "reptile, at or before step 4: the initialization's" in line and "nothing was saved yet" in line
    assert not (tmp_path / "finished.json").exists()


def test_tuning_takes_a_step_size_that_is_too_large_as_a_result(tmp_path, capsys):
    small = ["--suite", "tiny", "--horizon", "3", "--rounds", "2", "--test-steps", "1"]
    assert tune.main([*small, "--grid", "cts=0.1,1e30", "--out", str(tmp_path)]) == 0
    assert "cts@1e30" in capsys.readouterr().out


def test_no_memory_in_a_worker_thread_is_told_and_the_checkpoint_stays(one_thread, tmp_path, capsys, monkeypatch):
    whole, calls = meta_train.loss, [0]

    def greedy(*arguments, **options):
        calls[0] += 1
        if calls[0] > 3 * 5:
            torch.empty(1 << 50, dtype=torch.uint8)
        return whole(*arguments, **options)

    monkeypatch.setattr(meta_train, "loss", greedy)
    assert "out of memory" in ends_with(1, capsys, tmp_path, "--save-every", "0")
    monkeypatch.setattr(meta_train, "loss", whole)
    assert resnet20.main([*SMALL, "--out", str(tmp_path), "--resume"]) == 0
    assert "goes on from step 5 of 12" in capsys.readouterr().out


# What a resumed run is given


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suite.SUITES, "tiny", make_suite)
        assert resnet20.main([*SMALL, "--out", str(out)]) == 0
    return out


@pytest.fixture
def begun(finished, tmp_path):
    """A finished run whose report is to be made again."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "finished.json").unlink()
    return tmp_path


def test_a_finished_run_without_its_checkpoints_is_not_trained_anew_unasked(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "cts")
    capsys.readouterr()
    assert "delete finished.json" in ends_with(2, capsys, tmp_path, "--resume")


def test_what_cannot_be_trained_costs_no_older_run(begun, capsys, monkeypatch):
    few = make_suite()
    task = few["dots"]
    few["dots"] = dataclasses.replace(
        task, train=dataclasses.replace(task.train, images=task.train.images[:8], labels=task.train.labels[:8])
    )
    monkeypatch.setitem(suite.SUITES, "tiny", lambda root=None, names=None: few)
    before = state_files(begun)
    assert "dots holds none back" in ends_with(2, capsys, begun, "--methods", "fomaml", "--overwrite")
    assert state_files(begun) == before


def test_tuning_is_refused_overwritten_and_resumed_as_a_whole(tmp_path, capsys, monkeypatch):
    def run(grid, *more):
        small = ["--suite", "tiny", "--horizon", "2", "--rounds", "1", "--test-steps", "1", "--folds", "2"]
        return tune.main([*small, *SMALL_NET, "--grid", grid, "--out", str(tmp_path), *more])

    assert run("cts=0.1") == 0
    config = (tmp_path / "config.json").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        run("cts=0.2")
    assert (tmp_path / "config.json").read_bytes() == config and run("cts=0.1", "--resume") == 0
    (tmp_path / "fold1" / "config.json").unlink()
    shutil.rmtree(tmp_path / "fold1" / "checkpoints")
    for name in ("finished.json", "results.json"):
        (tmp_path / "fold1" / name).unlink(missing_ok=True)
    assert run("cts=0.1", "--resume") == 0  # killed before the fold had anything
    assert run("cts=0.2", "--overwrite") == 0
    assert run("cts=0.2", "--resume") == 0
    for bad in (["--folds", "1"], ["--folds", "0"], ["--horizon", "0"], ["--lr", "nan"]):
        with pytest.raises(SystemExit, match="2"):
            run("cts=0.1", *bad, "--overwrite")


def test_data_that_changed_since_the_start_are_named(begun, capsys, monkeypatch):
    def changed(root=None, names=None):
        tasks = make_suite(root, names)
        tasks["dots"].train.images[0, 0, 0, 0] ^= 1
        return tasks

    monkeypatch.setitem(suite.SUITES, "tiny", changed)
    before = state_files(begun)
    line = ends_with(2, capsys, begun, "--resume")
    assert "another run" in line and "data.dots was" in line and state_files(begun) == before


@pytest.mark.parametrize(
    "change, words",
    [
        (["--seed", "1"], "seed was 1, now 0"),
        (["--tasks", "stripes,dots"], "tasks was ['stripes', 'dots'], now ['stripes', 'dots', 'waves']"),
        (["--horizon", "6"], "meta_train.horizon was 6, now 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, words, begun, tmp_path_factory, capsys):
    other = tmp_path_factory.mktemp("other")
    assert resnet20.main([*SMALL, "--out", str(other), *change]) == 0
    shutil.rmtree(begun / "checkpoints" / "cts")
    shutil.copytree(other / "checkpoints" / "cts", begun / "checkpoints" / "cts")
    before = state_files(begun)
    capsys.readouterr()
    line = ends_with(2, capsys, begun, "--resume")
    assert "checkpoints/cts" in line and words in line and state_files(begun) == before


def test_a_run_of_another_model_or_version_is_refused(begun, capsys, monkeypatch):
    from cts_fast.experiments import run_folder

    other = ["--resume", "--model", "resnet20"]
    assert "model was 'support.nets:SmallNet', now 'resnet20'" in ends_with(2, capsys, begun, *other)
    monkeypatch.setattr(run_folder, "__version__", "99")
    assert "cts_fast was '0.1.0', now '99'" in ends_with(2, capsys, begun, "--resume")


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_the_result_is_the_same(tmp_path, capsys):
    assert resnet20.main([*SMALL, "--out", str(tmp_path), "--save-every", "0"]) == 0
    results = (tmp_path / "results.json").read_bytes()
    newest = sorted((tmp_path / "checkpoints" / "cts").iterdir())[-1] / "rank-0.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[:2000] + bytes([content[2000] ^ 16]) + content[2001:])
    accuracy = sorted((tmp_path / "checkpoints" / "meta-test").iterdir())[-1] / "accuracy.json"
    accuracy.write_bytes(accuracy.read_bytes().replace(b"0.", b"1."))
    capsys.readouterr()
    assert resnet20.main([*SMALL, "--out", str(tmp_path), "--resume"]) == 0
    said = capsys.readouterr()
    assert said.err.count("is damaged") == 2 and "goes on from step 11 of 12" in said.out
    assert (tmp_path / "results.json").read_bytes() == results


def test_a_damaged_suite_file_ends_a_resumed_run_and_costs_nothing(tmp_path, capsys):
    from cts_fast.data import suite as builtin

    root = tmp_path / "data"
    root.mkdir()
    file = Path(shutil.copy(Path(builtin.__file__).parent / "builtin" / builtin.BUILTIN_FILE, root))
    tasks = ["--suite", "builtin", "--data-root", str(root), "--tasks", "emoji", "--targets", "icon_concepts"]
    out = tmp_path / "run"
    arguments = [*SMALL[2:], *tasks, "--out", str(out)]
    assert resnet20.main(arguments) == 0
    before = state_files(out)
    with open(file, "r+b") as damaged:
        for at in range(1 << 16, file.stat().st_size, 1 << 15):
            damaged.seek(at)
            damaged.write(b"damage")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        resnet20.main([*arguments, "--resume"])
    assert str(file) in capsys.readouterr().err and state_files(out) == before


def test_a_folder_that_takes_no_files_is_named(capsys):
    assert "/proc/run" in ends_with(2, capsys, "/proc/run")


# Other processes


def test_a_second_program_in_the_folder_is_refused_and_the_first_goes_on(tmp_path, capsys):
    process = driven(*SLOW_ENOUGH, "--out", str(tmp_path))
    for line in process.stdout:
        if line.startswith("meta-train"):
            process.send_signal(signal.SIGSTOP)  # it is not done before the other has asked
            break
    assert "another program is at work" in ends_with(2, capsys, tmp_path, "--resume")
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
    assert json.loads((tmp_path / "results.json").read_text())["meta_test"]


def test_two_signals_in_a_row_stop_at_once_and_cost_only_the_steps_since_the_last_save(tmp_path, capsys):
    process = driven(*SLOW_ENOUGH, "--out", str(tmp_path), "--save-every", "0")
    for line in process.stdout:
        if line.startswith("meta-train cts: "):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            break
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in message and "Traceback" not in message
    assert resnet20.main([*SLOW_ENOUGH, "--out", str(tmp_path), "--resume"]) == 0
    assert "damaged" not in capsys.readouterr().err


def test_killed_again_and_again_a_run_ends_as_if_nobody_had(tmp_path):
    assert soak.soak(tmp_path, steps=200, kills=4, seed=1)["kills"] == 4
