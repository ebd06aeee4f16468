"""What the ranks of tests/distributed run: each check gets a process group and returns numbers to compare."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
import torch.distributed as dist
from support.step_cases import Case, parameters, result, set_gradients
from torch import Tensor

from cts_fast import ShiftingMetaOptimizer


def own_tasks(layout: tuple[int, ...], rank: int) -> slice:
    """The tasks of a rank, where rank r has layout[r] of them."""
    ends = [0, *accumulate(layout)]
    return slice(ends[rank], ends[rank + 1])


def make(group, case: Case, layout, backend="reference", cls=ShiftingMetaOptimizer, **more):
    """(optimizer of this rank's tasks, parameters of all tasks)."""
    shared, heads = parameters(case)
    own = slice(None) if group is None else own_tasks(layout, dist.get_rank(group))
    given = heads[own] if case.heads else None
    options = {**case.options, **more}
    opt = cls(shared[own], **options, heads=given, backend=backend, process_group=group)
    return opt, [a + b for a, b in zip(shared, heads, strict=True)]


def phi_of(opt) -> Tensor:
    return torch.cat([phi.flatten() for phi in opt.initialization])


def trajectory(group, case: Case, layout, backend="reference", cls=ShiftingMetaOptimizer, **more):
    """φ after every step [steps, P], and then all that this rank's buffers hold."""
    opt, params = make(group, case, layout, backend, cls, **more)
    assert opt.num_tasks == case.tasks
    phis = []
    for step in range(case.steps):
        set_gradients(case, params, step)
        opt.step(**_losses(opt, layout, group, step))
        phis.append(phi_of(opt).clone())
    return torch.stack(phis), result(opt), (opt.inner_step, opt.round, opt.meta_updates, opt.skipped_steps)


def _losses(opt, layout, group, step):
    if "losses" not in opt.needs:
        return {}
    tasks = range(sum(layout))[slice(None) if group is None else own_tasks(layout, dist.get_rank(group))]
    return {"losses": [1.0 / (1 + t + step) for t in tasks]}
