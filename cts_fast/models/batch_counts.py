"""Batch norms' counters, `num_batches_tracked`, advanced for many networks in one op.

Left to themselves they cost a launch for each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchCounts:
    """The batch norms of `nets` that can be counted for: torch's own, with a momentum, so that nothing reads the count.

    Others count for themselves: those of another forward pass (SyncBatchNorm wants its counter), without a momentum,
    or shared by networks.
    """

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        norms = [module for net in nets for module in net.modules() if isinstance(module, _BatchNorm)]
        layers = [norm for norm in norms if type(norm).forward is _BatchNorm.forward]
        times = Counter(map(id, layers))
        self.layers = [
            layer
            for layer in layers
            if times[id(layer)] == 1 and layer.num_batches_tracked is not None and layer.momentum is not None
        ]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, every network takes one forward pass, which counts nothing; at the end all that train count one.

        A state dict that is taken inside lacks the counters. Nothing is counted where an exception ends it.
        """
        counts = [(layer, layer.num_batches_tracked) for layer in self.layers if layer.training]
        counted = [(layer, count) for layer, count in counts if count is not None]
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
