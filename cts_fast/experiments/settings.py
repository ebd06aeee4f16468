"""Settings of the image experiments: what `--preset` stands for, and what the methods are called in tables."""

from collections.abc import Mapping
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
}


@dataclass(frozen=True)
class Preset:
    """Settings of both phases; `meta_lr` is beta by method, `snapshots` the number of points on the accuracy curve."""

    train: MetaTrainSettings
    test: MetaTestSettings
    meta_lr: Mapping[str, float]
    snapshots: int


PRESETS = {
    # Minutes on two CPU cores; how it was chosen: QUICK.md in cts_fast/examples.
    "quick": Preset(
        MetaTrainSettings(horizon=240, rounds=1, batch_size=16, size=16, padding=1),
        MetaTestSettings(steps=50, seeds=3, images=500, batch_size=32, size=16, padding=1),
        {
            "cts": 0.06,
            "reptile": 4.0,
            "fomaml": 0.1,
            "fomaml++": 0.1,
            "imaml": 0.1,
            "leap": 0.1,
            "mtl": 1.0,
            "no-shift": 0.06,
            "random-shift": 0.06,
            "cts-accurate": 0.06,
        },
        snapshots=2,
    ),
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
    ),
}
