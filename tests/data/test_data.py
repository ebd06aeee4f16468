"""Facts about the built-in suite and its file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cts_fast.data
from cts_fast.data import DamagedFile, archive, load_suite, show, suite

FOLDER = Path(cts_fast.data.__file__).parent
FILE = FOLDER / "builtin" / suite.BUILTIN_FILE


@pytest.fixture(scope="module")
def tasks():
    return load_suite()


def bitmaps(images: torch.Tensor) -> set[bytes]:
    shape = bytes(images.shape[1:])
    return {shape + image.numpy().tobytes() for image in images}


def test_at_least_eight_tasks_to_train_on_and_three_held_out_training_first(tasks):
    roles = [task.role for task in tasks.values()]
    assert roles.count("train") >= 8 and roles.count("target") >= 3
    assert roles == sorted(roles, key=["train", "target"].index)
    assert "fashion_mnist" in tasks and tasks["fashion_mnist"].role == "target"


def test_tasks_differ_in_size_colour_and_number_of_classes(tasks):
    shapes = {tuple(task.train.images.shape[1:]) for task in tasks.values()}
    assert {28, 32, 64} <= {height for _, height, _ in shapes}
    assert {channels for channels, _, _ in shapes} == {1, 3}
    assert any(task.role == "target" and task.train.images.shape[1] == 3 for task in tasks.values())
    assert all(8 <= len(task.classes) <= 64 for task in tasks.values())


def test_images_are_bytes_and_labels_cover_the_classes_of_both_splits(tasks):
    for name, task in tasks.items():
        assert task.name == name and task.title and task.source
        assert len(set(task.classes)) == len(task.classes)
        for part in (task.train, task.test):
            assert part.images.dtype == torch.uint8 and part.images.is_contiguous(), name
            assert part.labels.dtype == torch.int64 and len(part) == len(part.images), name
            assert part.labels.unique().tolist() == list(range(len(task.classes))), name


def test_every_task_has_images_enough_and_balanced_classes(tasks):
    for name, task in tasks.items():
        assert len(task.train) >= 1400 and len(task.test) >= 350, name
        counts = task.train.labels.bincount()
        assert counts.max() <= 5 * counts.min(), name
        assert task.test.labels.bincount().min() >= 10, name


def test_any_prefix_of_a_split_is_balanced(tasks):
    for name, task in tasks.items():
        classes = len(task.classes)
        assert task.train.labels[: 3 * classes].bincount(minlength=classes).tolist() == [3] * classes, name


def test_no_bitmap_occurs_twice_in_a_task(tasks):
    for name, task in tasks.items():
        assert len(bitmaps(torch.cat((task.train.images, task.test.images)))) == len(task.train) + len(task.test), name


def test_held_out_tasks_share_neither_images_nor_classes_with_meta_training(tasks):
    images, classes = {"train": set(), "target": set()}, {"train": set(), "target": set()}
    for task in tasks.values():
        images[task.role] |= bitmaps(task.train.images) | bitmaps(task.test.images)
        classes[task.role] |= {name for name in task.classes if len(name) > 1}  # a letter alone names no class
    assert not images["train"] & images["target"]
    assert not classes["train"] & classes["target"]


def test_training_and_test_patches_of_a_photograph_share_no_pixel():
    header, start = archive.read_header(FILE)
    for entry in (entry for entry in header["tasks"] if entry["kind"] == "crops"):
        corners = archive.read_corners(entry, archive.read_member(FILE, start, entry))
        size = entry["shape"][-1]
        for index, (_, height, width) in enumerate(entry["pictures"]):
            covered = torch.zeros(2, height, width, dtype=torch.bool)
            for number, (picture, y, x) in enumerate(corners.tolist()):
                if picture == index:
                    covered[int(number >= entry["train"]), y : y + size, x : x + size] = True
            assert not (covered[0] & covered[1]).any(), (entry["name"], entry["classes"][index])


def test_only_photographs_and_clothes_may_be_flipped(tasks):
    assert {name for name, task in tasks.items() if task.flip} == {"photos", "textures", "scenes", "fashion_mnist"}


def test_the_file_is_at_most_16_megabytes():
    assert FILE.stat().st_size <= 16 * 2**20


def test_loading_names_decodes_only_those_in_the_order_asked_for(monkeypatch):
    decoded, unpack = [], archive.unpack

    def counting(entry, member):
        decoded.append(entry["name"])
        return unpack(entry, member)

    monkeypatch.setattr(archive, "unpack", counting)
    assert list(load_suite(names=["scenes", "greek"])) == ["scenes", "greek"]
    assert decoded == ["scenes", "greek"]


def test_two_loads_are_equal(tasks):
    again = load_suite(names=["photos"])["photos"]
    assert torch.equal(again.train.images, tasks["photos"].train.images)
    assert torch.equal(again.test.labels, tasks["photos"].test.labels)


def test_unknown_names_are_refused_with_what_exists():
    with pytest.raises(ValueError, match="'mnist'.*fashion_mnist"):
        load_suite(names=["greek", "mnist"])
    with pytest.raises(ValueError, match="'nope'.*builtin"):
        load_suite("nope")
    with pytest.raises(ValueError, match="not the string 'greek'"):
        load_suite(names="greek")


def test_a_missing_file_says_where_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{suite.BUILTIN_FILE}.*cts_fast.data.build"):
        load_suite(root=tmp_path)


def test_damage_is_found_and_named(tmp_path):
    whole = FILE.read_bytes()
    header, start = archive.read_header(FILE)
    greek = next(entry for entry in header["tasks"] if entry["name"] == "greek")
    copy = tmp_path / suite.BUILTIN_FILE

    flipped = bytearray(whole)
    flipped[start + greek["offset"] + 1000] ^= 1
    copy.write_bytes(flipped)
    with pytest.raises(DamagedFile, match="task 'greek'.*sha256.*cts_fast.data.build"):
        load_suite(root=tmp_path, names=["greek"])
    assert list(load_suite(root=tmp_path, names=["symbols"])) == ["symbols"]

    for broken, words in (
        (whole[:-10], "hangul"),
        (whole[:20], "does not begin"),
        (whole[:500], "header"),
        (b"x" + whole[1:], "does not begin"),
        (whole[:60] + b"?" + whole[61:], "header"),
    ):
        copy.write_bytes(broken)
        with pytest.raises(DamagedFile, match=words):
            load_suite(root=tmp_path)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_and_crops_survive_packing(channels):
    generator = torch.Generator().manual_seed(channels)
    pictures = [
        torch.randint(0, 256, (channels, h, w), dtype=torch.uint8, generator=generator) for h, w in ((9, 14), (11, 8))
    ]
    corners = torch.tensor([[0, 0, 0], [1, 3, 0], [0, 1, 6], [1, 2, 0]])
    labels = torch.tensor([0, 1, 0, 1])
    images, decoded = archive.unpack(*archive.pack_crops(pictures, corners, labels, 8))
    assert torch.equal(decoded, labels)
    for image, (picture, y, x) in zip(images, corners.tolist(), strict=True):
        assert torch.equal(image, pictures[picture][:, y : y + 8, x : x + 8])


@pytest.mark.parametrize("differences", [None, "left"])
def test_images_survive_packing(differences):
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 1, 2, 200, 0])
    decoded, found = archive.unpack(*archive.pack_images(images, labels, differences))
    assert torch.equal(decoded, images) and torch.equal(found, labels)


def test_show_writes_a_picture_of_the_tasks(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    show.main(["--out", str(path), "--tasks", "scenes,typefaces"])
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    assert "2 tasks" in capsys.readouterr().out


def test_show_refuses_an_unknown_task_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        show.main(["--out", str(tmp_path / "x.png"), "--tasks", "nope"])
    said = capsys.readouterr().err
    assert exit_.value.code == 2 and "'nope'" in said and "scenes" in said


def test_every_task_stands_on_the_licence_page():
    page = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    header, _ = archive.read_header(FILE)
    for entry in header["tasks"]:
        assert entry["name"] in page, entry["name"]
    for package, version in header["sources"].items():
        assert package in page and version in page, package


def test_loading_needs_torch_and_the_standard_library_only():
    code = (
        "import sys, torch; before = set(sys.modules); import cts_fast.data as d; d.load_suite(names=['greek']);"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(new & {'numpy', 'PIL', 'fontTools', 'matplotlib', 'torchvision'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_show_samples_name_every_class_of_a_small_task(tasks):
    tile, names = show.samples(tasks["scenes"])
    assert tile.shape[-1] == 3 and [name for _, name in names] == list(tasks["scenes"].classes)


def test_the_builder_keeps_one_of_each_bitmap_and_none_with_two_meanings():
    np = pytest.importorskip("numpy")
    from cts_fast.data.build.assemble import Draft, distinct, without

    a, b, c = (np.full((1, 2, 2), value, np.uint8) for value in (1, 2, 3))
    kept = distinct([(a, 0, False), (a, 0, True), (b, 0, False), (b, 1, False), (c, 1, True)])
    assert [(int(image[0, 0, 0]), label, test) for image, label, test in kept] == [(1, 0, False), (3, 1, True)]
    drafts = [
        Draft("one", "train", "", "", ["x", "y"], candidates=kept),
        Draft("two", "target", "", "", ["x", "y"], candidates=[(c, 0, True)]),
    ]
    assert [int(image[0, 0, 0]) for image, _, _ in without(*drafts).candidates] == [1]


def test_the_builder_renders_type_whole_and_on_one_base_line():
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("fontTools")
    from cts_fast.data.build.type_tasks import covered, render

    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    assert ord("A") in covered(path) and 0xAC00 not in covered(path)
    images = render(path, ["A", "x", "g", "W"], 28)
    rows = {text: image[0].max(1).nonzero()[0] for text, image in images.items()}
    assert all(image.shape == (1, 28, 28) and not set(image.ravel() % 17) - {0} for image in images.values())
    assert all(held.min() >= 1 and held.max() <= 26 for held in rows.values())
    assert abs(int(rows["A"].max()) - int(rows["x"].max())) <= 1 < rows["g"].max() - rows["x"].max()
