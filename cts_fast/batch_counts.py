"""The counters of batch norms, `num_batches_tracked`, of many networks advanced in one op: a layer's own costs a launch each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchCounts:
    """The batch norms of `nets` that only count: those with a momentum, whose statistics need no count."""

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        layers = (module for net in nets for module in net.modules() if isinstance(module, _BatchNorm))
        self.layers = [
            layer for layer in layers if layer.num_batches_tracked is not None and layer.momentum is not None
        ]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, every network takes one forward pass, which counts nothing; at the end all that train have counted one batch."""
        counted = [(layer, layer.num_batches_tracked) for layer in self.layers if layer.training]
        for layer, _ in counted:
            layer.num_batches_tracked = None
        try:
            yield
        finally:
            for layer, count in counted:
                layer.num_batches_tracked = count
        if counted:
            with torch.no_grad():
                torch._foreach_add_([count for _, count in counted], 1)
