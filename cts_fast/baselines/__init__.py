"""The methods that the shifting paper compares with, on the flat buffers and the step of `ShiftingMetaOptimizer`.

A method's class names in `needs` what `step(closure=None, *, losses=None, heldout=None)` must be given beside
gradients: "losses", the T training losses at the current θ, or "heldout", T functions that return a task's held-out
loss with its graph.
"""

from cts_fast.baselines.ablations import NoShifting, RandomShifting, ShiftingAccurate
from cts_fast.baselines.fomaml import FOMAML, FOMAMLPlusPlus
from cts_fast.baselines.imaml import IMAML
from cts_fast.baselines.leap import Leap
from cts_fast.baselines.multitask import MultiTask
from cts_fast.baselines.reptile import Reptile
from cts_fast.optimizer import ShiftingMetaOptimizer

METHODS: dict[str, type[ShiftingMetaOptimizer]] = {  # name on the command line → class
    "cts": ShiftingMetaOptimizer,
    "reptile": Reptile,
    "fomaml": FOMAML,
    "fomaml++": FOMAMLPlusPlus,
    "imaml": IMAML,
    "leap": Leap,
    "mtl": MultiTask,
    "no-shift": NoShifting,
    "random-shift": RandomShifting,
    "cts-accurate": ShiftingAccurate,
}

__all__ = [
    "FOMAML", "FOMAMLPlusPlus", "IMAML", "Leap", "METHODS", "MultiTask", "NoShifting", "RandomShifting",
    "Reptile", "ShiftingAccurate",
]  # fmt: skip
