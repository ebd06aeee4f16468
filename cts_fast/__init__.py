"""Large-scale meta-learning with continual trajectory shifting, one pass over memory per step."""

from cts_fast.optimizer import ShiftingMetaOptimizer

__all__ = ["ShiftingMetaOptimizer"]
from cts_fast._version import __version__
