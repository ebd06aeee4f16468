"""Settings of the image experiments: what `--preset` stands for, and what the methods are called in tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
    "finetune": "pretrained on its source (finetune)",
    "scratch": "no meta-learning (scratch)",
    "none": "the given weights, no meta-learning",
}


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

    meta_lr: beta by method; snapshots: fractions of the steps at which phi is meta-tested; methods: those of a run that
    names none; sources: tasks that `finetune` trains on, if the run has them.
    """

    train: MetaTrainSettings
    test: MetaTestSettings
    meta_lr: Mapping[str, float]
    snapshots: tuple[float, ...]
    methods: tuple[str, ...]
    sources: tuple[str, ...] = ()


def halvings(points: int) -> tuple[float, ...]:
    """1, 1/2, 1/4, ... : that many."""
    return tuple(0.5**i for i in range(points))


def snapshot_steps(train: MetaTrainSettings, fractions: Sequence[float]) -> list[int]:
    """Steps at these fractions of meta-training; whole rounds, but for points within the first.

    Within a round a method that updates once a round has spent steps and not used them yet: no fair point to look at.
    """
    steps = [math.floor(train.steps * fraction) for fraction in fractions]
    return [step - step % train.horizon if step > train.horizon else step for step in steps if step]


def of_horizons(train: MetaTrainSettings, horizons: Sequence[int]) -> list[MetaTrainSettings]:
    """The same number of steps in rounds of each length; `train.rounds` counts those of the longest.

    Raises ValueError for a horizon that does not divide the steps.
    """
    steps = max(horizons) * train.rounds
    uneven = [horizon for horizon in horizons if steps % horizon]
    if uneven:
        raise ValueError(
            f"--horizon {uneven[0]} does not divide the {steps:,} steps that every horizon gets "
            f"({train.rounds} rounds of {max(horizons)}): choose others, or another --rounds"
        )
    return [replace(train, horizon=horizon, rounds=steps // horizon) for horizon in horizons]


def _of_small_images(
    horizon: int, rounds: int, *, cts: float, reptile: float, seeds: int, snapshots: int, methods: tuple[str, ...]
) -> Preset:
    """For the built-in suite on a CPU: 16 x 16 pixels, small batches, 500 images to fine-tune on.

    cts, reptile: their beta, the only tuned ones; the ablations have that of cts. seeds: fine-tuning runs.
    """
    untuned = {"fomaml": 0.1, "fomaml++": 0.1, "imaml": 0.1, "leap": 0.1, "mtl": 1.0}
    return Preset(
        MetaTrainSettings(horizon, rounds, batch_size=16, size=16, padding=1),
        MetaTestSettings(steps=50, seeds=seeds, images=500, batch_size=32, size=16, padding=1),
        {**untuned, **_shifting(cts), "reptile": reptile},
        halvings(snapshots),
        methods,
    )


def _shifting(beta: float) -> dict[str, float]:
    """The method and what differs from it in one point share its beta."""
    return dict.fromkeys(("cts", "no-shift", "random-shift", "cts-accurate"), beta)


_BOTH = ("cts", "reptile")

# How the first two were tuned: QUICK.md in cts_fast/examples.
PRESETS = {
    # Minutes on two CPU cores.
    "quick": _of_small_images(100, 5, cts=0.1, reptile=3.0, seeds=3, snapshots=3, methods=_BOTH),
    # The time to see where the curves go, and Reptile at its best beta up to 1 as well: up to an hour on two CPU cores.
    "long": _of_small_images(200, 20, cts=0.06, reptile=2.0, seeds=5, snapshots=8, methods=(*_BOTH, "reptile@1")),
    # The paper's section 4.2: GPU days. What is the paper's and what ours: README.md in cts_fast/examples.
    "paper": Preset(
        MetaTrainSettings(horizon=1000, rounds=200),
        MetaTestSettings(steps=1000),
        {"fomaml": 0.01, "fomaml++": 0.01, "imaml": 0.1, "leap": 0.1, "mtl": 1.0, **_shifting(0.01), "reptile": 1.0},
        snapshots=(0.025, 0.05, 0.125, 0.25, 0.5, 0.75, 1.0),  # 5,000 to 200,000 steps
        methods=_BOTH,
        sources=("tiny_imagenet_a", "tiny_imagenet_b"),
    ),
}

# The paper's section 4.3: better than weights that were pretrained on ImageNet.
_IMAGENET = Preset(
    MetaTrainSettings(
        horizon=1000, rounds=50, batch_size=256, weight_decay=0.0, held_back=0.0, normalization="imagenet"
    ),
    MetaTestSettings(
        steps=1000, images=1000, batch_size=256, lr=0.01, weight_decay=1e-4, decay=0.2, normalization="own"
    ),
    {"fomaml": 0.01, "fomaml++": 0.01, "imaml": 0.1, "leap": 0.1, "mtl": 1.0, **_shifting(0.001), "reptile": 1.0},
    snapshots=(1.0,),
    methods=("none", "mtl", "reptile", "cts"),
)


def _imagenet_of_small_images(horizon: int, rounds: int, test_steps: int, seeds: int) -> Preset:
    """The same protocol at 32 pixels for a CPU: shorter, in smaller batches; nothing is tuned for it."""
    train = replace(_IMAGENET.train, horizon=horizon, rounds=rounds, batch_size=32, size=32)
    test = replace(_IMAGENET.test, steps=test_steps, seeds=seeds, images=500, batch_size=64, size=32)
    return replace(_IMAGENET, train=train, test=test)


IMAGENET_PRESETS = {
    "quick": _imagenet_of_small_images(50, 4, test_steps=50, seeds=2),
    "long": _imagenet_of_small_images(200, 10, test_steps=200, seeds=5),
    "paper": _IMAGENET,
}
