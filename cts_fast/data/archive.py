"""The suite file: image tasks in one compressed file that torch and the standard library can read.

Layout, little endian: 8 bytes magic, 4 bytes header length, 32 bytes sha256 of the header, the header (JSON), then
one XZ-compressed member per task at the offset that the header gives from the end of the header. A member holds, in
this order, the class of every image (one byte, training images first) and the pixels, in one of two kinds:

* "images": uint8 [N, C, H, W], each plane stored as horizontal differences modulo 256 where the header says
  ``"filter": "left"``;
* "crops": pictures [C, h, w] stored as two-dimensional differences (colour as G, R - G, B - G), and for every image
  the picture and the corner (int16 picture, y, x) from which it is cropped, so that overlapping crops cost no space.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from cts_fast.data.errors import DamagedFile

MAGIC = b"CTSDATA1"
_PREFIX = struct.Struct("<8sI32s")


def _lzma() -> ModuleType:
    """Python's lzma, which a Python that was built without liblzma lacks."""
    try:
        import lzma
    except ImportError as error:
        raise OSError(
            f"this Python cannot read the suite's file: it was built without liblzma ({error}); install one that has it"
        ) from error
    return lzma


def _compress(data: bytes) -> bytes:
    lzma = _lzma()
    xz = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0, "dict_size": 1 << 24}
    return lzma.compress(data, lzma.FORMAT_XZ, filters=[xz])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()  # numpy: only the builder writes


def _tensor(data: bytes, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _difference(x: Tensor, dim: int) -> Tensor:
    """x[i] - x[i-1] along ``dim`` modulo 256, the first kept (uint8)."""
    shifted = torch.zeros_like(x)
    length = x.shape[dim]
    shifted.narrow(dim, 1, length - 1).copy_(x.narrow(dim, 0, length - 1))
    return x - shifted


def _accumulate(x: Tensor, dim: int) -> Tensor:
    """Inverse of `_difference`."""
    return x.cumsum(dim, dtype=torch.uint8)


def _encode_picture(picture: Tensor) -> Tensor:
    """uint8 [C, h, w] to differences of the same shape."""
    if picture.shape[0] == 3:
        red, green, blue = picture
        picture = torch.stack((green, red - green, blue - green))
    return _difference(_difference(picture, 1), 2)


def _decode_picture(stored: Tensor) -> Tensor:
    """Inverse of `_encode_picture`."""
    picture = _accumulate(_accumulate(stored, 2), 1)
    if picture.shape[0] == 3:
        green, red, blue = picture
        picture = torch.stack((red + green, green, blue + green))
    return picture


def pack_images(images: Tensor, labels: Tensor, differences: str | None = None) -> tuple[dict, bytes]:
    """Encode uint8 images [N, C, H, W] with labels [N]; returns the header's entries and the compressed member."""
    stored = _difference(images, 3) if differences == "left" else images
    entry = {"kind": "images", "filter": differences, "shape": list(images.shape)}
    return entry, _compress(_bytes(labels.to(torch.uint8)) + _bytes(stored))


def pack_crops(pictures: list[Tensor], corners: Tensor, labels: Tensor, size: int) -> tuple[dict, bytes]:
    """Encode crops of ``size`` x ``size``: pictures uint8 [C, h, w], corners [N, 3] (picture, y, x), labels [N]."""
    channels = pictures[0].shape[0]
    entry = {
        "kind": "crops",
        "pictures": [list(p.shape) for p in pictures],
        "shape": [len(labels), channels, size, size],
    }
    parts = [_bytes(labels.to(torch.uint8))] + [_bytes(_encode_picture(p)) for p in pictures]
    parts.append(_bytes(corners.to(torch.int16)))
    return entry, _compress(b"".join(parts))


def unpack(entry: dict, member: bytes) -> tuple[Tensor, Tensor]:
    """Decode a member: images uint8 [N, C, H, W], labels int64 [N]; raises `DamagedFile` where sizes do not agree."""
    count, channels, height, width = entry["shape"]
    data = _decompress(entry, member)
    labels = _tensor(data[:count]).to(torch.int64)
    if entry["kind"] == "images":
        images = _tensor(data[count:]).view(count, channels, height, width)
        return (_accumulate(images, 3) if entry["filter"] == "left" else images), labels
    corners = _corners(data, count)
    images = torch.empty(count, channels, height, width, dtype=torch.uint8)
    start = count
    for index, (c, h, w) in enumerate(entry["pictures"]):
        picture = _decode_picture(_tensor(data[start : start + c * h * w]).view(c, h, w))
        start += c * h * w
        windows = picture.unfold(1, height, 1).unfold(2, width, 1)  # [C, y, x, H, W], a view
        mine = (corners[:, 0] == index).nonzero().squeeze(1)
        images[mine] = windows[:, corners[mine, 1], corners[mine, 2]].transpose(0, 1)
    return images, labels


def read_corners(entry: dict, member: bytes) -> Tensor:
    """Where the images of a "crops" member come from: int64 [N, 3] (picture, y, x)."""
    return _corners(_decompress(entry, member), entry["shape"][0])


def _decompress(entry: dict, member: bytes) -> bytes:
    count, channels, height, width = entry["shape"]
    lzma = _lzma()
    try:
        data = lzma.decompress(member)
    except lzma.LZMAError as error:
        raise DamagedFile(f"its compressed data cannot be read ({error})") from None
    if entry["kind"] == "images":
        want = count * (1 + channels * height * width)
    else:
        want = count * 7 + sum(c * h * w for c, h, w in entry["pictures"])
    if len(data) != want:
        raise DamagedFile(f"it holds {len(data):,} bytes where its header needs {want:,}")
    return data


def _corners(data: bytes, count: int) -> Tensor:
    return _tensor(data[-6 * count :], torch.int16).view(count, 3).long()


def write(path: Path, about: dict, members: list[tuple[dict, bytes]]) -> None:
    """Write a suite file: ``about`` is the header's general part, ``members`` each task's (entry, compressed data)."""
    entries, offset = [], 0
    for entry, data in members:
        entries.append({**entry, "offset": offset, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        offset += len(data)
    header = json.dumps({**about, "tasks": entries}, ensure_ascii=False, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(_PREFIX.pack(MAGIC, len(header), hashlib.sha256(header).digest()) + header)
        for _, data in members:
            file.write(data)


def read_header(path: Path) -> tuple[dict, int]:
    """The header of a suite file and the position where its members begin; raises `DamagedFile`."""
    with open(path, "rb") as file:
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
            raise DamagedFile("it does not begin as a suite file does")
        _, length, digest = _PREFIX.unpack(prefix)
        header = file.read(length)
    if hashlib.sha256(header).digest() != digest:
        raise DamagedFile("its header does not match its sha256")
    return json.loads(header), _PREFIX.size + length


def read_member(path: Path, start: int, entry: dict) -> bytes:
    """The compressed member of a task; raises `DamagedFile` where its sha256 differs."""
    with open(path, "rb") as file:
        file.seek(start + entry["offset"])
        data = file.read(entry["bytes"])
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise DamagedFile("its sha256 differs from the one in the header")
    return data
