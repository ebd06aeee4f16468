"""Runs the step's tests on csrc/cuda/shifting_step.cu compiled for the CPU.

python shim_step.py MODULE [pytest arguments]
"""

import importlib.machinery
import importlib.util
import sys

import pytest

import cts_fast


def load(path: str):
    """The module at `path` in the place of cts_fast._cuda."""
    loader = importlib.machinery.ExtensionFileLoader("cts_fast._cuda", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("cts_fast._cuda", loader))
    loader.exec_module(module)
    sys.modules["cts_fast._cuda"] = cts_fast._cuda = module


if __name__ == "__main__":
    load(sys.argv[1])
    sys.exit(pytest.main(sys.argv[2:]))
