"""The optimizer's counters: one int64 tensor, so that they are part of its state, read and written without torch where that is possible."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("inner_step", "round", "meta_updates", "skipped_steps")


class Counters:
    """The numbers of `NAMES` in `tensor` [4], on the device that decides about a step.

    In host memory they are plain numbers in a few cycles; torch's ops on four numbers would take a tenth of a small network's step.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._on_host = tensor.device.type == "cpu"
        self._numbers, self._address = None, 0

    def read(self) -> list[int]:
        """All of them; waits for the device."""
        return self._in_memory()[:] if self._on_host else self.tensor.tolist()

    def write(self, values: Sequence[int]) -> None:
        """Set all of them."""
        if self._on_host:
            self._in_memory()[:] = values
        else:
            self.tensor.copy_(torch.tensor(values, device="cpu"))

    def _in_memory(self) -> ctypes.Array:
        address = self.tensor.data_ptr()  # share_memory_() moves it
        if address != self._address:
            self._numbers, self._address = (ctypes.c_int64 * len(NAMES)).from_address(address), address
        return self._numbers
