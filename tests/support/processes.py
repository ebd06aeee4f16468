"""The image program as a process of its own, on small tasks."""

import os
import subprocess
import sys
from pathlib import Path

DRIVER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from support.image_tasks import make_suite
from cts_fast.data import suite
from cts_fast.examples import resnet20
suite.SUITES["tiny"] = make_suite
sys.exit(resnet20.main())
"""


SMALL_NET = ["--model", "support.nets:SmallNet"]  # where a test is about the program, not about what it trains
SLOW_ENOUGH = (
    "--suite tiny --targets rings --methods cts --horizon 50 --rounds 4 --test-steps 50 --test-seeds 3".split()
)
SLOW_ENOUGH += SMALL_NET  # to be met by a signal


def driven(*arguments, limit=None):
    """The program as a process of its own; limit: bytes that a file of it may have."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parents[1]), *arguments]
    if limit is not None:
        command = ["bash", "-c", f'ulimit -f {limit // 1024}; exec "$@"', "bash", *command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
