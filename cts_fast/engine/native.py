"""The native modules, looked at before they are loaded: a file cut short would end the program in the dynamic loader.

setup.py writes beside each module, as <its file's name>.json, how long it is, its checksum and the stamp of its
sources.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

NEEDS = {"_cpu": ("cpu", "a C++ compiler"), "_cuda": ("cuda", "nvcc")}  # module → CTS_FAST_BUILD, what builds it
_found: dict[str, ModuleType | tuple[type[ImportError], str]] = {}  # each module, or how it failed, in this process


class NotBuilt(ImportError):
    """There is no such module."""


class Broken(ImportError):
    """There is a file, but not the module that was built."""


def load(name: str) -> ModuleType:
    """The module cts_fast.`name`, "_cpu" or "_cuda".

    Raises NotBuilt where it is not there, and Broken, with the reason, where its file is not what was built or does not
    load. A module that failed fails again in the same way.
    """
    if name not in _found:
        try:
            _found[name] = _load(name)
        except (NotBuilt, Broken) as error:
            _found[name] = (type(error), str(error))
            raise
    found = _found[name]
    if isinstance(found, tuple):
        kind, message = found
        raise kind(message)
    return found


def _load(name: str) -> ModuleType:
    full_name, (mode, compiler) = f"cts_fast.{name}", NEEDS[name]
    if isinstance(sys.modules.get(full_name), ModuleType):
        return sys.modules[full_name]
    spec = importlib.util.find_spec(full_name)
    if spec is None or spec.origin is None:
        hint = f"reinstall with CTS_FAST_BUILD={mode} and {compiler} to see why"
        raise NotBuilt(f"the native module is not there (no file of {full_name}); {hint}")
    try:
        build = _check_file(Path(spec.origin))
        module = importlib.import_module(full_name)
        if build is not None and getattr(module, "build", None) != build:
            raise ImportError(f"it is build {getattr(module, 'build', 'unknown')}, not {build} as installed")
    except Exception as error:  # a loader may say anything
        raise Broken(f"broken: {spec.origin}: {error}; reinstall with CTS_FAST_BUILD={mode}") from error
    return module


def _check_file(file: Path) -> str | None:
    """The build that a module's file should hold, None where nothing says so; ImportError if it was not built so."""
    content = file.read_bytes()
    if not content:
        raise ImportError("the file is empty")
    if sys.platform == "linux" and not content.startswith(b"\x7fELF"):
        raise ImportError("the file is no shared library")
    description = file.with_name(file.name + ".json")
    if not description.exists():
        return None
    try:
        stated = json.loads(description.read_text())
        size, sha256, build = stated["bytes"], stated["sha256"], stated["build"]
    except (ValueError, KeyError, TypeError) as error:
        raise ImportError(f"{description.name}, which describes it, is damaged") from error
    if len(content) < size:
        raise ImportError(f"the file is cut short: {len(content)} of {size} bytes")
    # a packager's tools may have added to it; then the loader has to judge
    if len(content) == size and hashlib.sha256(content).hexdigest() != sha256:
        raise ImportError("the file was changed: it has another checksum than when it was built")
    return build
