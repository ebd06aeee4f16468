"""Files that are whole or not there."""

import errno
import os

import pytest
import torch

from cts_fast.experiments import files
from cts_fast.experiments.checkpoint import Checkpoints
from cts_fast.experiments.files import read_part, save_figure, save_tensors, sha256_of, write_json, write_part, written


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


@pytest.mark.parametrize("name", ["state.pt", "numbers.json"])
def test_a_part_comes_back_as_it_was_and_its_digest_is_that_of_the_file(tmp_path, name):
    value = {"steps": [1, 2], "name": "cts"} | ({"x": torch.arange(5)} if name == "state.pt" else {})
    digest = write_part(tmp_path / name, value)
    assert digest == sha256_of(tmp_path / name)
    loaded = read_part(tmp_path / name)
    assert torch.equal(loaded.pop("x", torch.arange(5)), torch.arange(5)) and loaded == {"steps": [1, 2], "name": "cts"}


class Full:
    """A stand-in for a device without space: /dev/full where there is one."""

    name = "/dev/full"


@pytest.mark.skipif(not os.path.exists(Full.name), reason="no /dev/full")
@pytest.mark.parametrize("write", ["checkpoint", "save_tensors", "save_figure", "write_json"])
def test_a_device_without_space_is_named_and_nothing_is_left(tmp_path, monkeypatch, write):
    path, opened = tmp_path / "file.png", open
    path.write_bytes(b"old")
    tensor = {"x": torch.zeros(100_000)}
    kept = Checkpoints(tmp_path / "cts", {})
    kept.save({"rank-0.pt": tensor}, "before")
    before = sorted(tmp_path.rglob("*"))

    def on_full_device(name, mode="r", *arguments, **options):
        if set(mode) & set("wx"):
            opened(name, mode).close()  # the temporary file
            return opened(Full.name, mode.replace("x", "w"), *arguments, **options)
        return opened(name, mode, *arguments, **options)

    monkeypatch.setattr(files, "open", on_full_device, raising=False)

    def figure():
        from matplotlib.figure import Figure

        return Figure()

    calls = {
        "checkpoint": lambda: kept.save({"rank-0.pt": tensor}, "after"),
        "save_tensors": lambda: save_tensors(path, tensor),
        "save_figure": lambda: save_figure(path, figure()),
        "write_json": lambda: write_json(path, list(range(10_000))),
    }
    with pytest.raises(OSError) as raised:
        calls[write]()
    named = tmp_path / "cts" / "000002" if write == "checkpoint" else path
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(named)
    assert path.read_bytes() == b"old" and sorted(tmp_path.rglob("*")) == before
    assert kept.load(lambda parts: None) == "before"
