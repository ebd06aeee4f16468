"""Kill a program again and again, resume it each time, and compare all that it leaves with an uninterrupted run.

    python tests/soak.py --steps 10000 --kills 100 --out tests/soak.json
    python tests/soak.py --steps 10000 --kills 60 --ranks 2 --out tests/soak-ranks.json

The program is `cts_fast.examples.resnet20` on small tasks and a small network, as a process of its own; it is ended by
SIGKILL at random moments of its start, its training, its saves, its meta-test and its report. With --ranks it is run by
torchrun, which goes on by itself when one of the ranks is killed, three times; every other time all are, and torchrun.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
METHODS = ("cts", "reptile")
COMPARED = ("results.json", "metrics.csv", "*.safetensors", "*.png")


def program(arguments: list[str]) -> int:
    """The program itself, with small tasks and a small network in the place of its own."""
    from support.image_tasks import make_suite

    from cts_fast.data import suite
    from cts_fast.examples import resnet20

    suite.SUITES["tiny"] = make_suite
    return resnet20.main([*arguments, "--model", "support.nets:SmallNet"])


def command(out: Path, steps: int, *more: str, ranks: int = 1) -> list[str]:
    """What to run: `steps` steps in all, half of them of each method."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} --max-restarts 3" if ranks > 1 else ""
    each = steps // len(METHODS)
    horizon = min(50, each)
    settings = f"--suite tiny --horizon {horizon} --rounds {each // horizon} --test-steps 20 --test-seeds 4"
    methods = f"--methods {','.join(METHODS)} --meta-lr cts=0.05,reptile=0.5"
    program = [str(HERE), "--program", *settings.split(), *methods.split(), "--out", str(out), *more]
    return [sys.executable, *launcher.split(), *program]


def start(arguments: list[str]) -> subprocess.Popen:
    """The process; what it prints can be read."""
    path = [str(HERE.parent), str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, bufsize=1
    )


def finish(arguments: list[str]) -> None:
    """Runs to the end; raises RuntimeError with what it said if that is not a good one."""
    process = start(arguments)
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with status {process.returncode}:\n{errors}")


def wait_for_the_end_of_training(process: subprocess.Popen, each: int) -> None:
    """Until it says that the last method has taken all its steps."""
    for line in process.stdout or ():
        if line.startswith(
            (f"meta-train {METHODS[-1]}: goes on from step {each} ", f"meta-train {METHODS[-1]}: {each}/")
        ):
            return


def ranks_of(launcher: int) -> list[int]:
    """The processes that torchrun has started and that run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == launcher and state != "Z":
                found.append(int(status.parent.name))
    return sorted(found)


def place(out: Path) -> str:
    """Where a killed run stood, by what is in its folder."""
    kept = out / "checkpoints"
    if list(out.glob("checkpoints/*/.*.tmp")):
        return "a save"
    if list(out.glob(".*.tmp")):
        return "a file of the report"
    if (out / "metrics.csv").exists():
        return "the report"
    if (kept / "meta-test").exists():
        return "the meta-test"
    return "the training" if kept.exists() and any(kept.iterdir()) else "the start"


def left(out: Path) -> dict[str, object]:
    """What a finished run left: its files' bytes, and every tensor and value of the newest checkpoints."""
    from cts_fast.experiments.files import read_part

    found: dict[str, object] = {path.name: path.read_bytes() for pattern in COMPARED for path in out.glob(pattern)}
    for name in METHODS:
        newest = sorted((out / "checkpoints" / name).glob("[0-9]*"))[-1]
        for part in newest.glob("*.pt"):
            found.update(entries(f"{name}/{part.name}", read_part(part)))
    return found


def entries(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Every tensor and plain value of a state, by its place; a tensor as its bytes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from entries(f"{name}/{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from entries(f"{name}/{i}", inner)
    elif isinstance(value, torch.Tensor):
        yield name, (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield name, value


def kill(process: subprocess.Popen, ranks: int, generator: random.Random) -> None:
    """The process and all that it has started, or one of its ranks, after which it goes on."""
    found = ranks_of(process.pid)
    if len(found) == ranks > 1 and generator.random() < 0.5:
        os.kill(generator.choice(found), signal.SIGKILL)
        return
    process.send_signal(signal.SIGSTOP)  # so that it starts no more
    for pid in ranks_of(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


def soak(work: Path, steps: int, kills: int, seed: int, ranks: int = 1) -> dict:
    """Does it all in the folder `work`; raises AssertionError where a resumed run leaves something else."""
    generator, began = random.Random(seed), time.monotonic()
    finish(command(work / "whole", steps, ranks=ranks))
    whole = time.monotonic() - began
    mean = max(0.05, 0.8 * whole / kills)  # seconds from a resumed run's first word to its end
    places: Counter[str] = Counter()
    killed, out = 0, work / "killed"
    while killed < kills:
        late = killed >= 0.75 * kills  # what is left is for the meta-test and the report
        more = ["--save-every", str(generator.choice((0, 0.05, 0.2)))]
        more += ["--resume"] if (out / "config.json").exists() else []
        process = start(command(out, steps, *more, ranks=ranks))
        if late:
            wait_for_the_end_of_training(process, steps // len(METHODS))
            delay = generator.uniform(0, 3)
        elif generator.random() < 0.8:  # past the start, where most of a process' life is spent
            process.stdout.readline()
            delay = generator.expovariate(1 / mean)
        else:
            delay = generator.uniform(0, 6)
        while process.poll() is None and killed < kills:
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                kill(process, ranks, generator)
                killed += 1
                places[place(out)] += 1
            delay = generator.uniform(0, 12)  # torchrun starts all ranks anew
        errors = process.communicate()[1]
        assert process.returncode in ((0, -9, 1) if ranks > 1 else (0, -9)), errors
        assert "damaged" not in errors, errors
        if process.returncode == 0:  # it came to its end: it may report again, and be killed there
            (out / "finished.json").unlink()
    finish(command(out, steps, "--resume", ranks=ranks))
    expected, found = left(work / "whole"), left(out)
    differ = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    assert not differ, f"after {kills} kills these differ from the uninterrupted run: {', '.join(differ)}"
    return {
        "steps": steps,
        "kills": kills,
        **({"ranks": ranks} if ranks > 1 else {}),
        "seed": seed,
        "killed_in": dict(places.most_common()),
        "files_equal": sorted(name for name in expected if "/" not in name),
        "values_of_the_state_equal": sum("/" in name for name in expected),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def main() -> int:
    """Runs it; returns the exit status."""
    if sys.argv[1:2] == ["--program"]:
        return program(sys.argv[2:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=10_000)
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="file for the result")
    args = p.parse_args()
    work = Path(tempfile.mkdtemp())
    result = soak(work, args.steps, args.kills, args.seed, args.ranks)
    shutil.rmtree(work)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
