"""The step as a handful of large in-place torch ops on the flat buffers: any device that torch knows.

Columns are taken in blocks, so that the dense copy of the gradients stays small beside the buffers (2 MiB of float32 a
task).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cts_fast.engine.backends.base import Backend
from cts_fast.engine.gradients import Gradients
from cts_fast.engine.layout import Flat
from cts_fast.engine.plan import Control
from cts_fast.engine.rules.sgd import Hyper

BLOCK = 1 << 19  # columns of all tasks together that one pass takes


class TorchOps(Backend):
    """Blocks of columns with one param group each; in a block every equation is one op on [R, B]."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        super().__init__(flats)
        self.blocks: list[_Block] = []
        first = 0
        for flat in flats:
            pieces: list[tuple[int, int, int]] = []  # (segment, from, to) within the segment
            room, width = 0, max(1, BLOCK // flat.rows)
            for n, segment in enumerate(flat.segments):
                at = 0
                while at < segment.numel:
                    if room == 0 or flat.segments[pieces[-1][0]].group != segment.group:
                        self._close(flat, pieces, first)
                        pieces, room = [], width
                    take = min(room, segment.numel - at)
                    pieces.append((n, at, at + take))
                    at, room = at + take, room - take
            self._close(flat, pieces, first)
            first += len(flat.params)

    def _close(self, flat: Flat, pieces: list[tuple[int, int, int]], first: int) -> None:
        if pieces:
            self.blocks.append(_Block(flat, pieces, first))

    def step_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control) -> None:
        for block in self.blocks:
            block.step_(gradients, hyper[block.group], control)

    def partial_(self, gradients: Gradients, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        for block in self.blocks:
            block.partial_(gradients, hyper[block.group], control, total)

    def finish_(self, hyper: Sequence[Hyper], control: Control, total: Tensor) -> None:
        for block in self.blocks:
            block.finish_(hyper[block.group], control, total)


class _Block:
    """A run of columns of one `Flat`, all of one param group; padding between its tensors comes along as zeros."""

    def __init__(self, flat: Flat, pieces: list[tuple[int, int, int]], first: int) -> None:
        self.flat, self.group = flat, flat.segments[pieces[0][0]].group
        offsets = [flat.segments[n].offset + start for n, start, _ in pieces]
        self.begin, self.end = offsets[0], offsets[-1] + pieces[-1][2] - pieces[-1][1]
        self.columns = slice(self.begin, self.end)
        self.pieces = [
            (first + n * flat.rows + row, n, row, start, stop, offset - self.begin)
            for (n, start, stop), offset in zip(pieces, offsets, strict=True)
            for row in range(flat.rows)
        ]

    def step_(self, gradients: Sequence[Tensor | None], h: Hyper, c: Control) -> None:
        phi, theta, v = self._inner_update_(gradients, h, c)
        if phi is not None and c.meta_update and h.meta_lr:
            self._meta_update_(phi, theta, self._sum_of_differences(phi, theta), h, c)
        if phi is not None and c.reset:
            theta.copy_(phi)
            if c.reset_momentum:
                v.zero_()
        self._store_(theta, v)

    def partial_(self, gradients: Sequence[Tensor | None], h: Hyper, c: Control, total: Tensor) -> None:
        phi, theta, v = self._inner_update_(gradients, h, c)
        if phi is not None:
            total[self.columns] = self._sum_of_differences(phi, theta)
            if c.reset and c.reset_momentum:
                v.zero_()
        self._store_(theta, v)

    def finish_(self, h: Hyper, c: Control, total: Tensor) -> None:
        flat = self.flat
        if not flat.shared:
            return
        phi, theta = flat.phi[self.columns], flat.work_theta[:, self.columns]
        if h.meta_lr:
            self._meta_update_(phi, theta, total[self.columns].clone(), h, c)
        if c.reset:
            theta.copy_(phi)
        self._store_(theta)

    def _inner_update_(
        self, gradients: Sequence[Tensor | None], h: Hyper, c: Control
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """φ [B] and, after the inner step, θ and v [R, B], in working precision."""
        flat, columns = self.flat, self.columns
        phi = None if flat.phi is None else flat.phi[columns]
        theta, v = flat.work_theta[:, columns], flat.momentum[:, columns]
        if flat.master is not None:
            v = v.float()
            flat.follow_parameters_(columns)

        d, missing, fresh = self._gather(gradients, h, c)
        kept = [(at, row, theta[row, at].clone(), v[row, at].clone()) for row, at in missing]
        if c.inverse_scale != 1:
            d.mul_(c.inverse_scale)
        if h.maximize:
            d.neg_()
        if h.weight_decay:
            d.add_(theta, alpha=h.weight_decay)
        u = d
        if h.momentum:
            v.mul_(h.momentum).add_(d, alpha=1 - h.dampening)
            for row, at in fresh:
                v[row, at] = d[row, at]
            u = d.add_(v, alpha=h.momentum) if h.nesterov else v
        theta.add_(u, alpha=-float(h.lr))
        for at, row, theta_before, v_before in kept:
            theta[row, at], v[row, at] = theta_before, v_before
        return phi, theta, v

    @staticmethod
    def _sum_of_differences(phi: Tensor, theta: Tensor) -> Tensor:
        """Σ_t (θ_t − φ), in the tasks' order."""
        total = theta[0] - phi
        for row in theta[1:]:
            total += row - phi
        return total

    @staticmethod
    def _meta_update_(phi: Tensor, theta: Tensor, total: Tensor, h: Hyper, c: Control) -> None:
        """Δ = β/T total, in its place; φ ← φ + Δ; θ_t ← θ_t + shift · Δ."""
        delta = total.mul_(h.meta_lr / c.num_tasks)
        phi.add_(delta)
        theta.add_(delta, alpha=h.shift)

    def _store_(self, theta: Tensor, v: Tensor | None = None) -> None:
        """Low precision: the parameters, and momentum where it is given, from what was computed in float32."""
        if self.flat.master is not None:
            self.flat.theta[:, self.columns].copy_(theta)
            if v is not None:
                self.flat.momentum[:, self.columns].copy_(v)

    def _gather(self, gradients: Sequence[Tensor | None], h: Hyper, c: Control):
        """The block's gradients [R, B]; its (row, columns) without one; those whose momentum takes its first, where
        that matters.
        """
        flat = self.flat
        d = torch.zeros(flat.rows, self.end - self.begin, dtype=flat.work_dtype, device=flat.device)
        into, of, missing, fresh = [], [], [], []
        started = flat.started.tolist() if h.dampened and not flat.all_started else None
        for i, n, row, start, stop, offset in self.pieces:
            at = slice(offset, offset + stop - start)
            gradient = gradients[i]
            if gradient is None:
                missing.append((row, at))
                continue
            of.append(gradient.detach().as_strided((stop - start,), (1,), gradient.storage_offset() + start))
            into.append(d[row, at])
            c.flag_nonfinite(i, of[-1:])
            if started is not None and not started[n][row]:
                fresh.append((row, at))
        if of:
            torch._foreach_copy_(into, of)
        return d, missing, fresh
