"""From image files of every kind to uint8 [C, S, S]."""

import numpy as np
import pytest
import torch
from PIL import Image

from cts_fast.data import DamagedFile
from cts_fast.data.decode import decode

ORIENTATION = 0x0112  # EXIF's tag


def gradient(dtype=np.uint8, factor=1):
    """[8, 8]: value 30 x + y, times a factor."""
    y, x = np.mgrid[:8, :8]
    return ((30 * x + y) * factor).astype(dtype)


def saved(tmp_path, picture, name="image.png", **options):
    picture.save(tmp_path / name, **options)
    return str(tmp_path / name)


def test_grey_becomes_three_equal_channels_and_colour_becomes_grey(tmp_path):
    path = saved(tmp_path, Image.fromarray(gradient()))
    assert (decode(path, 8, 3) == gradient()).all() and decode(path, 8, 3).shape == (3, 8, 8)
    assert (decode(path, 8, 1) == gradient()).all() and decode(path, 8, 1).shape == (1, 8, 8)
    red = saved(tmp_path, Image.new("RGB", (8, 8), (255, 0, 0)))
    assert (decode(red, 8, 1) == 76).all() and decode(red, 8, 3)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("name", "bits"), [("image.png", np.uint16), ("image.tif", np.uint16), ("image.tif", np.int32)]
)
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, name, bits):
    path = saved(tmp_path, Image.fromarray(gradient(bits, 257)), name)
    assert Image.open(path).mode.startswith("I")
    assert (decode(path, 8, 3) == gradient()).all()


def test_palette_black_and_white_and_cmyk_show_their_colours(tmp_path):
    colours = Image.new("RGB", (8, 8), (200, 30, 40))
    assert decode(saved(tmp_path, colours.convert("P", palette=1)), 8, 3)[:, 0, 0].tolist() == pytest.approx(
        [200, 30, 40], abs=30
    )
    cmyk = decode(saved(tmp_path, colours.convert("CMYK"), "image.jpg", quality=100), 8, 3)
    assert cmyk[:, 3, 3].tolist() == pytest.approx([200, 30, 40], abs=6)
    assert (decode(saved(tmp_path, Image.new("1", (8, 8), 1)), 8, 3) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    if mode == "P":
        path = saved(tmp_path, Image.new("P", (8, 8), 0), transparency=bytes([0]))
    else:
        path = saved(tmp_path, picture.convert(mode))
    assert (decode(path, 8, 3) == 255).all()


def test_photographs_stand_as_exif_says(tmp_path):
    turned = Image.fromarray(gradient().T.copy())
    exif = Image.Exif()
    exif[ORIENTATION] = 5  # mirrored along the diagonal
    assert (decode(saved(tmp_path, turned, exif=exif), 8, 1)[0] == gradient()).all()


def test_images_are_squeezed_to_a_square(tmp_path):
    wide = np.zeros((8, 32), np.uint8)
    wide[:, 16:] = 255
    assert decode(saved(tmp_path, Image.fromarray(wide)), 8, 1)[0, :, [0, 7]].tolist() == [[0] * 8, [255] * 8]


def test_files_that_cannot_be_used_are_named_with_reason_and_remedy(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = {
        kind: open(saved(tmp_path, Image.fromarray(noise), f"whole.{kind}"), "rb").read()
        for kind in ("jpg", "png", "gif")
    }
    cases = {
        "cut.jpg": (whole["jpg"][:1500], "truncated"),
        "cut.png": (whole["png"][:1500], ""),
        "cut.gif": (whole["gif"][:400], ""),
        "text.jpg": (b"<html>404</html>", "cannot identify"),
        "empty.png": (b"", "cannot identify"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedFile, match=f"{name} cannot be used .*{reason}.*replace the file"):
            decode(str(tmp_path / name), 8, 3)
    with pytest.raises(DamagedFile, match="no such file.*fetch it"):
        decode(str(tmp_path / "none.jpg"), 8, 3, remedy="fetch it")
    with pytest.raises(DamagedFile, match="floating-point"):
        decode(saved(tmp_path, Image.fromarray(gradient(np.float32)), "float.tif"), 8, 3)
    with pytest.raises(DamagedFile, match="32-bit integers up to"):
        decode(saved(tmp_path, Image.fromarray(gradient(np.int32)), "small.tif"), 8, 3)
    with pytest.raises(ValueError, match="must have pixels"):
        decode(np.zeros((0, 8, 3), np.uint8), 8, 3)
    with pytest.raises(DamagedFile, match="beyond 16 bits"):
        decode(saved(tmp_path, Image.fromarray(gradient(np.int32, 100_000)), "long.tif"), 8, 3)


def test_pixels_in_memory_are_taken_as_they_are_or_refused():
    colour = np.stack([gradient()] * 3, -1)
    for item in (
        colour,
        Image.fromarray(colour),
        torch.from_numpy(colour.transpose(2, 0, 1).copy()),
        torch.from_numpy(colour.transpose(2, 0, 1).copy()).float() / 255,
        gradient(),
        torch.from_numpy(gradient())[None],
    ):
        assert (decode(item, 8, 3) == gradient()).all()
    for item, words in (
        (torch.full((3, 8, 8), -0.5), "leave normalisation out"),
        (np.zeros((8, 8), np.float64), "float64"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"\(2, 8, 8, 3\)"),
        (np.zeros((8, 8, 5), np.uint8), "1 or 3 channels, not 5"),
        ([[1, 2]], "not list"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(item, 8, 3)
