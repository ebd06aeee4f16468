"""What all tests rely on: the checkout's benchmarks can be imported, and Triton's kernels run where there is no GPU."""

import os
import signal
import sys
from pathlib import Path

# Several processes share the cores: torch's threads sleep where they wait, instead of taking a core from the others.
# OpenMP reads this when torch is first imported, here and in the programs that tests start.

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

# As in a terminal, also where the tests run in the background or under nohup: what is ignored here would be in the
# programs that tests start and send signals to.

for number, heeded in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, heeded)

sys.path.append(
    str(Path(__file__).parents[1])
)  # for `benchmarks`; last, so that an installed package comes before the checkout's

# Without a GPU, Triton's interpreter runs the kernels on CPU tensors; Triton reads this when it is first imported.

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
