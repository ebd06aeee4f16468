"""The paper's data sets, each from a tiny fixture in its official layout: whole, damaged, missing."""

import dataclasses
import hashlib
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from support import layouts
from torchvision import datasets

import cts_fast.data
from cts_fast.data import DamagedFile, MissingData, Storage, load_suite, task_roles
from cts_fast.data.decode import decode
from cts_fast.data.paper import imagenet, sets
from cts_fast.data.paper import suite as paper
from cts_fast.experiments import cli

NAMES = [data.name for data in sets.SETS]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A data root with every data set, and the labels that its images show."""
    root = tmp_path_factory.mktemp("data")
    return root, layouts.build_all(root)


def small(name, labels, **changes):
    """The data set of a fixture: published numbers replaced by the fixture's."""
    data = paper.BY_NAME[name]
    train, test = map(len, labels)
    classes = {"tiny_imagenet_b": 2, "stanford_dogs": 3, "aircraft": 3, "cub": 2, "stanford_cars": 3, "pets": 2}
    classes |= {"food101": 2, "dtd": 2}
    count = {"train": None, "least": train} if data.train is None else {"train": train}
    return dataclasses.replace(data, classes=classes.get(name, data.classes), test=test, **count, **changes)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def fixture_md5s(everything, monkeypatch):
    """torchvision's classes ask for the md5s of the fixture instead of the published ones."""
    root, _ = everything
    for kind, folder in ((datasets.CIFAR10, "cifar-10-batches-py"), (datasets.CIFAR100, "cifar-100-python")):
        place = root / folder
        for name in ("train_list", "test_list"):
            monkeypatch.setattr(kind, name, [[file, md5(place / file)] for file, _ in getattr(kind, name)])
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(place / kind.meta["filename"])})
    split_list = {
        s: [u, f, md5(root / "svhn" / f)] for s, (u, f, _) in datasets.SVHN.split_list.items() if s != "extra"
    }
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    place = root / "stl10_binary"
    for name, files in (("train_list", datasets.STL10.train_list[:2]), ("test_list", datasets.STL10.test_list)):
        monkeypatch.setattr(datasets.STL10, name, [[file, md5(place / file)] for file, _ in files])
    flowers = {
        kind: [file, md5(root / "flowers-102" / file) if kind != "image" else ""]
        for kind, (file, _) in datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", flowers)


@pytest.mark.parametrize("name", NAMES)
def test_images_labels_and_splits_are_those_of_the_official_layout(name, everything, fixture_md5s):
    root, told = everything
    data = small(name, told[name])
    splits = data.find(root, partial=name == "quickdraw")
    for part, labels in ((splits.train, told[name][0]), (splits.test, told[name][1])):
        assert part.labels.dtype == torch.int64 and part.labels.tolist() == labels
        images = torch.stack([torch.from_numpy(decode(item, 16, data.channels)) for item in part.items])
        assert images.dtype == torch.uint8 and images.shape == (len(labels), data.channels, 16, 16)
        assert layouts.labels_of(images) == labels
    assert len(splits.classes) == len(set(splits.classes)) == data.classes


def test_every_data_set_of_the_paper_has_a_row_and_a_fixture(everything):
    _, told = everything
    assert set(told) == set(NAMES) == set(paper.BY_NAME)
    roles = task_roles("paper")
    assert [name for name, role in roles.items() if role == "train"] == [
        "tiny_imagenet_a", "tiny_imagenet_b", "cifar100", "stanford_dogs", "aircraft", "cub", "fashion_mnist", "svhn",
    ]  # fmt: skip
    assert {name for name, role in roles.items() if role == "target"} == {
        "stanford_cars", "quickdraw", "flowers", "pets", "stl10",
    }  # fmt: skip
    roles = task_roles("imagenet")
    assert [name for name, role in roles.items() if role == "train"] == [f"imagenet_{i}" for i in range(1, 9)]
    assert {name for name, role in roles.items() if role == "target"} == {
        "cifar100", "cifar10", "svhn", "stanford_dogs", "pets", "flowers", "food101", "cub", "dtd",
    }  # fmt: skip


def test_the_published_numbers_are_asked_for_unless_partial(everything, fixture_md5s):
    root, _ = everything
    for name in NAMES:
        data = paper.BY_NAME[name]
        assert data.find(root, partial=True).classes
        with pytest.raises(DamagedFile, match=f"{data.places[0]}.*--partial"):
            data.find(root)


def test_checksums_are_torchvisions_and_asked_for_unless_partial(everything):
    root, told = everything
    for name, file in (  # the fixture's files are not the published ones
        ("cifar10", "data_batch_1"),
        ("cifar100", "train"),
        ("svhn", "train_32x32.mat"),
        ("stl10", "train_X.bin"),
    ):
        with pytest.raises(DamagedFile, match=f"{name} in .*{file} is corrupted.*--download"):
            small(name, told[name]).find(root)
    known = {archive.name: archive.md5 for data in sets.SETS for archive in data.archives}
    for kind in (datasets.CIFAR10, datasets.CIFAR100, datasets.STL10):
        assert known[kind.filename] == kind.tgz_md5
    for _, file, checksum in list(datasets.SVHN.split_list.values())[:2]:
        assert known[file] == checksum
    for file, checksum in (*datasets.FashionMNIST.resources, *datasets.Flowers102._file_dict.values()):
        assert known[file] == checksum
    assert known["dtd-r1.0.1.tar.gz"] == datasets.DTD._MD5 and known["food-101.tar.gz"] == datasets.Food101._MD5
    for url, checksum in datasets.OxfordIIITPet._RESOURCES:
        assert (url, checksum) in {(archive.url, archive.md5) for archive in paper.BY_NAME["pets"].archives}


def test_tiny_imagenets_val_may_be_sorted_into_folders(tmp_path):
    told = layouts.tiny_imagenet(tmp_path, sort_val=True)
    for name, (_, test) in told.items():
        splits = small(name, told[name]).find(tmp_path)
        assert splits.test.labels.tolist() == test
        assert layouts.labels_of(torch.stack([torch.from_numpy(decode(i, 8, 3)) for i in splits.test.items])) == test


def test_an_emptied_folder_of_tiny_imagenets_images_is_none(tmp_path):
    told = layouts.tiny_imagenet(tmp_path, sort_val=True)
    (tmp_path / "tiny-imagenet-200" / "val" / "images").mkdir()
    layouts.lines(tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt", ["val_1.JPEG\tn10000000\t0\t0\t9\t9"])
    splits = small("tiny_imagenet_b", told["tiny_imagenet_b"]).find(tmp_path)
    assert splits.test.labels.tolist() == told["tiny_imagenet_b"][1]


def test_cars_images_may_be_nested(tmp_path):
    told = layouts.stanford_cars(tmp_path, nested=True)["stanford_cars"]
    splits = small("stanford_cars", told).find(tmp_path)
    assert all("cars_train/cars_train/" in path for path in splits.train.items)
    assert splits.train.labels.tolist() == told[0]


def damage(tmp_path, builder, name):
    """A whole fixture of one data set, checked to be whole."""
    told = builder(tmp_path)
    data = small(name, told[name])
    data.find(tmp_path)
    return data


@pytest.mark.parametrize(
    ("builder", "name", "image"),
    [
        (layouts.tiny_imagenet, "tiny_imagenet_b", "tiny-imagenet-200/val/images/val_0.JPEG"),
        (layouts.stanford_dogs, "stanford_dogs", "stanford_dogs/Images/n02085936-Maltese_dog/n02085936_train1.jpg"),
        (layouts.cub, "cub", "CUB_200_2011/images/002.Laysan_Albatross/image_1.jpg"),
        (layouts.aircraft, "aircraft", "fgvc-aircraft-2013b/data/images/test1.jpg"),
        (layouts.stanford_cars, "stanford_cars", "stanford_cars/cars_train/00001.jpg"),
        (layouts.pets, "pets", "oxford-iiit-pet/images/Abyssinian_test0.jpg"),
        (layouts.food, "food101", "food-101/images/waffles/train1.jpg"),
        (layouts.dtd, "dtd", "dtd/dtd/images/banded/banded_val.jpg"),
    ],
)
def test_a_missing_image_is_named(builder, name, image, tmp_path):
    data = damage(tmp_path, builder, name)
    (tmp_path / image).unlink()
    with pytest.raises(DamagedFile, match=f"1 images are missing.*{image}.*--partial"):
        data.find(tmp_path)
    splits = data.find(tmp_path, partial=True)
    assert len(splits.train) + len(splits.test) == data.train + data.test - 1


@pytest.mark.parametrize(
    ("builder", "name", "folder"),
    [
        (layouts.tiny_imagenet, "tiny_imagenet_a", "tiny-imagenet-200/train/n99999999"),
        (layouts.stanford_dogs, "stanford_dogs", "stanford_dogs/Images/n02099999-Cat"),
        (layouts.cub, "cub", "CUB_200_2011/images/201.Penguin"),
        (layouts.food, "food101", "food-101/images/zwieback"),
        (layouts.dtd, "dtd", "dtd/dtd/images/zebra"),
    ],
)
def test_a_class_folder_too_many_is_named(builder, name, folder, tmp_path):
    data = damage(tmp_path, builder, name)
    (tmp_path / folder).mkdir()
    with pytest.raises(DamagedFile, match=f"{folder} is no class.*move it away"):
        data.find(tmp_path)


def test_a_missing_list_a_wrong_label_and_lists_of_unlike_lengths_are_named(tmp_path):
    data = damage(tmp_path, layouts.cub, "cub")
    place = tmp_path / "CUB_200_2011"
    layouts.lines(place / "image_class_labels.txt", ["1 1", "2 2", "3 4", "4 1"])
    with pytest.raises(DamagedFile, match=r"cub in .*labels 0\.\.3 for 2 classes"):
        data.find(tmp_path)
    layouts.lines(place / "image_class_labels.txt", ["1 1", "2 2"])
    with pytest.raises(DamagedFile, match="cub in .*cannot be read .KeyError.*--download"):
        data.find(tmp_path)
    (place / "train_test_split.txt").unlink()
    with pytest.raises(DamagedFile, match="train_test_split.txt is missing.*expected is CUB_200_2011"):
        data.find(tmp_path)


class Runs:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def copied(root, file, to):
    """A data root with a copy of the data set that has this file."""
    shutil.copytree(root / file.partition("/")[0], to / file.partition("/")[0])
    return to


def test_no_code_in_a_data_file_is_run(everything, tmp_path):
    root, _ = everything
    for name, file in (("cifar10", "cifar-10-batches-py/data_batch_2"), ("cifar100", "cifar-100-python/meta")):
        copy = copied(root, file, tmp_path / name)
        (copy / file).write_bytes(pickle.dumps({"data": Runs(tmp_path / "ran")}))
        for partial in (False, True):
            with pytest.raises(DamagedFile):
                paper.BY_NAME[name].find(copy, partial=partial)
    assert not (tmp_path / "ran").exists()


def test_files_that_cannot_be_parsed_are_named(everything, tmp_path, fixture_md5s):
    root, told = everything
    for name, file in (
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("svhn", "svhn/test_32x32.mat"),
        ("stl10", "stl10_binary/train_X.bin"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
        ("stanford_dogs", "stanford_dogs/test_list.mat"),
        ("quickdraw", "quickdraw/numpy_bitmap/The Eiffel Tower.npy"),
        ("food101", "food-101/meta/train.json"),
        ("flowers", "flowers-102/setid.mat"),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_test.txt"),
    ):
        copy = copied(root, file, tmp_path / Path(file).name)
        whole = (copy / file).read_bytes()
        (copy / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DamagedFile, match=f"{file}.*--download"):
            small(name, told[name]).find(copy, partial=True)


def test_pixels_are_of_the_version_that_was_read_though_their_files_change_before_they_are_kept(
    everything, tmp_path, fixture_md5s
):
    root, told = everything
    for name, file in (
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("svhn", "svhn/test_32x32.mat"),
        ("stl10", "stl10_binary/train_X.bin"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("quickdraw", "quickdraw/numpy_bitmap/The Eiffel Tower.npy"),
    ):
        copy = copied(root, file, tmp_path / name)
        data = small(name, told[name])
        first = data.find(copy, partial=True)
        os.utime(copy / file, (9, 9))
        second = data.find(copy, partial=True)
        versions = [[part.version() for part in (splits.train, splits.test)] for splits in (first, second)]
        assert versions[0] != versions[1]
        assert [part.version() for part in (first.train, first.test)] == versions[0]


def test_images_are_never_under_two_labels_or_in_both_splits_by_a_link(tmp_path):
    layouts.imagenet_groups(tmp_path)
    shutil.rmtree(tmp_path / "imagenet" / "val")
    (tmp_path / "imagenet" / "val").symlink_to(tmp_path / "imagenet" / "train")
    with pytest.raises(DamagedFile, match="imagenet/val/.*counted already"):
        paper.BY_NAME["imagenet_1"].find(tmp_path, partial=True)
    layouts.tiny_imagenet(tmp_path)
    train = tmp_path / "tiny-imagenet-200" / "train"
    one, other = sorted(train.iterdir())[:2]
    shutil.rmtree(other)
    other.symlink_to(one)
    with pytest.raises(DamagedFile, match=f"{other.name}.*counted already"):
        paper.BY_NAME["tiny_imagenet_a"].find(tmp_path, partial=True)


def test_files_with_other_content_than_arrays_are_named_and_nobody_is_advised_to_unpickle_them(everything, tmp_path):
    root, told = everything
    file = "quickdraw/numpy_bitmap/The Eiffel Tower.npy"
    shutil.copytree(root / "quickdraw", tmp_path / "quickdraw")
    for content in (b"garbage" * 40, pickle.dumps([1, 2]), b""):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(DamagedFile, match=f"{file} is damaged.*--download") as told_error:
            small("quickdraw", told["quickdraw"]).find(tmp_path, partial=True)
        assert "pickle" not in str(told_error.value)


def test_imagenets_groups_part_its_thousand_classes(everything, tmp_path):
    found = imagenet.groups()
    wnids = [wnid for group in found for wnid in group]
    assert len(wnids) == len(set(wnids)) == 1000
    assert [len(group) for group in found] == [118, 100, 119, 129, 129, 122, 142, 141]
    names = [set(group.values()) for group in found]
    for number, name in enumerate(("Chihuahua", "zebra", "robin", "airliner", "laptop", "sandal", "teapot", "daisy")):
        assert name in names[number], name
    root, told = everything
    shutil.copytree(root / "imagenet", tmp_path / "imagenet", ignore=lambda _, files: files[:0])
    gone = next(reversed(found[0]))
    shutil.rmtree(tmp_path / "imagenet" / "val" / gone)
    with pytest.raises(DamagedFile, match=f"val/{gone} is missing"):
        small("imagenet_1", told["imagenet_1"]).find(tmp_path)
    for wnid in list(found[0])[:-2]:  # some classes of a group are enough for a partial one
        shutil.rmtree(tmp_path / "imagenet" / "train" / wnid)
        shutil.rmtree(tmp_path / "imagenet" / "val" / wnid, ignore_errors=True)
    assert paper.BY_NAME["imagenet_1"].find(tmp_path, partial=True).train.labels.tolist() == [116, 117]


def test_a_missing_data_set_names_folder_layout_and_remedy(tmp_path):
    for data in sets.SETS:
        with pytest.raises(MissingData) as error:
            data.find(tmp_path)
        said = str(error.value)
        assert str(tmp_path / data.places[0]) in said and data.layout in said
        assert ("--download" in said) == bool(data.archives) and (data.archives or data.manual in said)
    with pytest.raises(MissingData, match="Kaggle"):
        paper.BY_NAME["stanford_cars"].find(tmp_path, download=True)
    with pytest.raises(ValueError, match="--data-root"):
        load_suite("paper", names=["cub"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_suite("paper", tmp_path / "none", names=["cub"])


def test_all_are_looked_for_before_any_is_decoded(tmp_path, everything):
    root, _ = everything
    shutil.copytree(root / "CUB_200_2011", tmp_path / "CUB_200_2011")
    with pytest.raises(MissingData, match="pets"):
        load_suite("paper", tmp_path, ["cub", "pets"], Storage(partial=True))
    with pytest.raises(ValueError, match="no task 'cup'"):
        load_suite("paper,folder", tmp_path, ["cub", "cup"], Storage(partial=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CUB_200_2011"]


def test_tasks_come_at_their_size_or_the_one_asked_for(everything, tmp_path):
    root, told = everything
    names = ["tiny_imagenet_b", "fashion_mnist", "pets", "cifar10"]
    tasks = load_suite("paper", root, names, Storage(partial=True, cache=tmp_path))
    assert [task.train.images.shape[1:] for task in tasks.values()] == [
        (3, 64, 64),
        (1, 28, 28),
        (3, 84, 84),
        (3, 32, 32),
    ]
    assert [task.role for task in tasks.values()] == ["train", "train", "target", ""]
    for name, task in tasks.items():
        assert (task.train.labels.tolist(), task.test.labels.tolist()) == told[name]
        assert layouts.labels_of(task.train.images[:]) == told[name][0]
    tasks = load_suite("imagenet", root, ["pets"], Storage(partial=True, cache=tmp_path))
    assert tasks["pets"].train.images.shape[-1] == 224
    tasks = load_suite("imagenet", root, ["pets"], Storage(size=12, partial=True, cache=tmp_path))
    assert tasks["pets"].test.images.shape[1:] == (3, 12, 12)


def test_list_data_tells_state_counts_and_remedy_of_every_set(everything, tmp_path, monkeypatch, fixture_md5s):
    root, told = everything
    whole = tuple(small(name, told[name]) for name in NAMES)
    monkeypatch.setattr(
        paper, "SETS", tuple(dataclasses.replace(data, train=20) if data.name == "cub" else data for data in whole)
    )
    rows = {row[0]: row[1:] for row in paper.listing(root)}
    assert list(rows) == NAMES
    # its fixture has three of 345 categories
    assert {name for name, row in rows.items() if row[0] != "found"} == {"cub", "quickdraw"}
    assert rows["pets"] == ("found", "3 / 2 / 2", "")
    assert rows["cub"][:2] == ("partial", "2 / 2 / 2 of 20 / 2 / 2") and "--partial" in rows["cub"][2]
    shutil.copytree(root / "CUB_200_2011", tmp_path / "CUB_200_2011")
    (tmp_path / "CUB_200_2011" / "classes.txt").unlink()
    rows = {row[0]: row[1:] for row in paper.listing(tmp_path)}
    assert rows.pop("cub")[0] == "damaged"
    assert {row[0] for row in rows.values()} == {"missing"} and all(row[2] for row in rows.values())


def test_the_program_lists_data_and_stops(everything, tmp_path, capsys):
    from cts_fast.examples import resnet20, tune

    root, _ = everything
    before = sorted(root.iterdir())
    for program, more in ((resnet20, ["--out", str(tmp_path)]), (tune, ["--grid", "cts=1", "--out", str(tmp_path)])):
        assert program.main(["--list-data", "--data-root", str(root), *more]) == 0
        said = capsys.readouterr().out
        assert all(name in said for name in NAMES)
        assert program.main(["--list-data", "--data-root", str(root), *more, "--tasks", "cub,svhn"]) == 0
        said = capsys.readouterr().out
        assert all((name in said) == (name in ("cub", "svhn")) for name in NAMES)
    assert sorted(root.iterdir()) == before and not list(tmp_path.iterdir())
    assert resnet20.main(["--list-data", "--data-root", str(tmp_path), "--tasks", "cub,stanford_cars"]) == 0
    command = f"--list-data --data-root {tmp_path} --tasks cub --download"
    assert capsys.readouterr().out.endswith(f"{command}\n")
    for arguments, words in (
        (["--list-data"], "--data-root"),
        (["--list-data", "--data-root", str(root), "--tasks", "cifra"], "there is no data set 'cifra'"),
        (["--cache-limit", "nan"], "--cache-limit"),
    ):
        with pytest.raises(SystemExit) as end:
            resnet20.main(arguments)
        assert end.value.code == 2 and words in capsys.readouterr().err


def test_a_truncated_image_ends_a_program_with_one_message(everything, tmp_path, capsys):
    from cts_fast.examples import resnet20

    root, _ = everything
    for folder in ("CUB_200_2011", "oxford-iiit-pet"):
        shutil.copytree(root / folder, tmp_path / "data" / folder)
    image = tmp_path / "data/CUB_200_2011/images/002.Laysan_Albatross/image_2.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    arguments = ["--suite", "paper", "--data-root", str(tmp_path / "data"), "--partial", "--tasks", "cub"]
    arguments += ["--targets", "pets", "--out", str(tmp_path / "out"), "--horizon", "1", "--rounds", "1"]
    for limit in ("20", "0"):  # while it is decoded into the cache; while the networks train
        with pytest.raises(SystemExit) as end:
            resnet20.main([*arguments, "--cache-limit", limit])
        said = capsys.readouterr().err
        assert end.value.code == 2 and "Traceback" not in said
        assert str(image) in said and "truncated" in said and "replace it" in said
        arguments.append("--overwrite")


def test_validation_tests_on_training_images_only(everything, tmp_path):
    root, _ = everything
    parser = cli.new_parser("x", "")
    cli.add_data_arguments(parser)
    for name in ("--tasks", "--targets"):
        parser.add_argument(name, type=cli.names)
    common = ["--suite", "paper", "--data-root", str(root), "--partial", "--cache-dir", str(tmp_path)]
    args = parser.parse_args([*common, "--tasks", "cub", "--targets", "quickdraw", "--validation"])
    (_,), (target,) = cli.choose_tasks(args, None)
    assert (len(target.train), len(target.test)) == (18, 2)  # a tenth of ten drawings of each class
    assert target.test.labels.tolist() == [0, 2]
    assert cli.about_data(args, (target,)) == {
        "validation": True,
        "images": {"quickdraw": [18, 2]},
        "pixels": {"quickdraw": [28, 28]},
    }


def test_importing_and_naming_data_sets_starts_no_download_and_needs_torch_alone(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import cts_fast.data as d; d.task_roles('paper')\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(new & {'numpy', 'PIL', 'torchvision', 'scipy', 'tqdm'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
    assert cts_fast.data.Storage().download is False
