"""What kernels read on the device: a small host table's copy, and learning rates that are tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from cts_fast.engine.gradients import Gradients


def host_addresses(gradients: Gradients) -> Tensor:
    """The gradients' addresses as int64 [count], in their own table: valid until they are collected again."""
    memory = (ctypes.c_int64 * len(gradients)).from_address(gradients.address)
    return torch.frombuffer(memory, dtype=torch.int64)


class DeviceTable:
    """Sends a table again only when it changed; a captured graph gets one of its own, which its replays fill anew."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sent: Tensor | None = None  # what the device holds
        self.table: Tensor | None = None
        self.spare: Tensor | None = None  # pinned, for the next capture, in which none can be made
        self.captured: list[Tensor] = []  # read at every replay: pinned copies and what they are copied to

    def __call__(self, host: Tensor, capturable: bool = False) -> Tensor:
        """The device's copy of `host`, a CPU tensor, in the order of the current stream. capturable: a capture may
        follow.

        Raises RuntimeError in a capture that no call with capturable=True came before.
        """
        on_gpu = self.device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            if self.spare is None:
                raise RuntimeError(
                    "the step's table needs pinned memory, which a capture cannot make: "
                    "take one step outside before each capture"
                )
            pinned, self.spare = self.spare.copy_(host), None
            self.captured += [pinned, pinned.to(self.device, non_blocking=True)]
            return self.captured[-1]
        if on_gpu and capturable and self.spare is None:
            self.spare = torch.empty_like(host, pin_memory=True)
        if self.sent is None or not torch.equal(self.sent, host):
            self.sent = (
                host.pin_memory() if on_gpu else host.clone()
            )  # CUDA may wait for the stream before it copies from other memory
            table = torch.empty_like(host, device=self.device) if self.table is None else self.table
            self.table = table.copy_(self.sent, non_blocking=True)
        assert self.table is not None  # what was sent has a table
        return self.table


def device_rate(rate: float | Tensor) -> tuple[int, bool]:
    """Where the device reads a tensor lr or meta_lr, and whether it is float64 there; (0, False) for a number.

    Raises ValueError for other dtypes.
    """
    if not isinstance(rate, Tensor):
        return 0, False
    if rate.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a tensor lr or meta_lr that the device reads must be float32 or float64, but is {rate.dtype}"
        )
    return rate.data_ptr(), rate.dtype == torch.float64
