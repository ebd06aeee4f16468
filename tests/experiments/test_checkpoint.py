"""Checkpoints: whatever happens to their bytes is noticed, and one before it is whole."""

import io
import json
import os
import pickle
import random
import shutil
import time

import pytest
import torch

from cts_fast.experiments import checkpoint
from cts_fast.experiments.checkpoint import MANIFEST, CheckpointError, Checkpoints
from cts_fast.experiments.files import sha256_of, write_part

IDENTITY = {"seed": 0, "tasks": ["a", "b"], "meta_train": {"lr": 0.1, "betas": (0.9, 0.99)}}


def parts(step: int) -> dict:
    """A state as a run has it, small."""
    generator = torch.Generator().manual_seed(step)
    state = {"step": step, "theta": torch.randn(40, generator=generator), "rng": generator.get_state()[:100]}
    return {"rank-0.pt": state, "initialization.safetensors": {"w": state["theta"][:10]}}


def saved(path, steps=(1, 2, 3)) -> Checkpoints:
    kept = Checkpoints(path, IDENTITY)
    for step in steps:
        kept.save(parts(step), f"step {step}")
    return kept


def loaded(path, identity=IDENTITY) -> dict:
    found = []
    assert Checkpoints(path, identity).load(lambda given: found.append(given["rank-0.pt"])) is not None
    return found[-1]


def is_state_of(state, step) -> bool:
    expected = parts(step)["rank-0.pt"]
    return state["step"] == step and all(torch.equal(state[name], expected[name]) for name in ("theta", "rng"))


def folders(path):
    return sorted(folder.name for folder in path.iterdir())


def test_the_two_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    saved(tmp_path)
    assert folders(tmp_path) == ["000002", "000003"]
    assert is_state_of(loaded(tmp_path), 3)
    assert Checkpoints(tmp_path / "other", IDENTITY).load(lambda given: None) is None


# Damage of every kind


def truncated_to(length):
    def damage(folder):
        for path in (folder / "rank-0.pt",):
            path.write_bytes(path.read_bytes()[:length])

    return damage


class Payload:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def a_pickle(folder):
    (folder / "rank-0.pt").write_bytes(pickle.dumps(Payload(folder.parent / "ran")))


def a_zip_with_a_pickle(folder):
    file = io.BytesIO()
    torch.save(Payload(folder.parent / "ran"), file)
    (folder / "rank-0.pt").write_bytes(file.getvalue())


def with_a_new_manifest(name, value):
    """Another content of a part, and a manifest that vouches for it: not the bytes are damaged but what they say."""

    def damage(folder):
        (folder / name).unlink()
        if callable(value):
            value(folder)
        else:
            write_part(folder / name, value)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["content"]["parts"][name] = sha256_of(folder / name)
        manifest["sha256"] = checkpoint._digest(manifest["content"])
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def another_part(name):
    """The part of the checkpoint before it."""

    def damage(folder):
        before = folder.with_name(f"{int(folder.name) - 1:06}")
        shutil.copy(before / name, folder / name)

    return damage


def a_folder_in_its_place(folder):
    (folder / "rank-0.pt").unlink()
    (folder / "rank-0.pt").mkdir()


DAMAGES = {
    **{f"truncated to {n}": truncated_to(n) for n in (0, 1, 100, 1000, -1)},
    "a part is missing": lambda folder: (folder / "rank-0.pt").unlink(),
    "phi is missing": lambda folder: (folder / "initialization.safetensors").unlink(),
    "the manifest is missing": lambda folder: (folder / MANIFEST).unlink(),
    "the manifest is empty": lambda folder: (folder / MANIFEST).write_bytes(b""),
    "the manifest is a list": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "the manifest is of the one before": another_part(MANIFEST),
    "the state is of the one before": another_part("rank-0.pt"),
    "phi is of the one before": another_part("initialization.safetensors"),
    "a pickle payload": a_pickle,
    "a pickle payload in a zip": a_zip_with_a_pickle,
    "a pickle payload with a manifest": with_a_new_manifest("rank-0.pt", a_pickle),
    "a zip payload with a manifest": with_a_new_manifest("rank-0.pt", a_zip_with_a_pickle),
    "a tensor in the dict's place": with_a_new_manifest("rank-0.pt", torch.ones(3)),
    "a list in the dict's place": with_a_new_manifest("rank-0.pt", [1, 2]),
    "a folder in the file's place": a_folder_in_its_place,
}


def use(given):
    """As a program does: reads the entries that it knows."""
    state = given["rank-0.pt"]
    use.state = {name: state[name] for name in ("step", "theta", "rng")}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_passed_over_with_a_warning(kind, tmp_path, capsys):
    saved(tmp_path)
    DAMAGES[kind](tmp_path / "000003")
    kept = Checkpoints(tmp_path, IDENTITY)
    assert kept.load(use) == "step 2" and is_state_of(use.state, 2)
    message = capsys.readouterr().err
    assert "000003 is damaged" in message and "going on from" in message and "000002" in message
    assert not (tmp_path / "ran").exists()
    kept.save(parts(4), "step 4")  # the whole one stays, the damaged one goes
    assert folders(tmp_path) == ["000002", "000004"]


def test_where_none_is_whole_nothing_begins_anew_unasked(tmp_path):
    saved(tmp_path)
    for folder in ("000002", "000003"):
        (tmp_path / folder / "rank-0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"000003 is damaged.*000002 is damaged.*delete {tmp_path}"):
        Checkpoints(tmp_path, IDENTITY).load(use)
    assert folders(tmp_path) == ["000002", "000003"]


@pytest.mark.parametrize("seed", range(2))
def test_every_one_of_a_thousand_flipped_bits_is_noticed_or_changes_nothing(seed, tmp_path, capsys):
    saved(tmp_path / "kept", [1])
    folder = tmp_path / "kept" / "000001"
    files = sorted(folder.iterdir())
    sizes = [path.stat().st_size for path in files]
    generator, noticed = random.Random(seed), 0
    for _ in range(500):
        path = generator.choices(files, sizes)[0]
        content = path.read_bytes()
        at, bit = generator.randrange(len(content)), generator.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        try:
            assert Checkpoints(tmp_path / "kept", IDENTITY).load(use) == "step 1" and is_state_of(use.state, 1)
        except CheckpointError:
            noticed += 1
        path.write_bytes(content)
    assert noticed > 480  # what is left are spaces between the manifest's words


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(tmp_path):
    (tmp_path / "cts").write_bytes(b"a file in the folder's place")
    with pytest.raises(CheckpointError, match="cannot be read now"):
        Checkpoints(tmp_path / "cts", IDENTITY).load(use)


def test_what_is_damaged_is_told_also_where_the_one_before_is_of_another_run(tmp_path):
    saved(tmp_path, [1])
    other = Checkpoints(tmp_path, {**IDENTITY, "seed": 7})
    other.newest = tmp_path / "000001"  # which is kept
    other.save(parts(2), "step 2")
    (tmp_path / "000002" / "rank-0.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="another run"):  # the newest one's manifest says whose it is
        Checkpoints(tmp_path, IDENTITY).load(use)
    (tmp_path / "000002" / MANIFEST).write_bytes(b"")
    with pytest.raises(CheckpointError, match="000002 is damaged.*000001 is of another run"):
        Checkpoints(tmp_path, {**IDENTITY, "seed": 7}).load(use)


def test_numbers_of_any_length_are_in_their_order(tmp_path):
    saved(tmp_path, [1])
    (tmp_path / "000001").rename(tmp_path / "999999")
    kept = Checkpoints(tmp_path, IDENTITY)
    assert kept.load(use) == "step 1"
    kept.save(parts(2), "step 2")
    assert Checkpoints(tmp_path, IDENTITY).load(use) == "step 2"


# Of another run


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"tasks": ["a"]}, r"tasks was \['a', 'b'\], now \['a'\]"),
        ({"meta_train": {"lr": 0.2, "betas": (0.9, 0.99)}}, "meta_train.lr was 0.1, now 0.2"),
        ({"model": "ResNet18"}, "model was None, now 'ResNet18'"),
    ],
)
def test_one_of_another_run_is_refused_and_says_what_differs(change, words, tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=f"another run.*{words}"):
        Checkpoints(tmp_path, {**IDENTITY, **change}).load(use)


def test_one_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    saved(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"of format 99, and this version reads {checkpoint.FORMAT}"):
        Checkpoints(tmp_path, IDENTITY).load(use)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), MemoryError(), torch.OutOfMemoryError("x")]
)
def test_one_that_cannot_be_read_now_is_not_called_damaged(error, tmp_path):
    saved(tmp_path)

    def fails(given):
        raise error

    with pytest.raises(CheckpointError, match="000003 cannot be read now .*nothing is lost"):
        Checkpoints(tmp_path, IDENTITY).load(fails)


def test_a_real_failure_of_the_allocator_is_not_called_damage(tmp_path):
    saved(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read now"):
        Checkpoints(tmp_path, IDENTITY).load(lambda given: torch.empty(1 << 50, dtype=torch.uint8))


# When


def test_saves_are_due_by_time_and_rarer_where_they_are_dear(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    usual, asked, always = (Checkpoints(tmp_path / str(every), {}, every) for every in (None, 10.0, 0.0))
    assert not usual.due and not asked.due and always.due
    now[0] = 10
    assert asked.due and not usual.due
    now[0] = 60
    assert usual.due
    usual.cost = 3.0  # as its last save: 2 % of 150 s
    assert not usual.due
    now[0] = 150
    assert usual.due


def test_a_save_measures_what_it_costs(tmp_path):
    kept = Checkpoints(tmp_path, {})
    started = time.monotonic()
    kept.save(parts(1), "step 1")
    assert 0 < kept.cost <= time.monotonic() - started
