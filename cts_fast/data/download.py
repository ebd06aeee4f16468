"""Files from the web: only when asked for, resumed where they stopped, checked, and unpacked whole or not at all."""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote

from cts_fast.data.cache import locked
from cts_fast.data.errors import DamagedFile

ATTEMPTS = 5  # in a row that bring not one byte
WAIT = 2.0  # seconds before the next one
TIMEOUT = 60.0
BLOCK = 1 << 20
FOLDER = ".downloads"  # in the data root; archives lie there until they are unpacked


@dataclass(frozen=True)
class Archive:
    """A file to fetch.

    gives: what lies under the data root afterwards; into: the folder there that it is unpacked into; md5: of the file,
    as its publisher or torchvision gives it, None where nobody does.
    """

    url: str
    md5: str | None
    into: str
    gives: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the file."""
        return unquote(self.url.rpartition("/")[2])


def obtain(archive: Archive, root: Path) -> None:
    """Fetch and unpack, unless all that the archive gives is there; what is there is never replaced.

    Raises OSError that names the address, or DamagedFile for a file with another md5 or one that cannot be unpacked.
    """
    if all((root / path).exists() for path in archive.gives):
        return
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / archive.name
    with locked(folder / f"{archive.name}.lock", f"{archive.url} is being fetched by another process"):
        if all((root / path).exists() for path in archive.gives):
            return
        if not path.exists():
            fetch(archive.url, path, archive.md5)
        unpack(path, root / archive.into)


def fetch(url: str, path: Path, md5: str | None = None) -> None:
    """Write what is at `url` to `path`; goes on with a part that is there, and over cut connections.

    Raises OSError that names the address and says that the part is kept; DamagedFile if the md5 differs (the part is
    then deleted). Without `md5` the one that the server may tell in its answer counts.
    """
    part = path.with_name(path.name + ".part")
    failures, told, most, total = 0, None, _size(part), None
    if not sys.stderr.isatty():
        print(f"fetching {url}", file=sys.stderr, flush=True)
    while True:
        try:
            told, whole, said = _receive(url, part)
            total = said or total
            if whole and total in (None, _size(part)):
                break
            if whole:  # it says so of another number of bytes than it told before
                part.unlink()
            reason = f"the connection ended after {_size(part):,} bytes"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):  # time-out, too many requests
                raise OSError(f"{url} cannot be fetched ({error.code} {error.reason})") from None
            reason = f"{error.code} {error.reason}"
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures, most = (1, _size(part)) if _size(part) > most else (failures + 1, most)  # or it begins for ever anew
        if failures == ATTEMPTS:
            raise OSError(f"{url} cannot be fetched ({reason}); {part} is kept: the same command goes on with it")
        time.sleep(WAIT)
    expected, found = md5 or told, md5_of(part)
    if expected is not None and found != expected:
        part.unlink()
        raise DamagedFile(
            f"{url} arrived with md5 {found} where {expected} is expected: deleted; run the same command again, and if "
            "it stays so, the file on the server is another one: get it by other means"
        )
    os.replace(part, path)


def _receive(url: str, part: Path) -> tuple[str | None, bool, int | None]:
    """One request: append what the part lacks; returns the md5 that the server tells, whether all is there, and of how
    many bytes."""
    from tqdm import tqdm

    start = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "cts-fast", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        whole = error.headers.get("Content-Range", "").strip() == f"bytes */{start}"
        if not whole:  # longer than the file is
            part.unlink()
        return _told_md5(error.headers), whole, None
    with response:
        ranged = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if response.status != 206:
            start = 0  # the server sends all of it
        elif ranged is None or int(ranged[1]) != start:
            part.unlink(missing_ok=True)  # it sends something else: the next request is for all of it
            return None, False, None
        length = response.headers.get("Content-Length")
        if length is not None and not re.fullmatch(r"\d+", length.strip(), re.ASCII):
            raise HTTPException(f"its Content-Length is {length!r}, so that nobody knows whether all of it arrived")
        total = None if length is None else start + int(length)
        if response.status == 206 and ranged and ranged[2] != "*":
            total = int(ranged[2])
        if total is not None and shutil.disk_usage(part.parent).free < total - start:
            raise OSError(f"{url} needs {total - start:,} bytes, which {part.parent} has not free")
        bar = tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if start else "wb") as file, bar:
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        return _told_md5(response.headers), total is None or _size(part) == total, total


def _told_md5(headers) -> str | None:
    """The md5 in Google's ``x-goog-hash: crc32c=...,md5=<base64>``."""
    told = re.search(r"md5=([A-Za-z0-9+/]{22}==)", ",".join(headers.get_all("x-goog-hash") or []))
    try:
        return base64.b64decode(told[1]).hex() if told else None
    except binascii.Error:
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def md5_of(path: Path) -> str:
    """The md5 of a file, as hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpack a tar file. Raises TarError for what would lie elsewhere."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    for member in archive.getmembers():  # Pythons before 3.10.12 and 3.11.4, which some systems bring, have no filters
        inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
        if not inside or not (member.isfile() or member.isdir()):
            raise tarfile.TarError(f"{member.name!r} in it is no file or folder of its own")
    archive.extractall(folder)


def unpack(path: Path, into: Path) -> None:
    """Unpack a tar, zip or gz file, or move any other, into a folder, whole or not at all; then delete the archive.

    Raises DamagedFile that names the archive, FileExistsError for a folder that is there already.
    """
    into.mkdir(parents=True, exist_ok=True)
    fresh = into / f".{path.name}.unpacking"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        if path.name.endswith((".tar", ".tgz", ".tar.gz")):
            with tarfile.open(path) as archive:
                _extract(archive, fresh)
        elif path.name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(fresh)
        elif path.name.endswith(".gz"):
            with gzip.open(path) as packed, open(fresh / path.stem, "wb") as file:
                shutil.copyfileobj(packed, file)
        else:
            shutil.copy(path, fresh / path.name)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        shutil.rmtree(fresh)
        raise DamagedFile(f"{path} cannot be unpacked ({error}): delete it and run the same command again") from None
    found = sorted(fresh.iterdir())
    for target in (into / entry.name for entry in found):
        if target.is_dir():
            shutil.rmtree(fresh)
            raise FileExistsError(f"{target} is there, but not whole: move it away and run the same command again")
    for entry in found:
        os.replace(entry, into / entry.name)
    fresh.rmdir()
    path.unlink()
