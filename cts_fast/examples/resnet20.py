"""Meta-train a ResNet20 on many image tasks, then fine-tune it on tasks that it has never seen.

    python -m cts_fast.examples.resnet20

trains an initialization with continual trajectory shifting and one with Reptile, for equally many steps from the same
start on the same batches, fine-tunes both and a random initialization on held-out tasks, and prints a table.

    python -m cts_fast.examples.resnet20 --suite paper --data-root DIR --preset paper --methods all --device cuda

is the paper's section 4.2. `--dry-run` says what a command would do, and how long.
"""

import sys
from collections.abc import Sequence

from cts_fast.experiments import protocol
from cts_fast.experiments.settings import PRESETS

PROGRAM = protocol.Program("cts_fast.examples.resnet20", __doc__, "runs/resnet20", PRESETS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit status."""
    return protocol.main(PROGRAM, argv)


if __name__ == "__main__":
    sys.exit(main())
