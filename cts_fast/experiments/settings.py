"""Settings of the image experiments: what `--preset` stands for, and what the methods are called in tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cts_fast.experiments.meta_test import MetaTestSettings
from cts_fast.experiments.meta_train import MetaTrainSettings

LABELS = {
    "cts": "continual trajectory shifting (cts)",
    "reptile": "Reptile",
    "fomaml": "FOMAML",
    "fomaml++": "FOMAML++",
    "imaml": "iMAML",
    "leap": "Leap",
    "mtl": "multi-task learning",
    "no-shift": "cts without the shift",
    "random-shift": "cts, shifted at random",
    "cts-accurate": "cts, exact trajectories",
    "finetune": "pretrained on one task",
    "scratch": "no meta-learning (scratch)",
    "none": "the given weights, no meta-learning",
}
UNTRAINED = ("scratch", "none")  # what is meta-tested without meta-training


def method_of(name: str) -> str:
    """The method of a name in a run: of "reptile@0.5", which is Reptile at beta 0.5, "reptile"."""
    return name.partition("@")[0]


def rate_of(name: str, meta_lr: Mapping[str, float]) -> float:
    """Its beta: what follows the @, else that of `meta_lr`. Raises ValueError for no step size, or none at all."""
    method, at, text = name.partition("@")
    if not at and method not in meta_lr:
        raise ValueError(f"the preset has no meta_lr for {method!r}: give --meta-lr {method}=X")
    try:
        rate = float(text) if at else meta_lr[method]
    except ValueError:
        rate = math.nan
    if not 0 <= rate < math.inf:
        raise ValueError(f"{name!r}: behind the @ belongs a step size, finite and not negative")
    return rate


def labels(names: Sequence[str], meta_lr: Mapping[str, float]) -> dict[str, str]:
    """Name to label of the methods of a run; with their beta where one stands there as METHOD@BETA."""
    several = {method_of(name) for name in names if "@" in name}
    return {
        name: LABELS[method_of(name)] + (f", β = {meta_lr[name]:g}" if method_of(name) in several else "")
        for name in names
    }


@dataclass(frozen=True)
class Preset:
    """Settings of both phases.

    meta_lr: beta by method; snapshots: number of points on the accuracy curve; methods: those of a run that names none.
    """

    train: MetaTrainSettings
    test: MetaTestSettings
    meta_lr: Mapping[str, float]
    snapshots: int
    methods: tuple[str, ...]


def snapshot_steps(train: MetaTrainSettings, points: int) -> list[int]:
    """The last step, and before each point one at half its steps; whole rounds, but for points within the first.

    Within a round a method that updates once a round has spent steps and not used them yet: no fair point to look at.
    """
    halved = [train.steps >> i for i in range(points)]
    return [step - step % train.horizon if step > train.horizon else step for step in halved if step]


def _of_small_images(
    horizon: int, rounds: int, *, cts: float, reptile: float, seeds: int, snapshots: int, methods: tuple[str, ...]
) -> Preset:
    """For the built-in suite on a CPU: 16 x 16 pixels, small batches, 500 images to fine-tune on.

    cts, reptile: their beta, the only tuned ones; the ablations have that of cts. seeds: fine-tuning runs.
    """
    untuned = {"fomaml": 0.1, "fomaml++": 0.1, "imaml": 0.1, "leap": 0.1, "mtl": 1.0}
    shifting = dict.fromkeys(("cts", "no-shift", "random-shift", "cts-accurate"), cts)
    return Preset(
        MetaTrainSettings(horizon, rounds, batch_size=16, size=16, padding=1),
        MetaTestSettings(steps=50, seeds=seeds, images=500, batch_size=32, size=16, padding=1),
        {**untuned, **shifting, "reptile": reptile},
        snapshots,
        methods,
    )


_BOTH = ("cts", "reptile")

# How the first two were tuned: QUICK.md in cts_fast/examples.
PRESETS = {
    # Minutes on two CPU cores.
    "quick": _of_small_images(100, 5, cts=0.1, reptile=3.0, seeds=3, snapshots=3, methods=_BOTH),
    # The time to see where the curves go, and Reptile at its best beta up to 1 as well: up to an hour on two CPU cores.
    "long": _of_small_images(200, 20, cts=0.06, reptile=2.0, seeds=5, snapshots=8, methods=(*_BOTH, "reptile@1")),
    # The paper's image experiments (section 4.2): GPU days.
    "paper": Preset(
        MetaTrainSettings(horizon=1000, rounds=200),
        MetaTestSettings(steps=1000),
        {
            "cts": 0.01,
            "reptile": 1.0,
            "fomaml": 0.01,
            "fomaml++": 0.01,
            "imaml": 0.1,
            "leap": 0.1,
            "mtl": 1.0,
            "no-shift": 0.01,
            "random-shift": 0.01,
            "cts-accurate": 0.01,
        },
        snapshots=8,
        methods=_BOTH,
    ),
}
