"""From an image file, or pixels in memory, to uint8 [C, S, S] (needs Pillow: the extra ``[examples]``)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cts_fast.data.errors import DamagedFile

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # what Pillow reads by itself, without other programs
REMEDY = "replace the file by a whole one, or remove it"


def decode(item: Any, size: int, channels: int, remedy: str = REMEDY) -> np.ndarray:
    """Read, turn upright, make grey or RGB, and resize to a square: uint8 [C, S, S].

    Args:
        item: path of an image file, a PIL image, or pixels: uint8 [H, W], [H, W, C] (numpy) or [C, H, W] (torch, whose
            floats must lie in 0..1).
        channels: 1 or 3.

    Raises:
        DamagedFile: names the file and why it cannot be used: truncated, no image, a kind of pixel without a range.
        ValueError: pixels in memory of another kind.
    """
    if not isinstance(item, (str, os.PathLike)):
        return _square(upright(to_picture(item), channels), size)
    from PIL import Image

    try:
        with Image.open(item, formats=FORMATS) as picture:
            picture.load()
            return _square(upright(picture, channels), size)
    except MemoryError:
        raise
    except Exception as error:  # on damaged data Pillow raises OSError, SyntaxError, struct.error, zlib.error, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        elif isinstance(error, PermissionError):
            reason, remedy = "permission denied", "make it readable"
        raise DamagedFile(f"the image {os.fspath(item)} cannot be used ({reason}): {remedy}") from None


def to_picture(pixels: Any) -> Image.Image:
    """A PIL image of pixels in memory; raises ValueError for what is none."""
    import numpy as np
    import torch
    from PIL import Image

    if isinstance(pixels, Image.Image):
        return pixels
    if isinstance(pixels, torch.Tensor):
        if pixels.is_floating_point():
            if not bool(((pixels >= 0) & (pixels <= 1)).all()):
                raise ValueError("a float image must lie in 0..1: leave normalisation out of the data set's transform")
            pixels = (pixels * 255).round().byte()
        pixels = pixels.cpu().numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        kind = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"an image must be a PIL image, a tensor [C, H, W] or uint8 pixels [H, W(, C)], not {kind}")
    if not pixels.size:
        raise ValueError(f"an image must have pixels, which {pixels.shape} has not")
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 3):
        raise ValueError(f"an image must have 1 or 3 channels, not {pixels.shape[2]}")
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def upright(picture: Image.Image, channels: int) -> Image.Image:
    """As a viewer shows it, grey or RGB: turned as EXIF says, 16 bits scaled to 8, transparency laid on white.

    Raises ValueError for floating-point pixels, integers beyond 16 bits, and small ones in 32 bits: their range is not
    known.
    """
    import numpy as np
    from PIL import Image, ImageOps

    mode = "L" if channels == 1 else "RGB"
    sixteen = picture.format in ("PNG", "PPM")  # which have no wider pixels
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a range")
    if picture.mode.startswith("I"):  # convert() would cut everything above 255 off
        pixels = np.asarray(picture)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"its pixels are integers from {pixels.min()} to {pixels.max()}, beyond 16 bits")
        if picture.mode == "I" and not sixteen and 0 < pixels.max() < 256:
            raise ValueError(f"its pixels are 32-bit integers up to {pixels.max()}, of 8 bits or of 16")
        picture = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == mode else picture.convert(mode)


def _square(picture: Image.Image, size: int) -> np.ndarray:
    import numpy as np
    from PIL import Image

    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.array(picture)  # a copy: Pillow's own memory is read-only
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
