"""The whole training step as one CUDA graph: T forward and backward passes side by side, then the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cts_fast.models.batch_counts import BatchCounts

STREAMS = 8
Batches = Tensor | Sequence[tuple[Tensor, ...]]  # one tensor [T, …] for all tasks, or a batch of tensors for each
EAGER_STEPS = 3  # before the capture: libraries choose algorithms and allocate, which a capture may not


class CapturedStep:
    """``losses = step(batches)``: one training step of every task; after a few eager ones, the replay of a CUDA graph.

    Tasks run on a few streams side by side, so small networks fill the GPU together. Every call is a real training
    step. Numbers that are not tensors (a float lr) are what they were at the capture; give `lr` as a tensor on the
    device to change it. The parameters and their groups stay those of the capture. Batches in pinned memory are copied
    while the host goes on: do not refill them before the device has them.

    Args:
        nets: T networks on one CUDA device; optimizer: over their parameters, made with ``capturable=True``.
        loss: (net, *batch) → a scalar with its graph; must not wait for the device.
        prepare: T functions that make a task's batch of what is given for it, on the device and inside the graph
            (gather, crop, normalise); None: what is given are the batches.
        streams: on which the tasks take turns.
        benchmark: let cuDNN try its algorithms in the eager steps and keep the fastest; results then differ from run to
            run by rounding.

    Raises:
        ValueError: an optimizer that cannot be captured, a network that is not on a CUDA device, a learning rate in a
            tensor elsewhere, or batches of another shape than the first.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Tensor],
        prepare: Sequence[Callable[..., tuple[Tensor, ...]]] | None = None,
        streams: int = STREAMS,
        benchmark: bool = False,
    ) -> None:
        self.nets, self.optimizer, self.loss, self.benchmark = list(nets), optimizer, loss, benchmark
        self.device = next(nets[0].parameters()).device
        if self.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs networks on a CUDA device, but these are on {self.device}")
        if not all(group.get("capturable") for group in optimizer.param_groups):
            raise ValueError("a CUDA graph needs an optimizer made with capturable=True")
        for name in ("lr", "meta_lr"):
            for rate in (group.get(name) for group in optimizer.param_groups):
                if isinstance(rate, Tensor) and rate.device != self.device:
                    raise ValueError(
                        f"{name} is a tensor on {rate.device}, of which a CUDA graph keeps the number: "
                        f"put it on {self.device}, or give a float that stays as it is"
                    )
        if prepare is not None and len(prepare) != len(self.nets):
            raise ValueError(f"prepare: {len(prepare)} functions for {len(self.nets)} networks")
        if streams < 1:
            raise ValueError(f"Invalid streams value: {streams}; at least one is needed")
        self.prepare = prepare or [lambda *batch: batch] * len(self.nets)
        self.main = torch.cuda.Stream(self.device)  # torch's own for captures is of the device that first had one
        self.streams = [torch.cuda.Stream(self.device) for _ in range(min(streams, len(self.nets)))]
        self.counts = BatchCounts(self.nets)
        self.inputs: Batches | None = None  # where the graph reads
        self.graph: torch.cuda.CUDAGraph | None = None
        self.losses: Tensor | None = None  # where the graph writes them
        self.eager_steps = 0

    def __call__(self, batches: Batches) -> Tensor:
        """One training step on a batch of tensors for each task, or on one tensor [T, …] for all of them.

        Returns the T losses, detached.
        """
        with torch.cuda.device(self.device), self._algorithms():
            inputs = self._filled(batches)
            if self.graph is None and self.eager_steps < EAGER_STEPS:
                self.eager_steps += 1
                self.optimizer.zero_grad()
                return self._step(inputs)
            if self.graph is None or self.losses is None:
                self.graph, self.losses = self._capture(inputs)
            self.graph.replay()
            return self.losses.clone()

    @contextmanager
    def _algorithms(self) -> Iterator[None]:
        """cuDNN tries its algorithms inside, if it was asked to; torch's own context would set its other flags too."""
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.benchmark or before
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before

    def _filled(self, batches: Batches) -> Batches:
        """Copy the batches to where the graph reads them; returns what is there."""
        if len(batches) != len(self.nets):
            raise ValueError(f"batches of {len(batches)} tasks given, but there are {len(self.nets)} networks")
        if self.inputs is None:
            self.inputs = self._empty_like(batches)
        if isinstance(batches, Tensor) and isinstance(self.inputs, Tensor):
            self._copy("all tasks", self.inputs, batches)  # one copy for all
        elif isinstance(batches, Tensor) or isinstance(self.inputs, Tensor):
            raise ValueError("batches come as one tensor or as a list, as the first ones did")
        else:
            for task, (inputs, batch) in enumerate(zip(self.inputs, batches, strict=True)):
                for here, tensor in zip(inputs, batch, strict=True):
                    self._copy(f"task {task}", here, tensor)
        return self.inputs

    def _empty_like(self, batches: Batches) -> Batches:
        """Room for such batches on the device."""
        if isinstance(batches, Tensor):
            return torch.empty_like(batches, device=self.device)
        return [tuple(torch.empty_like(tensor, device=self.device) for tensor in batch) for batch in batches]

    @staticmethod
    def _copy(whose: str, here: Tensor, given: Tensor) -> None:
        if here.shape != given.shape or here.dtype != given.dtype:
            first, now = f"{here.dtype} {tuple(here.shape)}", f"{given.dtype} {tuple(given.shape)}"
            raise ValueError(
                f"{whose}: a batch of {now}, but the first one had {first}; a CUDA graph takes batches of one shape"
            )
        here.copy_(given, non_blocking=True)

    def _step(self, inputs: Batches) -> Tensor:
        main = torch.cuda.current_stream()
        losses = []
        for stream in self.streams:
            stream.wait_stream(main)
        with self.counts.together():
            try:
                for task, (net, prepare, given) in enumerate(zip(self.nets, self.prepare, inputs, strict=True)):
                    with torch.cuda.stream(self.streams[task % len(self.streams)]):
                        batch = prepare(given) if isinstance(given, Tensor) else prepare(*given)
                        loss = self.loss(net, *batch)
                        loss.backward()
                        losses.append(loss.detach())
            finally:  # also where a loss failed: what comes next must not overtake what runs
                for stream in self.streams:
                    main.wait_stream(stream)
        self.optimizer.step()
        return torch.stack(losses)

    def _capture(self, inputs: Batches) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        self.optimizer.zero_grad()  # so that the graph's gradients are new ones at addresses that stay
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # other threads of the program may go on meanwhile: one that pins a data loader's batches would end a capture
        # that minds all threads
        with torch.cuda.graph(graph, stream=self.main, capture_error_mode="thread_local"):
            losses = self._step(inputs)
        return graph, losses
