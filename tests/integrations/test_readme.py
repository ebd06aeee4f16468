"""The snippets of the README and of the page on integrations run as they stand."""

import copy
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from cts_fast import ShiftingMetaOptimizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INTEGRATIONS = (ROOT / "cts_fast" / "examples" / "INTEGRATIONS.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", INTEGRATIONS, re.DOTALL)
KEYS = ["GradScaler", "compile", "AveragedModel", "checkpoint", "lightning", "accelerate"]


FIRST, RANKS = (re.findall(r"```python\n(.*?)```", README, re.DOTALL)[n] for n in (0, 1))
PRELUDE = """
import torch
from torch import nn
from cts_fast import ShiftingMetaOptimizer
from integrations.test_readme import Net
torch.manual_seed(0)
classes, make_net, loss_fn = [3, 2, 5], Net, nn.functional.cross_entropy
loader = [[(torch.randn(5, 4), torch.randint(2, (5,))) for _ in classes] for _ in range(3)]
"""


class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


def names(folder):
    """What the snippets find: nets, their optimizer with gradients, batches of (x, y) for each task."""
    torch.manual_seed(0)
    nets = [copy.deepcopy(net) for net in [Net()] * 2]
    opt = ShiftingMetaOptimizer(
        [net.body.named_parameters() for net in nets], heads=[net.head.parameters() for net in nets], lr=0.1
    )
    loader = [[(torch.randn(5, 4), torch.randint(3, (5,))) for _ in nets] for _ in range(3)]
    loss_fn = nn.functional.cross_entropy
    for net, (x, y) in zip(nets, loader[0], strict=True):
        loss_fn(net(x), y).backward()
    found = dict(torch=torch, ShiftingMetaOptimizer=ShiftingMetaOptimizer, nets=nets, opt=opt, device="cpu")
    return found | dict(loader=loader, loss_fn=loss_fn, folder=str(folder))


def test_every_snippet_is_known():
    assert len(SNIPPETS) == len(KEYS) and all(key in code for key, code in zip(KEYS, SNIPPETS, strict=True))


@pytest.mark.parametrize(("key", "code"), list(zip(KEYS, SNIPPETS, strict=True)), ids=KEYS)
def test_a_snippet_of_the_readme(key, code, tmp_path, monkeypatch):
    if key in ("lightning", "accelerate"):
        pytest.importorskip(key)
    found = names(tmp_path / "saved")
    if key in ("lightning", "accelerate"):
        found["loader"] = torch.utils.data.DataLoader(found["loader"], batch_size=None)
    monkeypatch.chdir(tmp_path)  # trainers write where they stand
    before = [p.detach().clone() for net in found["nets"] for p in net.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # another compiler's front end: the same graph breaks and guards in a tenth of the time
        exec(code.replace("torch.compile(net)", 'torch.compile(net, backend="aot_eager")'), found)
    after = [p for net in found["nets"] for p in net.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) or key == "checkpoint"


def test_the_first_example_trains_and_leaves_an_initialization_that_a_body_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(PRELUDE + FIRST, found)
    assert found["opt"].meta_updates == 3
    missing, unexpected = Net().body.load_state_dict(torch.load("phi.pt"), strict=False)
    assert not missing and not unexpected


def test_the_script_over_processes_runs_under_torchrun(tmp_path):
    assert "process_group" in RANKS
    (tmp_path / "train.py").write_text(PRELUDE + RANKS)
    tests = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([*sys.path, tests]),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = subprocess.run([*torchrun, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-4000:]
    assert set(torch.load(tmp_path / "phi.pt")) == {"0.weight", "0.bias"}
