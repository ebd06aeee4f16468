"""The command line of the builders."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path


def run(build: Callable[[Path, Path], None], module: str, doc: str | None) -> None:
    """Read ``--out FILE [--work FOLDER]`` and build the file; ``python -m module`` is how it was called."""
    summary = (doc or "").partition("\n")[0]  # python -OO drops it
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--work", type=Path, help="folder for downloads (default: a temporary one, removed afterwards)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.out, arguments.work or Path(folder))
