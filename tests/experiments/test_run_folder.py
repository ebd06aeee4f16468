"""One run and one program in a folder, and signals that stop it."""

import os
import shutil
import signal
import subprocess
import sys
from itertools import count

import pytest
import torch.distributed as dist

from cts_fast.distributed.launch import Team
from cts_fast.experiments.checkpoint import CheckpointError
from cts_fast.experiments.files import write_json
from cts_fast.experiments.run_folder import RunFolder
from cts_fast.experiments.signals import Interrupted, on_signals, stop_on_signals


def test_a_run_is_finished_by_its_mark_alone(tmp_path):
    with RunFolder(tmp_path, {"seed": 0}) as folder:
        write_json(tmp_path / "results.json", {})
        assert not folder.finished
        folder.finish()
        assert folder.finished
    with RunFolder(tmp_path, {"seed": 1}, overwrite=True) as again:
        assert not again.finished and not (tmp_path / "results.json").exists()


def test_two_programs_do_not_share_a_folder(tmp_path):
    with RunFolder(tmp_path, {"seed": 0}) as folder:
        folder.checkpoints("cts").save({"rank-0.pt": {}}, "step 1")
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(CheckpointError, match="another program is at work"):
                RunFolder(tmp_path, {"seed": 0}, **options)
    with RunFolder(tmp_path, {"seed": 0}, resume=True) as folder:
        assert folder.checkpoints("cts").load(lambda parts: None) == "step 1"


def test_a_killed_program_leaves_no_lock_behind(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from cts_fast.experiments.run_folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]), {}); print('mine', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(CheckpointError, match="another program"):
        RunFolder(tmp_path, {})
    process.kill()
    process.wait()
    RunFolder(tmp_path, {}).close()


def test_what_a_killed_save_left_is_taken_away(tmp_path):
    with RunFolder(tmp_path, {}) as folder:
        folder.checkpoints("cts").save({"rank-0.pt": {}}, "step 1")
    left = tmp_path / "checkpoints" / "cts" / ".000002.1-0123abcd.tmp"
    left.mkdir()
    (left / "rank-0.pt").write_bytes(b"half")
    (tmp_path / ".results.json.1-0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"not the program's")
    with RunFolder(tmp_path, {}, resume=True):
        assert not left.exists() and [path.name for path in tmp_path.glob(".*.tmp")] == [".mine.tmp"]


def test_what_is_no_run_is_not_overwritten(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    mine = [tmp_path / "checkpoints" / "model.bin", tmp_path / "weights.safetensors", tmp_path / "photo.png"]
    for path in mine:
        path.write_bytes(b"somebody's")
    with pytest.raises(CheckpointError, match="that is no run; choose another --out"):
        RunFolder(tmp_path, {}, overwrite=True)
    mine[0].unlink()
    RunFolder(tmp_path, {}, overwrite=True).close()
    assert all(path.exists() for path in mine[1:])


def test_a_program_whose_folder_was_taken_away_writes_nothing_into_another_ones(tmp_path):
    path = tmp_path / "run"
    straggler = RunFolder(path, {"seed": 0})
    kept = straggler.checkpoints("cts")
    kept.save({"rank-0.pt": {}}, "step 1")
    shutil.rmtree(path)
    with RunFolder(path, {"seed": 1}) as other:
        other.checkpoints("cts").save({"rank-0.pt": {}}, "of another run")
        before = sorted(path.rglob("*"))
        with pytest.raises(OSError, match="taken away"):
            kept.save({"rank-0.pt": {}}, "step 2")
        assert sorted(path.rglob("*")) == before
        assert other.checkpoints("cts").load(lambda parts: None) == "of another run"
    straggler.close()


def test_a_damaged_config_is_written_anew_and_the_checkpoints_say_whose_they_are(tmp_path, capsys):
    with RunFolder(tmp_path, {"seed": 1}) as folder:
        folder.checkpoints("cts").save({"rank-0.pt": {}}, "step 1")
    for damage in (b"", b"[]", b"null", b"5", b'{"seed": ', b"\xff"):
        (tmp_path / "config.json").write_bytes(damage)
        with RunFolder(tmp_path, {"seed": 1}, resume=True) as folder:
            assert "written anew" in capsys.readouterr().err
            assert folder.checkpoints("cts").load(lambda parts: None) == "step 1"
    (tmp_path / "config.json").unlink()
    with RunFolder(tmp_path, {"seed": 2}, resume=True) as folder:
        with pytest.raises(CheckpointError, match="another run.*seed was 1, now 2"):
            folder.checkpoints("cts").load(lambda parts: None)


def test_signals_ask_to_stop_and_ignored_ones_stay_ignored():
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have ignored it
    with stop_on_signals() as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.status == 128 + signal.SIGTERM
    with pytest.raises(Interrupted), stop_on_signals(at_once=True):
        signal.raise_signal(signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)
    seen = []
    with on_signals(lambda number, frame: seen.append(number), ["SIGHUP"]):
        signal.raise_signal(signal.SIGHUP)
    assert seen == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, outside)


def test_a_signal_may_come_at_any_moment_of_the_handling_of_another():
    def late(number, frame):
        raise TimeoutError("one waits for the other")

    def trace(frame, event, argument):
        nonlocal moments
        moments += 1
        if moments == moment:
            signal.raise_signal(signal.SIGTERM)
        return trace

    before, tracing = signal.signal(signal.SIGALRM, late), sys.gettrace()
    try:
        for moment in count(1):
            moments = 0
            with stop_on_signals() as stop:
                signal.alarm(5)
                sys.settrace(trace)
                signal.raise_signal(signal.SIGINT)
                sys.settrace(tracing)
            assert stop()
            if moments < moment:  # the first was handled before the second could come
                break
    finally:
        sys.settrace(tracing)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_run_that_was_taken_away_is_not_begun_anew_by_a_restart(tmp_path):
    team = Team()
    team.agents, team.launch = dist.HashStore(), "launch"
    with RunFolder(tmp_path / "run", {}, team=team):
        pass
    shutil.rmtree(tmp_path / "run")
    team.restarts = 1
    with pytest.raises(CheckpointError, match="has lost the run that this launch began there"):
        RunFolder(tmp_path / "run", {}, team=team)
    with RunFolder(tmp_path / "other", {}, team=team):  # it was never begun
        pass
