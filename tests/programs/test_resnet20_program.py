"""`python -m cts_fast.examples.resnet20`: what it writes, what it refuses, and how it goes on after Ctrl-C."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.image_tasks import make_suite, make_task
from support.processes import SLOW_ENOUGH, SMALL_NET, driven
from torchvision.models import shufflenet_v2_x0_5

from cts_fast.baselines import METHODS
from cts_fast.data import suite
from cts_fast.examples import approximation_error, resnet20
from cts_fast.experiments import cli, plots, protocol, report
from cts_fast.experiments.experiment import Experiment
from cts_fast.experiments.meta_train import MetaTrainer, MetaTrainSettings
from cts_fast.experiments.report import drawings
from cts_fast.experiments.settings import LABELS, PRESETS, halvings, method_of, snapshot_steps
from cts_fast.experiments.signals import stop_on_signals
from cts_fast.models.resnet20 import ResNet20

SMALL = ["--suite", "tiny", "--horizon", "2", "--rounds", "2", "--test-steps", "2", "--test-seeds", "2", *SMALL_NET]
THREE = ["--methods", "reptile,cts,finetune", "--model", "resnet20"]
FIGURES = ("convergence.png", "accuracy-vs-steps.png", "accuracy.png")


def run(out, *arguments):
    return resnet20.main([*SMALL, "--out", str(out), *arguments])


def newest(out, part="cts"):
    """The state in the newest checkpoint of a part of a run."""
    return sorted((out / "checkpoints" / part).iterdir())[-1] / "rank-0.pt"


def refused(capsys, out, *arguments):
    """What the program says when it ends with status 2."""
    with pytest.raises(SystemExit) as end:
        run(out, *arguments)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of three methods, with its figures."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suite.SUITES, "tiny", make_suite)
        patch.setattr(report, "drawings", drawings)
        assert run(out, *THREE) == 0
    return out


def test_results_have_the_promised_form(finished):
    results = json.loads((finished / "results.json").read_text())
    assert set(results) == {"config", "ranks", "meta_train", "meta_test", "paired_differences"}
    assert set(results["meta_train"]) == {"cts", "reptile", "finetune"}
    for curve in results["meta_train"].values():
        assert curve["steps"] == [1, 2, 3, 4]
        assert all(isinstance(loss, float) for loss in curve["loss"])
    assert set(results["meta_test"]) == {"cts", "reptile", "finetune", "scratch"}
    for by_target in results["meta_test"].values():
        assert set(by_target) == {"rings", "stars"}
        for entry in by_target.values():
            assert len(entry["accuracy"]) == 2 and all(0 <= x <= 1 for x in entry["accuracy"])


def test_metrics_hold_every_loss_and_accuracy(finished):
    with open(finished / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["phase"] == "meta-train"]
    assert {(row["method"], row["task"]) for row in train if row["step"] == "4"} == {
        ("finetune", "waves"),
        *((method, task) for method in ("cts", "reptile") for task in ("stripes", "dots", "waves")),
    }
    assert all(float(row["loss"]) > 0 for row in train)
    test = [row for row in rows if row["phase"] == "meta-test"]
    assert {int(row["step"]) for row in test} == {0, 1, 2, 4}  # scratch, and points at half the steps of the next
    assert len(test) == (3 * 3 + 1) * 2 * 2  # (three methods at three points, and scratch) x targets x seeds
    assert all(0 <= float(row["accuracy"]) <= 1 for row in test)


def test_the_initialization_is_that_of_cts_and_loads_into_a_body(finished):
    phi = load_file(finished / "initialization.safetensors")
    net = ResNet20(3)
    assert set(phi) == {name for name, _ in net.body.named_parameters()}
    assert not net.body.load_state_dict(phi, strict=False).unexpected_keys
    of_cts, of_reptile = (load_file(finished / f"initialization-{name}.safetensors") for name in ("cts", "reptile"))
    assert all(torch.equal(phi[name], of_cts[name]) for name in phi)
    assert not torch.equal(of_cts["conv.weight"], of_reptile["conv.weight"])


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_written(finished, name):
    assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_resuming_a_finished_run_prints_its_table_again(finished, capsys):
    before = (finished / "results.json").read_text()
    assert run(finished, *THREE, "--resume") == 0
    text = capsys.readouterr().out
    assert (finished / "results.json").read_text() == before
    for words in ("rings", "stars", "mean", "Reptile", "continual trajectory shifting", "scratch", "What was run"):
        assert words in text


def test_an_output_without_greek_letters_gets_its_table(tmp_path, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        assert run(tmp_path, "--methods", "scratch", "--targets", "rings", "--test-steps", "1") == 0
        with pytest.raises(SystemExit, match="0"):
            approximation_error.main(["--help"])
    output.seek(0)
    text = output.read()
    assert " ? 95 % interval" in text and "against the inner rate ?" in text


def test_differences_are_paired_by_fine_tuning_seed_and_printed_under_the_table(finished, capsys):
    results = json.loads((finished / "results.json").read_text())
    by_seed = {
        name: [sum(values) / 2 for values in zip(*(entry["accuracy"] for entry in by_target.values()), strict=True)]
        for name, by_target in results["meta_test"].items()
    }
    found = results["paired_differences"]["cts"]
    assert set(found) == {"reptile", "finetune", "scratch"}
    for name, values in found.items():
        assert values == pytest.approx([a - b for a, b in zip(by_seed["cts"], by_seed[name], strict=True)])
    run(finished, *THREE, "--resume")
    text = capsys.readouterr().out.split("(cts) minus")[1]
    assert re.search(rf"Reptile +{100 * sum(found['reptile']) / 2:+.1f} ± ", text)
    assert "one meta-training seed" in " ".join(text.split())


def test_one_run_holds_a_method_at_several_step_sizes(figures, tmp_path, capsys):
    methods = ["--methods", "reptile@0.5,reptile,reptile@2", "--meta-lr", "reptile=0.5"]
    assert run(tmp_path, *methods, "--targets", "rings") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["meta_lr"] == {"reptile@0.5": 0.5, "reptile": 0.5, "reptile@2": 2.0}
    assert results["meta_test"]["reptile@0.5"] == results["meta_test"]["reptile"]
    assert results["meta_train"]["reptile@2"] != results["meta_train"]["reptile"]
    text = capsys.readouterr().out
    assert "Reptile, β = 2" in text and "Reptile, β = 0.5" in text
    assert load_file(tmp_path / "initialization-reptile@2.safetensors")


def test_the_preset_names_the_methods_of_a_run_that_names_none():
    arguments = ["--preset", "long", "--suite", "tiny"]
    args = protocol.parser(resnet20.PROGRAM).parse_args(arguments)
    names = protocol.chosen_methods(args, PRESETS["long"])
    assert names == list(PRESETS["long"].methods) and len({method_of(name) for name in names}) == 2


def test_every_preset_has_a_step_size_for_every_method():
    assert all(set(preset.meta_lr) == set(METHODS) for preset in PRESETS.values())


@pytest.mark.parametrize(
    "horizon, rounds, points, expected",
    [
        (200, 20, 8, [31, 62, 125, 200, 400, 1000, 2000, 4000]),  # not 250 and 500: within a round
        (100, 5, 3, [100, 200, 500]),
        (240, 1, 2, [120, 240]),
        (2, 1, 8, [1, 2]),
    ],
)
def test_accuracy_is_measured_at_halved_steps_and_after_whole_rounds(horizon, rounds, points, expected):
    assert sorted(snapshot_steps(MetaTrainSettings(horizon, rounds), halvings(points))) == expected


def test_two_runs_with_one_seed_give_bit_equal_phi(finished, tmp_path):
    run(tmp_path, "--methods", "cts", "--model", "resnet20")
    one, other = (load_file(out / "initialization-cts.safetensors") for out in (finished, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_network_that_draws_random_numbers_gives_the_same_with_any_number_of_threads(tmp_path):
    found, threads = [], torch.get_num_threads()
    try:
        for i, count in enumerate((1, 4, 4)):
            torch.set_num_threads(count)
            out = tmp_path / str(i)
            assert run(out, "--methods", "cts", "--model", "support.image_tasks:with_dropout", "--points", "1") == 0
            found.append((out / "metrics.csv").read_text())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_scratch_alone_needs_no_meta_training(figures, tmp_path):
    assert run(tmp_path, "--methods", "scratch", "--targets", "rings", "--test-seeds", "1") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["meta_test"]) == {"scratch"} and not results["meta_train"]


def test_the_account_says_on_what_it_was_tested_and_what_trained_on_what(tmp_path, capsys):
    assert run(tmp_path / "a", "--methods", "scratch", "--validation", "--targets", "rings", "--test-seeds", "1") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "on training images held back from fine-tuning (--validation) of 1 image task: mean of 1 fine-tuning run."
        in text
    )
    assert "meta-trained" not in text and "test sets" not in text
    assert run(tmp_path / "b", "--methods", "cts,finetune", "--source", "dots,waves", "--test-steps", "1") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "on the test sets of 2 image tasks that meta-training never saw" in text
    assert "meta-trained support.nets:SmallNet on the tasks stripes, dots, waves: 4 steps" in text
    assert "finetune trained support.nets:SmallNet on dots, waves alone: 4 steps" in text
    assert ", 1 step of batch" in text


def test_all_methods_run_and_are_ranked(figures, tmp_path, capsys):
    arguments = ["--methods", "all", "--targets", "rings", "--rounds", "1", "--test-steps", "1", "--test-seeds", "1"]
    assert run(tmp_path, *arguments, "--model", "resnet20") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["meta_test"]) == {*METHODS, "finetune", "scratch"}
    table = capsys.readouterr().out.split("starting point")[1].split("\n\n")[0]
    accuracy = {LABELS[name]: by_target["rings"]["accuracy"][0] for name, by_target in results["meta_test"].items()}
    rows = [label for line in table.splitlines() for label in LABELS.values() if line.startswith(label + " ")]
    assert sorted(rows) == sorted(accuracy) and [accuracy[row] for row in rows] == sorted(
        accuracy.values(), reverse=True
    )


# Other networks


def test_a_run_of_another_network_begins_at_the_weights_and_holds_to_both(figures, tmp_path, capsys):
    net = shufflenet_v2_x0_5(num_classes=10)
    file, out = tmp_path / "weights.safetensors", tmp_path / "run"
    save_file(net.state_dict(), file)
    small = ["--tasks", "stripes", "--targets", "rings", "--horizon", "1", "--rounds", "1", "--test-steps", "1"]
    standing = [*small, "--test-seeds", "1", "--methods", "cts", "--meta-lr", "cts=0", "--model", "shufflenet_v2_x0_5"]
    assert run(out, *standing, "--weights", str(file)) == 0
    assert f"{file}: fc.bias, fc.weight left out" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    digest = sha256(file.read_bytes()).hexdigest()
    assert (results["config"]["model"], results["config"]["weights"]) == ("shufflenet_v2_x0_5", digest)
    assert set(results["meta_test"]) == set(results["config"]["methods"]) == {"cts", "none", "scratch"}
    assert results["meta_test"]["none"] == results["meta_test"]["cts"]  # which did not move
    phi, given = load_file(out / "initialization.safetensors"), net.state_dict()
    assert set(phi) == {name for name, _ in net.named_parameters() if not name.startswith("fc.")}
    assert all(torch.equal(tensor, given[name]) for name, tensor in phi.items())

    assert f"weights was '{digest}', now None" in refused(capsys, out, *standing, "--resume")
    other = [*standing[:-1], "support.nets:SmallNet"]
    assert "model was 'shufflenet_v2_x0_5', now 'support.nets:SmallNet'" in refused(capsys, out, *other, "--resume")
    assert "does not fit the body of resnet34" in refused(
        capsys, out, *standing[:-1], "resnet34", "--weights", str(file), "--resume"
    )


# Refusals


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--methods", "cts,sgd"], ["'sgd'", "reptile"]),
        (["--methods", "cts@fast"], ["cts@fast", "step size"]),
        (["--methods", "cts@-1"], ["cts@-1", "negative"]),
        (["--methods", "sgd@1"], ["'sgd'", "reptile"]),
        (["--methods", "finetune@1"], ["finetune@1", "no meta-update"]),
        (["--methods", "finetune", "--meta-lr", "finetune=1"], ["finetune", "takes no step size"]),
        (["--tasks", "stripes,zebra"], ["'zebra'", "stripes"]),
        (["--targets", "zebra"], ["'zebra'", "rings"]),
        (["--tasks", "stripes,rings"], ["rings", "held out"]),
        (["--suite", "nowhere"], ["nowhere", "builtin"]),
        (["--source", "zebra", "--methods", "finetune"], ["zebra", "stripes"]),
        (["--preset", "huge"], ["huge", "quick"]),
        (["--horizon", "0"], ["horizon", "'0'"]),
        (["--meta-lr", "cts=fast"], ["cts=fast"]),
        (["--meta-lr", "sgd=1"], ["'sgd'"]),
        (["--meta-lr", "reptile@1=1"], ["'reptile@1'"]),
        (["--meta-lr", "cts=-1", "--methods", "cts"], ["cts=-1", "negative"]),
        (["--device", "abacus"], ["abacus"]),
        (["--capture"], ["--capture", "--device cpu"]),
        (["--resume"], ["config.json", "no run to resume"]),
        (["--model", "resnet19"], ["'resnet19'", "resnet18"]),
        (["--model", "alexnet"], ["alexnet", "16 x 16 pixels"]),
        (["--weights", "nowhere.pt"], ["nowhere.pt", "no such file"]),
        (["--methods", "cts,none"], ["none", "--weights"]),
    ],
)
def test_bad_arguments_are_named_and_end_with_status_2(arguments, words, tmp_path, capsys):
    message = refused(capsys, tmp_path, *arguments)
    for word in words:
        assert word in message


def test_missing_data_are_named(tmp_path, capsys):
    message = refused(capsys, tmp_path / "out", "--suite", "builtin", "--data-root", str(tmp_path / "empty"))
    assert str(tmp_path / "empty") in message


def test_resuming_with_other_arguments_names_the_difference(tmp_path, capsys):
    run(tmp_path, "--methods", "scratch", "--targets", "rings")
    message = refused(capsys, tmp_path, "--methods", "scratch", "--targets", "rings", "--seed", "7", "--resume")
    assert "seed was 0, now 7" in message


# Interruption


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run leaves that nobody stops."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suite.SUITES, "tiny", make_suite)
        assert resnet20.main([*SLOW_ENOUGH, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "moment, number",
    [("meta-train cts: ", signal.SIGINT), ("meta-train cts: ", signal.SIGHUP), ("meta-test: ", signal.SIGTERM)],
)
def test_a_signal_saves_and_resume_gives_the_uninterrupted_result(moment, number, uninterrupted, tmp_path, capsys):
    process = driven(*SLOW_ENOUGH, "--out", str(tmp_path / "stopped"))
    for line in process.stdout:
        if line.startswith(moment):
            process.send_signal(number)
            break
    process.stdout.read()
    message = process.stderr.read()
    assert process.wait(timeout=120) == 128 + number, message
    assert "--resume" in message and "Traceback" not in message
    assert not (tmp_path / "stopped" / "results.json").exists()

    stopped = [*SLOW_ENOUGH, "--out", str(tmp_path / "stopped")]
    with pytest.raises(SystemExit, match="2"):
        resnet20.main(stopped)
    assert "--resume" in capsys.readouterr().err
    assert resnet20.main([*stopped, "--resume"]) == 0
    for file in ("results.json", "metrics.csv", "initialization.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (uninterrupted / file).read_bytes(), file


def test_a_script_that_registers_tasks_is_what_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(suite.REGISTERED, "own", make_task("own"))
    monkeypatch.setattr(Experiment, "run", lambda self, stop: signal.raise_signal(signal.SIGINT) or stop.check())
    assert run(tmp_path, "--targets", "own") == 130
    message = capsys.readouterr().err
    assert "your own script, with --resume" in message and "python -m" not in message


def test_a_signal_between_two_phases_is_heard(tmp_path, monkeypatch, capsys):
    phases = iter(range(3))

    def signalled(*arguments, **options):
        if next(phases) == 2:  # all is prepared, and the run has no handler yet
            signal.raise_signal(signal.SIGTERM)
        return stop_on_signals(*arguments, **options)

    monkeypatch.setattr(cli, "stop_on_signals", signalled)
    assert run(tmp_path, "--methods", "scratch") == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err and not (tmp_path / "checkpoints" / "meta-test").exists()


def test_a_signal_during_the_report_stops_it_and_resume_reports_anew(figures, tmp_path, monkeypatch, capsys):
    draw = plots.convergence

    def signalled(*arguments):
        draw(*arguments)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(plots, "convergence", signalled)
        assert run(tmp_path, "--methods", "cts") == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "finished.json").exists() and newest(tmp_path).exists()
    assert run(tmp_path, "--methods", "cts", "--resume") == 0
    assert (tmp_path / "finished.json").exists() and (tmp_path / "accuracy-vs-steps.png").exists()


# What a folder keeps


def test_a_run_whose_results_are_torn_is_not_finished_and_loses_nothing(tmp_path, capsys):
    run(tmp_path, "--methods", "cts")
    checkpoint = newest(tmp_path).read_bytes()
    (tmp_path / "finished.json").unlink()
    (tmp_path / "results.json").write_text('{"config": {')
    assert "interrupted" in refused(capsys, tmp_path, "--methods", "cts")
    assert newest(tmp_path).read_bytes() == checkpoint
    assert run(tmp_path, "--methods", "cts", "--resume") == 0
    assert json.loads((tmp_path / "results.json").read_text())["meta_test"]


def test_a_finished_run_is_replaced_only_when_that_is_asked_for(tmp_path, capsys):
    run(tmp_path, "--methods", "cts")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = refused(capsys, tmp_path, "--methods", "cts", "--seed", "1")
    assert "finished" in message and "--overwrite" in message and "--resume" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert run(tmp_path, "--methods", "cts", "--seed", "1", "--overwrite") == 0
    assert json.loads((tmp_path / "results.json").read_text())["config"]["seed"] == 1


def test_a_full_disk_ends_with_one_line_and_leaves_the_old_checkpoint_whole(tmp_path):
    out = tmp_path / "out"
    large = [*SLOW_ENOUGH, "--model", "resnet20", "--horizon", "10", "--rounds", "2", "--test-steps", "1"]
    process = driven(*large, "--out", str(out))
    for line in process.stdout:
        if line.startswith("meta-train cts"):
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=120)
    path = newest(out)
    before = path.read_bytes()
    process = driven(*large, "--out", str(out), "--resume", limit=64 << 10)  # the system's limit on a file's size
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "Traceback" not in message, message
    errors = [line for line in message.splitlines() if "error:" in line]
    assert len(errors) == 1 and str(path.parent.with_name("000002")) in errors[0] and "cannot write" in errors[0], (
        message
    )
    assert path.read_bytes() == before and not list(out.rglob(".*tmp"))
    assert resnet20.main([*large, "--out", str(out), "--resume"]) == 0


def test_a_folder_that_is_gone_is_named(tmp_path, capsys, monkeypatch):
    step = Experiment.meta_test

    def removed(self, *arguments):
        shutil.rmtree(self.out)
        step(self, *arguments)

    monkeypatch.setattr(Experiment, "meta_test", removed)
    assert str(tmp_path / "out") in refused(capsys, tmp_path / "out", "--methods", "cts")


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path, capsys, monkeypatch, error):
    run(tmp_path, "--methods", "cts", "--targets", "rings")

    def fails(self, *state, **options):
        raise error

    monkeypatch.setattr(MetaTrainer, "load_own", fails)
    message = refused(capsys, tmp_path, "--methods", "cts", "--targets", "rings", "--resume")
    assert str(newest(tmp_path).parent) in message and "nothing is lost" in message
    assert "damaged" not in message and "delete" not in message


def test_an_overwritten_run_leaves_nothing_of_the_old_one(tmp_path):
    run(tmp_path, "--methods", "reptile", "--targets", "rings", "--tensorboard")
    assert list((tmp_path / "tensorboard" / "reptile").iterdir())
    (tmp_path / ".results.json.1-0123abcd.tmp").write_bytes(b"of a killed save")
    run(tmp_path, "--methods", "scratch", "--targets", "rings", "--overwrite")
    assert not [path for path in tmp_path.rglob("*") if "reptile" in path.name or path.suffix == ".safetensors"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_resume_and_overwrite_exclude_each_other(tmp_path, capsys):
    assert "not allowed with" in refused(capsys, tmp_path, "--resume", "--overwrite")


def test_a_python_without_lzma_gets_one_line(tmp_path):
    code = "import sys; sys.modules['_lzma'] = None; from cts_fast.examples import resnet20; sys.exit(resnet20.main())"
    command = [sys.executable, "-c", code, "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert process.returncode == 2 and "liblzma" in process.stderr and "Traceback" not in process.stderr, process.stderr
