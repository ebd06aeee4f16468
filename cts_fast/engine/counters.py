"""A few numbers in a tensor, so that they are part of an optimizer's state, read and written without torch where that is possible."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("inner_step", "round", "meta_updates", "skipped_steps")  # the counters of an optimizer, in their order
_TYPES = {torch.int64: ctypes.c_int64, torch.float64: ctypes.c_double}


class Numbers:
    """The numbers in `tensor` [n], int64 or float64, on whatever device needs them.

    In host memory they are plain numbers in a few cycles; torch's ops on a handful would take a tenth of a small network's step.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._on_host = tensor.device.type == "cpu"
        self._numbers, self._address = None, 0

    def read(self) -> list:
        """All of them; waits for the device."""
        return self._in_memory()[:] if self._on_host else self.tensor.tolist()

    def write(self, values: Sequence) -> None:
        """Set all of them."""
        if self._on_host:
            self._in_memory()[:] = values
        else:
            self.tensor.copy_(torch.tensor(values, dtype=self.tensor.dtype, device="cpu"))

    def _in_memory(self) -> ctypes.Array:
        address = self.tensor.data_ptr()  # share_memory_() moves it
        if address != self._address:
            self._numbers = (_TYPES[self.tensor.dtype] * len(self.tensor)).from_address(address)
            self._address = address
        return self._numbers
