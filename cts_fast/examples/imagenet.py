"""Improve weights that were pretrained on ImageNet: the paper's section 4.3, Table 1 and Figure 9.

    python -m cts_fast.examples.imagenet --data-root DIR --weights FILE --device cuda

meta-trains a ResNet18 from these weights on ImageNet, divided into eight groups of classes, by multi-task learning,
Reptile and continual trajectory shifting; fine-tunes each result, and the weights themselves (`none`), on 1,000 images
of nine other data sets, and prints a table. `--images 1000,500,250` repeats the fine-tuning with fewer images.

Without --weights, torchvision's (ResNet18_Weights.IMAGENET1K_V1) are taken from the data root; --download fetches them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cts_fast.data.download import Archive, obtain
from cts_fast.data.paper.suite import checked_root
from cts_fast.experiments import protocol
from cts_fast.experiments.files import sha256_of
from cts_fast.experiments.settings import IMAGENET_PRESETS

MODEL = "resnet18"
FILE = "resnet18-f37072fd.pth"  # torchvision's names end with the first digits of the SHA-256
WEIGHTS = Archive(f"https://download.pytorch.org/models/{FILE}", None, ".", (FILE,))


def pretrained(args: argparse.Namespace) -> Path:
    """torchvision's weights in the data root; raises ValueError where they are not there, and not asked for."""
    if args.model != MODEL:
        raise ValueError(f"--model {args.model}: pretrained weights for it are missing: give --weights FILE")
    root: Path | None = args.data_root
    if root is None:
        raise ValueError("no weights to begin at: give --weights FILE, or --data-root DIR that holds torchvision's")
    root = checked_root(root, "imagenet")
    if args.download:
        obtain(WEIGHTS, root)
    file = root / WEIGHTS.name
    if not file.is_file():
        raise ValueError(f"{file} is missing: give --weights FILE, or add --download to fetch torchvision's")
    found = sha256_of(file)[:8]
    if not file.stem.endswith(f"-{found}"):
        raise ValueError(f"{file} is damaged, or another file: its SHA-256 begins with {found}; move it away")
    return file


PROGRAM = protocol.Program(
    "cts_fast.examples.imagenet",
    __doc__,
    "runs/imagenet",
    IMAGENET_PRESETS,
    preset="paper",
    suite="imagenet",
    model=MODEL,
    untrained=("none",),
    pretrained=pretrained,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    return protocol.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
