"""Files that are whole or not there."""

import errno
import os
import signal

import pytest
import torch

from cts_fast.experiments.run_folder import (
    RunFolder,
    load_state,
    on_signals,
    save_figure,
    save_state,
    save_tensors,
    stop_on_signals,
    write_json,
    written,
)


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), written(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with written(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_two_writers_of_one_file_do_not_share_a_temporary_one(tmp_path):
    path = tmp_path / "file"
    with written(path) as one, written(path) as other:
        assert one.name != other.name
        one.write(b"one")
        other.write(b"other")
    assert path.read_bytes() == b"one"  # the last to finish


class Full:
    """A stand-in for a device without space: /dev/full where there is one."""

    name = "/dev/full"


@pytest.mark.skipif(not os.path.exists(Full.name), reason="no /dev/full")
@pytest.mark.parametrize("write", ["save_state", "save_tensors", "save_figure", "write_json"])
def test_a_device_without_space_is_named_and_nothing_is_left(tmp_path, monkeypatch, write):
    from cts_fast.experiments import run_folder

    path, opened = tmp_path / "file.png", open
    path.write_bytes(b"old")

    def on_full_device(name, *arguments, **options):
        opened(name, "wb").close()  # the temporary file
        return opened(Full.name, *arguments, **options)

    monkeypatch.setattr(run_folder, "open", on_full_device, raising=False)
    tensor = {"x": torch.zeros(100_000)}

    def figure():
        from matplotlib.figure import Figure

        return Figure()

    calls = {
        "save_state": lambda: save_state(path, tensor),
        "save_tensors": lambda: save_tensors(path, tensor),
        "save_figure": lambda: save_figure(path, figure()),
        "write_json": lambda: write_json(path, list(range(10_000))),
    }
    with pytest.raises(OSError) as raised:
        calls[write]()
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.png"]


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"x": torch.arange(5), "steps": [1, 2], "name": "cts"}
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert torch.equal(loaded["x"], state["x"]) and loaded["steps"] == [1, 2] and loaded["name"] == "cts"


def test_a_run_is_finished_by_its_mark_alone(tmp_path):
    folder = RunFolder(tmp_path, {"seed": 0}, ("part-*.pt",))
    write_json(tmp_path / "results.json", {})
    assert not folder.finished
    folder.finish()
    assert folder.finished
    again = RunFolder(tmp_path, {"seed": 1}, ("part-*.pt",), overwrite=True)
    assert not again.finished and not (tmp_path / "results.json").exists()


def test_signals_ask_to_stop_and_ignored_ones_stay_ignored():
    with stop_on_signals() as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        assert stop() and stop.status == 128 + signal.SIGTERM
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)
    seen = []
    with on_signals(["SIGHUP"], lambda number, frame: seen.append(number)):
        signal.raise_signal(signal.SIGHUP)
    assert seen == [signal.SIGHUP] and signal.getsignal(signal.SIGHUP) == before
