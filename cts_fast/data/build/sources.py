"""Where the built-in suite comes from: packages at fixed versions, fetched and unpacked (builder only)."""

from __future__ import annotations

import io
import lzma
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

WHEELS = {  # PyPI package: version; wheels for CPython 3.11 on Linux, of which only data files are read
    "matplotlib": "3.11.2",
    "mplhep-data": "0.1.0",
    "qtawesome": "1.4.2",
    "rendercv-fonts": "0.5.1",
    "scikit-image": "0.26.0",
    "scikit-learn": "1.9.1",
    "scipy": "1.9.3",  # the last releases that carried the pictures `face` and `ascent`
    "weblate-fonts": "2026.1",
}
DEBS = {  # Debian package: version
    "dataset-fashion-mnist": "0.0~git20200523.55506a9-1",
    "fonts-noto-color-emoji": "2.042-0+deb12u1",
    "lomiri-wallpapers-16.04": "20.04.0-2",
    "unicode-data": "15.0.0-1",  # only the list of emoji by group
}
RENDERER = {"pillow": "13.0.0", "freetype": "2.14.3", "numpy": "2.4.6", "fonttools": "4.68.0"}
"""Versions that the committed file was rendered with; others may change single grey levels."""

_PIP = [
    "--no-deps",
    "--only-binary=:all:",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_27_x86_64",
    "--platform=manylinux_2_24_x86_64",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
    "--platform=any",
]


def fetch(folder: Path, wheels: dict[str, str] = WHEELS, debs: dict[str, str] = DEBS) -> Path:
    """Download what is not yet in ``folder`` and unpack it; returns the folder with the unpacked trees.

    Raises RuntimeError that names the package, the version and the command which failed.
    """
    downloads, trees = folder / "downloads", folder / "trees"
    downloads.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", *_PIP, "-d", "."]
    for package, version in wheels.items():
        tree = trees / package
        if not tree.is_dir():
            pattern = f"{package.replace('-', '_')}-{version}-*.whl"
            wheel = _download(f"{package} {version}", downloads, pattern, [*pip, f"{package}=={version}"])
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(tree)
    for package, version in debs.items():
        tree = trees / package
        if not tree.is_dir():
            pattern = f"{package}_{version.replace(':', '%3a')}_*.deb"
            command = ["apt-get", "download", f"{package}={version}"]
            _unpack_deb(_download(f"{package} {version}", downloads, pattern, command), tree)
    return trees


def _download(what: str, folder: Path, pattern: str, command: list[str]) -> Path:
    found = list(folder.glob(pattern))
    if not found:
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise RuntimeError(
                f"{what} could not be downloaded by `{' '.join(command)}`: {said.strip()}; "
                f"put a file {pattern} into {folder} by other means and run again"
            ) from None
        found = list(folder.glob(pattern))
    if len(found) != 1:
        raise RuntimeError(f"{folder} must hold exactly one file {pattern} and holds {len(found)}")
    return found[0]


def _unpack_deb(deb: Path, tree: Path) -> None:
    """A Debian package is an `ar` archive: 8 bytes magic, then members of a 60-byte header and even-padded data."""
    data, position = deb.read_bytes(), 8
    while position < len(data):
        name, size = data[position : position + 16].decode().strip(" /"), int(data[position + 48 : position + 58])
        body = data[position + 60 : position + 60 + size]
        if name == "data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(lzma.decompress(body))) as archive:
                archive.extractall(tree, filter="data")
            return
        position += 60 + size + size % 2
    raise RuntimeError(f"{deb} holds no data.tar.xz")
