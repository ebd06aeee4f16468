"""What torch.optim puts around an optimizer's step, at no cost where nobody listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def with_torchs_hooks(step: Callable) -> Callable:
    """What torch.optim puts around `step`: hooks and the profiler's label; and, under torch.compile, a graph break.

    It is entered only where somebody listens: with cold caches it costs a tenth of a small network's step.
    `failed(error)` of the optimizer is called where a hook raises before the step.
    """

    def after_pre_hooks(self, *args, **kwargs):
        self.in_pre_hooks = False
        return step(self, *args, **kwargs)

    def with_pre_hooks(self, *args, **kwargs):
        self.in_pre_hooks = True
        try:
            return profiled(self, *args, **kwargs)
        except Exception as error:
            if self.in_pre_hooks:
                self.failed(error)
            raise

    eager = torch._disable_dynamo(step)
    profiled = torch.optim.Optimizer.profile_hook_step(after_pre_hooks)
    wrapped = torch._disable_dynamo(with_pre_hooks)

    @wraps(step)
    def hooked(self, *args, **kwargs):
        compiles = torch.compiler.is_compiling()
        if type(self).step is not hooked:  # torch wraps a subclass's own step by itself
            return (eager if compiles else step)(self, *args, **kwargs)
        listens = (
            compiles
            or profiler._is_profiler_enabled
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )
        return (wrapped if listens else step)(self, *args, **kwargs)

    setattr(hooked, "hooked", True)  # noqa: B010 - by this mark torch.optim.Optimizer knows that it need not wrap it
    return hooked


def after_hooks(hooks: Mapping[int, Callable], optimizer: torch.optim.Optimizer, *given: Any) -> Any:
    """Call an optimizer's hooks in turn with it and, if there is one, a state dict, which each may replace; the last
    state dict.
    """
    for hook in hooks.values():
        changed = hook(optimizer, *given)
        given = given if changed is None or not given else (changed,)
    return given[0] if given else None
