"""Large-scale meta-learning with continual trajectory shifting, one pass over memory per step."""

from cts_fast._version import __version__
from cts_fast.optimizer import ShiftingMetaOptimizer

__all__ = ["ShiftingMetaOptimizer", "__version__"]
