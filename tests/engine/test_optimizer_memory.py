"""φ, memory and parameters that users write or exchange; what importing and the environment do."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from support.nets import assert_same, backward, make_nets, make_optimizer, train, values

from cts_fast.engine.step import unavailable


def python(script: str, *arguments: str) -> str:
    """What a script prints in an interpreter of its own."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# φ


def test_initialization_is_live_and_loads_into_a_module():
    nets = make_nets()
    opt = make_optimizer(nets)
    live = opt.initialization[0]
    before = live.clone()
    train(nets, opt, 2)
    assert not torch.equal(before, live)
    fresh = make_nets(1, seed=5)[0]
    assert not fresh[:2].load_state_dict(opt.initialization_state_dict(), strict=False).unexpected_keys
    assert torch.equal(fresh[0].weight, live)


@pytest.mark.parametrize("form", ["dict", "list"])
def test_load_initialization_sets_phi_and_every_task(form):
    nets = make_nets()
    opt = make_optimizer(nets)
    train(nets, opt, 5)
    target = {name: torch.randn_like(phi) for name, phi in opt.initialization_state_dict().items()}
    opt.load_initialization(target if form == "dict" else list(target.values()))
    for net in nets:
        assert all(torch.equal(p, target[name]) for name, p in net[:2].named_parameters())
    assert (opt.inner_step, opt.round) == (0, 1)
    assert not any(opt.state[p]["momentum_buffer"].any() for p in opt.param_groups[0]["params"])


def test_reset_tasks_is_the_reset_at_the_horizon():
    nets, twins = make_nets(), make_nets()
    opt, other = make_optimizer(nets, horizon=3), make_optimizer(twins, horizon=None)
    train(nets, opt, 3)
    train(twins, other, 3)
    other.reset_tasks()
    assert_same(values(nets, opt), values(twins, other))
    assert (other.inner_step, other.round) == (opt.inner_step, opt.round) == (0, 1)
    assert opt.state_dict()["state"].keys() == other.state_dict()["state"].keys()


# Memory, strides and the environment


def test_channels_last_parameters_keep_their_strides():
    nets = [net.to(memory_format=torch.channels_last) for net in make_nets()]
    strides = nets[0][0].weight.stride()
    opt = make_optimizer(nets)
    train(nets, opt, 2)
    assert nets[0][0].weight.stride() == strides and nets[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_step_needs_no_more_than_the_flat_buffers_and_five_percent():
    script = """
import torch, resource, sys
from cts_fast import ShiftingMetaOptimizer
T, shapes = 8, [(512, 512, 3, 3), (512, 256, 3, 3)] + [(64,)] * 40
P = sum(torch.Size(s).numel() for s in shapes)
torch.set_num_threads(1)
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
for backend in sys.argv[1:]:
    tasks = [[torch.nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(T)]
    opt = ShiftingMetaOptimizer(tasks, lr=0.1, momentum=0.9, weight_decay=1e-4, backend=backend)
    for task in tasks:
        for p in task:
            p.grad = torch.ones_like(p)
    before = resident()
    open("/proc/self/clear_refs", "w").write("5")
    opt.step()
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print((peak - before) / ((3 * T + 1) * P * 4))
    del tasks, task, p, opt
"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs")
    backends = [name for name in ("torch", "cpu") if unavailable(name, torch.device("cpu"), torch.float32) is None]
    extra = dict(zip(backends, map(float, python(script, *backends).split()), strict=True))
    assert all(share <= 0.05 for share in extra.values()), extra


def test_the_environment_sets_the_default_backend(monkeypatch):
    monkeypatch.setenv("CTS_FAST_BACKEND", "reference")
    assert make_optimizer(make_nets()).backend == "reference"
    assert make_optimizer(make_nets(), backend="torch").backend == "torch"
    monkeypatch.setenv("CTS_FAST_BACKEND", "warp")
    with pytest.raises(ValueError, match="unknown backend 'warp'"):
        make_optimizer(make_nets())


def test_import_needs_torch_alone():
    extras = {"torchvision", "matplotlib", "tqdm", "safetensors", "tensorboard", "triton"}
    before = "import sys, torch; of_torch = set(sys.modules)"
    out = python(f"{before}; import cts_fast; print({extras} & set(sys.modules) - of_torch or set())")
    assert out.strip() == "set()"


def test_no_warning_on_the_plain_path():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nets = make_nets()
        opt = make_optimizer(nets)
        train(nets, opt, 2)
    assert opt.inner_step == 2


@pytest.mark.parametrize("then", ["state_dict", "deepcopy", "add_param_group", "reset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_user_wrote_to_a_parameter_is_never_lost(then, dtype):
    nets = make_nets(dtype=dtype)
    opt = make_optimizer(nets)
    weight = nets[1][0].weight
    if dtype == torch.float32:
        weight.data = torch.full_like(weight, 2.0)
    else:
        weight.data.fill_(2.0)
    if then == "state_dict":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif then == "deepcopy":
        nets, opt = copy.deepcopy((nets, opt))
    elif then == "add_param_group":
        extra = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for _ in nets]
        opt.add_param_group({"params": [[("extra", p)] for p in extra]})
    else:
        opt.reset_tasks()
        assert torch.equal(nets[1][0].weight, nets[0][0].weight)
        return
    assert (nets[1][0].weight == 2).all() and (opt.state[nets[1][0].weight]["theta"] == 2).all()


@pytest.mark.parametrize("nonfinite", ["ignore", "raise", "skip"])
def test_a_default_device_elsewhere_does_not_matter(nonfinite):
    nets = make_nets()
    backward(nets)
    try:
        torch.set_default_device("meta")
        opt = make_optimizer(nets, nonfinite=nonfinite)
        opt.step()
        del opt.state[nets[1][0].weight]["momentum_buffer"]
        nets[1][0].weight.grad = torch._neg_view(nets[1][0].weight.grad)
        opt.step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.param_groups[0]["params"][0] = torch.nn.Parameter(nets[0][0].weight.detach().clone())
        opt.state_dict()
    finally:
        torch.set_default_device(None)
    opt.step()
    assert opt.inner_step == 3 and opt.skipped_steps == 0
