"""Data of one's own: folders of images, torch data sets, registered tasks, several suites at once."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import layouts
from support.image_tasks import make_task

import cts_fast.data
from cts_fast.data import DamagedFile, MissingData, Storage, Task, load_suite, suite, task_roles
from cts_fast.data.folder import usual_size
from cts_fast.examples import resnet20


def write(folder, counts, side=16):
    """Class folders with so many images that show the class's number; the second image of each lies deeper."""
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            layouts.jpeg(folder / name / ("more" if i == 1 else "") / f"{name}{i}.jpg", label, side)
        (folder / name / "notes.txt").write_text("no image")


@pytest.fixture
def root(tmp_path):
    """A task with a split of its own, and one without."""
    write(tmp_path / "root/birds/train", {"crow": 3, "owl": 4, "wren": 3})
    write(tmp_path / "root/birds/test", {"crow": 2, "wren": 1})
    layouts.jpeg(tmp_path / "root/birds/test/wren/w.jpg", 2)
    (tmp_path / "root/birds/test/wren/wren0.jpg").unlink()
    write(tmp_path / "root/cars", {"old": 10, "new": 5}, side=70)
    (tmp_path / "root/.hidden").mkdir()
    return tmp_path / "root"


def test_every_subfolder_is_a_task_with_its_own_split_or_a_seeded_one(root):
    assert task_roles("folder", root) == {"birds": "train", "cars": "train"}
    birds, cars = load_suite("folder", root).values()
    assert birds.classes == ("crow", "owl", "wren") and cars.classes == ("new", "old")
    assert birds.train.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 3 == layouts.labels_of(birds.train.images[:])
    assert birds.test.labels.tolist() == [0, 0, 2]
    assert (cars.train.labels.bincount().tolist(), cars.test.labels.bincount().tolist()) == ([4, 8], [1, 2])
    assert birds.train.images.shape[1:] == (3, 28, 28) and cars.train.images.shape[1:] == (3, 64, 64)
    again = load_suite("folder", root, ["cars"], Storage(cache=root.parent / "other"))["cars"]
    assert torch.equal(again.test.images[:], cars.test.images[:])
    assert list(task_roles("folder", root)) == ["birds", "cars"]  # the cache is no task


def test_linked_folders_count_but_none_twice(root):
    owls = root / "birds/train/owl"
    before = load_suite("folder", root, ["birds"])["birds"].train
    shutil.move(owls, root.parent / "elsewhere")
    owls.mkdir()
    (owls / "linked").symlink_to(root.parent / "elsewhere", target_is_directory=True)
    after = load_suite("folder", root, ["birds"])["birds"].train
    assert torch.equal(after.labels, before.labels) and torch.equal(after.images[:], before.images[:])
    for target in (owls, root / "birds", root, root / "birds/train/crow", root / "birds/test"):
        link = root / "birds/train/wren/link"
        link.symlink_to(target, target_is_directory=True)
        with pytest.raises(DamagedFile, match="is a link to a folder whose images are counted already"):
            load_suite("folder", root, ["birds"])
        link.unlink()


def test_what_cannot_be_read_in_a_folder_is_named_and_hidden_folders_do_not_count(root, monkeypatch):
    crows = root / "birds/train/crow"
    count = len(load_suite("folder", root, ["birds"])["birds"].train)
    write(crows / ".checkpoints", {"copy": 1})
    assert len(load_suite("folder", root, ["birds"])["birds"].train) == count
    (crows / "gone.jpg").symlink_to(root / "nowhere.jpg")
    with pytest.raises(DamagedFile, match="gone.jpg is no file, or a link that leads nowhere"):
        load_suite("folder", root, ["birds"])
    (crows / "gone.jpg").unlink()
    os.mkfifo(crows / "pipe.png")
    with pytest.raises(DamagedFile, match="pipe.png is no file"):
        load_suite("folder", root, ["birds"])
    (crows / "pipe.png").unlink()
    shutil.copy(next(crows.glob("*.jpg")), os.fsencode(crows) + b"/caf\xe9.jpg")
    with pytest.raises(DamagedFile, match="the name is not UTF-8"):
        load_suite("folder", root, ["birds"])
    os.unlink(os.fsencode(crows) + b"/caf\xe9.jpg")
    listed = os.scandir

    def locked(path):  # what a user who is not root meets
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DamagedFile, match=r"crow/more cannot be read \(Permission denied\)"):
        load_suite("folder", root, ["birds"])


@pytest.mark.parametrize("locked", ["", "birds", "birds/train"])
def test_a_locked_folder_is_named(tmp_path, monkeypatch, locked):
    for part in ("train", "test"):
        write(tmp_path / "birds" / part, {"crow": 2, "owl": 2})
    allowed = os.access  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / locked and allowed(path, mode))
    with pytest.raises(DamagedFile, match=rf"{tmp_path / locked} cannot be read \(Permission denied\): change that"):
        load_suite("folder", tmp_path)


@pytest.mark.parametrize("suite", ["paper", "imagenet"])
def test_a_locked_data_root_is_named(tmp_path, monkeypatch, suite):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DamagedFile, match=rf"{tmp_path} cannot be read \(Permission denied\): change that"):
        load_suite(suite, tmp_path)


@pytest.mark.parametrize("name", ["birds,fish", "birds\nfish", b"caf\xe9"])
def test_a_name_that_options_and_tables_cannot_hold_is_refused(tmp_path, name):
    name = os.fsdecode(name)
    (tmp_path / name).mkdir()
    for use in (
        lambda: task_roles("folder", tmp_path),
        lambda: cts_fast.data.register(name, make_task),
        lambda: dataclasses.replace(make_task("birds"), name=name).checked(),
    ):
        with pytest.raises(ValueError, match="cannot be called .*: give it a name with no comma"):
            use()


def test_a_split_in_capitals_is_no_class(tmp_path):
    for part in ("Train", "Test"):
        write(tmp_path / "task" / part, {"a": 2, "b": 2})
    with pytest.raises(DamagedFile, match="holds Test and Train: call them test and train"):
        load_suite("folder", tmp_path)
    write(tmp_path / "vehicles", {"Train": 4, "Car": 4})
    assert load_suite("folder", tmp_path, ["vehicles"])["vehicles"].classes == ("Car", "Train")


@pytest.mark.parametrize("parts", [("Training", "Testing"), ("seg_train", "seg_test"), ("Test", "Train", "Valid")])
def test_splits_of_other_names_are_no_classes(tmp_path, parts):
    for part in parts:
        write(tmp_path / "task" / part, {"a": 2, "b": 2})
    with pytest.raises(DamagedFile, match="task holds .*, with the same folders in them: call them train and test"):
        load_suite("folder", tmp_path)
    write(tmp_path / "by camera/trainer", {"left": 2, "right": 2})
    write(tmp_path / "by camera/boot", {"left": 2, "top": 2})
    assert load_suite("folder", tmp_path, ["by camera"])["by camera"].classes == ("boot", "trainer")


def test_a_task_that_is_wrong_is_told_before_another_is_decoded(root):
    (root / "wrong").mkdir()
    with pytest.raises(DamagedFile, match="wrong holds images of 0 classes"):
        load_suite("folder", root)
    assert not (root / ".cts-fast-cache").exists()


def test_no_other_program_is_asked_to_decode_an_image(tmp_path):
    write(tmp_path / "task", {"a": 4, "b": 4})
    (tmp_path / "task/a/a0.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(DamagedFile, match="a0.jpg cannot be used .cannot identify image file"):
        load_suite("folder", tmp_path)["task"]


def test_a_folder_whose_classes_have_one_image_each_has_none_to_test_on(tmp_path):
    write(tmp_path / "task", {"a": 1, "b": 1})
    with pytest.raises(DamagedFile, match="has one image a class"):
        load_suite("folder", tmp_path)


def test_a_folder_task_takes_the_papers_size_next_to_its_images(tmp_path):
    for side, expected in ((10, 28), (30, 28), (40, 32), (60, 64), (500, 84)):
        path = tmp_path / f"{side}.png"
        Image.new("L", (side + 50, side)).save(path)
        assert usual_size([str(path)]) == expected


def test_what_is_wrong_with_a_folder_is_named(root, tmp_path):
    def refused(words, error=DamagedFile):
        with pytest.raises(error, match=words):
            load_suite("folder", root, ["birds"])

    (root / "birds/test/emu").mkdir()
    refused("birds/test/emu is a class that .*birds/train has not")
    (root / "birds/test/emu").rmdir()
    (root / "birds/extra").mkdir()
    refused("birds/extra lies beside train and test")
    (root / "birds/extra").rmdir()
    (root / "birds/train/emu").mkdir()
    refused("birds/train/emu holds no image to train on")
    (root / "birds/train/emu").rmdir()
    shutil.rmtree(root / "birds/test/crow")
    shutil.rmtree(root / "birds/test/wren")
    refused("birds/test holds no image")
    shutil.rmtree(root / "birds/test")
    refused("birds has no folder 'test'")
    shutil.rmtree(root / "birds")
    refused("'birds'; it has: cars", ValueError)
    (root / "empty/one").mkdir(parents=True)
    (root / "empty/other").mkdir()
    with pytest.raises(DamagedFile, match="empty/one holds no image to train on"):
        load_suite("folder", root, ["empty"])
    shutil.rmtree(root / "empty")
    shutil.rmtree(root / "cars/new")
    with pytest.raises(DamagedFile, match="1 classes, and a task needs two"):
        load_suite("folder", root)
    with pytest.raises(MissingData, match="none does not exist; it must hold DIR"):
        load_suite("folder", root / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is no folder"):
        load_suite("folder", tmp_path / "file")
    with pytest.raises(ValueError, match="--data-root"):
        load_suite("folder")


def test_the_program_meta_trains_on_folders_and_tests_on_the_one_held_out(root, tmp_path, capsys):
    shutil.copytree(root / "cars", root / "vans")
    arguments = ["--suite", "folder", "--data-root", str(root), "--horizon", "2", "--rounds", "1"]
    arguments += ["--test-steps", "1", "--test-seeds", "2", "--methods", "cts", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        resnet20.main(arguments)
    assert "give --targets" in capsys.readouterr().err
    for option in ("--out", "--cache-dir"):  # its folders would be tasks of the next run
        with pytest.raises(SystemExit):
            resnet20.main([*arguments, "--targets", "birds", option, str(root / "runs/one")])
        assert f"{option} {root / 'runs/one'} lies in the data root" in capsys.readouterr().err
    assert not (root / "runs").exists()
    assert resnet20.main([*arguments, "--targets", "birds"]) == 0
    told = json.loads((tmp_path / "out/results.json").read_text())["config"]
    assert (told["tasks"], told["targets"]) == (["cars", "vans"], ["birds"])
    assert told["images"] == {"cars": [12, 3], "vans": [12, 3], "birds": [10, 3]}


def test_ctrl_c_while_images_are_decoded_stops_at_once_and_leaves_nothing_half_done(tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.new("L", (6000, 6000)).save(photo)
    for task in ("cars", "vans"):
        for name in ("old", "new"):
            (tmp_path / "root" / task / name).mkdir(parents=True)
            for i in range(100):
                (tmp_path / "root" / task / name / f"{i}.jpg").symlink_to(photo)
    command = [sys.executable, "-m", "cts_fast.examples.resnet20", "--suite", "folder", "--data-root"]
    command += [str(tmp_path / "root"), "--targets", "vans", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    told = ""
    while "decoding cars-train" not in told:
        told += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    told += process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "stopped before the run began" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()
    assert not [path for path in (tmp_path / "root/.cts-fast-cache").iterdir() if path.is_dir()]


def test_several_suites_share_one_command(root):
    tasks = load_suite("builtin,folder", root, ["cars", "greek"])
    assert list(tasks) == ["cars", "greek"] and len(tasks["greek"].classes) > 8
    roles = task_roles("folder,builtin", root)
    assert list(roles)[:2] == ["birds", "cars"] and roles["scenes"] == "target"
    with pytest.raises(ValueError, match="'builtin,folder' has no task 'none'; it has: .*cars"):
        load_suite("builtin,folder", root, ["none"])
    with pytest.raises(ValueError, match="no suite 'nope'"):
        load_suite("builtin,nope", root)


def test_a_registered_task_is_there_by_name_in_any_suite(monkeypatch):
    monkeypatch.setattr(suite, "REGISTERED", {})
    made = []

    def factory():
        made.append(1)
        return make_task("later")

    cts_fast.data.register("mine", make_task("mine"))
    cts_fast.data.register("later", factory)
    assert "mine" not in load_suite(names=["greek"])
    tasks = load_suite(names=["later", "greek", "mine"])
    assert list(tasks) == ["later", "greek", "mine"] and made == [1]
    with pytest.raises(ValueError, match="no task 'nope'; it has: .*, mine, later"):
        load_suite(names=["nope"])
    with pytest.raises(ValueError, match="'mine' is registered already"):
        cts_fast.data.register("mine", make_task("mine"))


class Pairs(torch.utils.data.Dataset):
    def __init__(self, labels, side=8):
        self.labels, self.side = labels, side

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return Image.fromarray(layouts.pixels(self.labels[i], self.side)), self.labels[i]


def test_a_task_is_made_of_torch_data_sets():
    task = Task.from_datasets("own", Pairs([0, 2, 1]), Pairs([1, 1]), size=16, flip=True, title="mine")
    assert task.train.images.shape == (3, 3, 16, 16) and layouts.labels_of(task.train.images) == [0, 2, 1]
    assert task.classes == ("0", "1", "2") and task.flip and task.title == "mine"
    assert Task.from_datasets("own", Pairs([0, 1]), Pairs([1]), size=8, channels=1).train.images.shape == (2, 1, 8, 8)
    with pytest.raises(DamagedFile, match="own-train: item 1 cannot be read .ValueError: .*'x'"):
        Task.from_datasets("own", [(layouts.pixels(0), 0), (layouts.pixels(0), "x")], Pairs([0]), size=8)
    with pytest.raises(ValueError, match="own-test: the data set is empty"):
        Task.from_datasets("own", Pairs([0, 1]), Pairs([]), size=8)
    with pytest.raises(ValueError, match=r"'own' has training labels from 0 to 2 and 2 classes.*0\.\.1"):
        Task.from_datasets("own", Pairs([0, 2]), Pairs([1]), size=8, classes=["a", "b"])


@pytest.mark.parametrize(
    "train, options, words",
    [
        (Pairs([0, 1]), {"channels": 2}, "channels must be 1 or 3"),
        (Pairs([0, 1]), {"size": 0}, "size at least 1"),
        (Pairs([1, 2]), {}, "no training image of class 0: labels must be 0, 1"),
        (
            [(layouts.pixels(0), 0), (layouts.pixels(0), -1)],
            {},
            "labels from -1 to 1 and a class -1: labels must be 0, 1",
        ),
        (
            [(layouts.pixels(0), 0), (layouts.pixels(0), 10**12)],
            {},
            "no training image of class 1: labels must be 0, 1",
        ),
        (Pairs([0]), {}, "labels from 0 to 1 and no training image of class 1"),
        (iter([]), {}, "must have len"),
        ([(layouts.pixels(0), 0.7)], {}, "item 0 cannot be read .ValueError: the label 0.7 is no integer"),
    ],
)
def test_torch_data_sets_that_make_no_task_are_named(train, options, words, tmp_path):
    for more in ({}, {"cache": tmp_path}):
        with pytest.raises((ValueError, DamagedFile), match=words):
            Task.from_datasets("own", train, Pairs([1]), **{"size": 8, **options, **more})
    with pytest.raises(ValueError, match="no name of a folder"):
        Task.from_datasets("../own", Pairs([0, 1]), Pairs([1]), size=8, cache=tmp_path)


def test_a_refused_data_set_is_read_anew_once_it_is_mended(tmp_path):
    kept = {"size": 8, "cache": tmp_path}
    with pytest.raises(ValueError, match="no training image of class 1"):
        Task.from_datasets("own", Pairs([0, 2, 2]), Pairs([0]), **kept)
    assert Task.from_datasets("own", Pairs([0, 1, 1]), Pairs([0]), **kept).train.labels.tolist() == [0, 1, 1]


def test_a_registered_task_that_cannot_be_trained_is_named_when_it_is_asked_for(monkeypatch):
    def asked_for(made, name="mine"):
        monkeypatch.setattr(suite, "REGISTERED", {})
        cts_fast.data.register(name, made)
        return load_suite(names=[name])[name]

    good = make_task("other")
    assert asked_for(good).name == "mine"
    part, images = good.train, good.train.images
    for train, words in (
        (dataclasses.replace(part, images=images[:-1]), "images of shape .* and 60 labels"),
        (dataclasses.replace(part, images=images.float()), "images of torch.float32, not torch.uint8"),
        (dataclasses.replace(part, images=images.expand(-1, 4, -1, -1)), r"shape \(60, 4, 8, 8\)"),
        (dataclasses.replace(part, labels=part.labels.int()), "labels of torch.int32"),
    ):
        with pytest.raises(ValueError, match=words):
            asked_for(dataclasses.replace(good, train=train))
    for made, words in (
        (lambda: None, "is NoneType, not a Task"),
        (lambda: 1 / 0, "cannot be made .ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=words):
            asked_for(made)
    with pytest.raises(TypeError, match="must be a Task or a function"):
        asked_for(5)
    with pytest.raises(ValueError, match="has a task 'greek' of its own"):
        asked_for(good, "greek")


def test_a_validation_task_is_seeded_and_has_no_test_image():
    task = make_task("a", images=80)
    one, same, other = task.validation(), task.validation(), task.validation(seed=1)
    assert len(one.train) + len(one.test) == 80 and one.test.labels.bincount().tolist() == [2, 2, 2, 2]
    assert torch.equal(one.test.images, same.test.images) and not torch.equal(one.test.images, other.test.images)
    pictures = {image.numpy().tobytes() for image in task.train.images}
    assert {image.numpy().tobytes() for part in (one.train, one.test) for image in part.images} == pictures
