"""`ShiftingMetaOptimizer` beside the rest of torch: groups, schedulers, closures, hooks, scalers, compilation, memory."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cts_fast import ShiftingMetaOptimizer, ops


def make_nets(count=3, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)).to(dtype)
    return [copy.deepcopy(net) for _ in range(count)]


def make_optimizer(nets, **options):
    options = {"lr": 0.05, "momentum": 0.9, "meta_lr": 0.1, "horizon": 4, **options}
    return ShiftingMetaOptimizer([net[:2].named_parameters() for net in nets], heads=[net[4].parameters() for net in nets], **options)


def backward(nets, step=0, scale=1.0):
    for t, net in enumerate(nets):
        draw = torch.Generator().manual_seed(1000 * step + t)
        dtype = net[0].weight.dtype
        x = torch.randn(4, 3, 6, 6, generator=draw).to(dtype)
        y = torch.randint(5, (4,), generator=draw)
        (nn.functional.cross_entropy(net(x).float(), y) * scale).backward()


def train(nets, opt, steps, start=0):
    for step in range(start, start + steps):
        opt.zero_grad()
        backward(nets, step)
        opt.step()


def values(nets, opt):
    return [p.detach().clone() for net in nets for p in net.parameters()] + [phi.clone() for phi in opt.initialization]


def assert_same(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Tasks and groups


def test_one_line_changes_in_a_script_that_used_sgd():
    net = make_nets(1)[0]
    opt = ShiftingMetaOptimizer(net.parameters(), lr=0.1, momentum=0.9)
    assert opt.num_tasks == 1 and len(opt.initialization) == 6 and list(opt.initialization_state_dict()) == [str(i) for i in range(6)]
    backward([net])
    opt.step()
    assert opt.inner_step == 1


@pytest.mark.parametrize("named", [False, True])
def test_every_form_of_tasks_gives_the_same_run(named):
    def source(net):
        return net.named_parameters() if named else net.parameters()

    results = []
    for form in range(3):
        nets = make_nets(2)
        tasks = {
            0: lambda nets=nets: [source(net) for net in nets],
            1: lambda nets=nets: [{"params": [source(net) for net in nets]}],
            2: lambda nets=nets: [{"params": [source(net[:2]) for net in nets]}, {"params": [source(net[2:]) for net in nets]}],
        }[form]
        if named and form == 2:
            continue  # the slices' names would not be the net's
        opt = ShiftingMetaOptimizer(tasks(), lr=0.05, meta_lr=0.1)
        train(nets, opt, 3)
        results.append(values(nets, opt))
    for result in results[1:]:
        assert_same(results[0], result)


def test_groups_carry_hyper_parameters_of_their_own():
    nets = make_nets(2)
    opt = ShiftingMetaOptimizer(
        [{"params": [net[0].parameters() for net in nets], "lr": 0.0, "meta_lr": 0.0}, {"params": [net[1:].parameters() for net in nets]}], lr=0.1
    )
    before = [p.detach().clone() for p in nets[0].parameters()]
    train(nets, opt, 1)
    after = list(nets[0].parameters())
    assert torch.equal(before[0], after[0]) and not torch.equal(before[-1], after[-1])


def test_param_groups_list_every_tasks_tensors_task_by_task():
    nets = make_nets(2)
    opt = make_optimizer(nets)
    assert [id(p) for p in opt.param_groups[0]["params"]] == [id(p) for net in nets for p in net[:2].parameters()]
    assert [group["shared"] for group in opt.param_groups] == [True, False]


def test_a_group_can_be_added_in_mid_training_and_keeps_what_was_learned():
    nets, twins = make_nets(2), make_nets(2)
    opt = ShiftingMetaOptimizer([net[:2].parameters() for net in nets], lr=0.05, momentum=0.9, meta_lr=0.1)
    other = ShiftingMetaOptimizer([net[:2].parameters() for net in twins], lr=0.05, momentum=0.9, meta_lr=0.1)
    train(nets, opt, 3)
    train(twins, other, 3)
    opt.add_param_group({"params": [net[4].parameters() for net in nets], "shared": False, "lr": 0.0})
    train(nets, opt, 3, 3)
    train(twins, other, 3, 3)
    assert_same(values(nets, opt), values(twins, other))


def test_heads_may_differ_between_tasks_and_stay_out_of_the_initialization():
    bodies = [nn.Linear(3, 3) for _ in range(2)]
    bodies[1].load_state_dict(bodies[0].state_dict())
    heads = [nn.Linear(3, 2), nn.Linear(3, 5)]
    opt = ShiftingMetaOptimizer([b.named_parameters() for b in bodies], heads=[h.parameters() for h in heads], lr=0.1, horizon=1)
    before = [h.weight.detach().clone() for h in heads]
    for body, head in zip(bodies, heads, strict=True):
        head(body(torch.ones(1, 3))).sum().backward()
    opt.step()
    assert list(opt.initialization_state_dict()) == ["weight", "bias"]
    assert all(not torch.equal(b, h.weight) for b, h in zip(before, heads, strict=True))


def test_differing_replicas_start_at_the_first_tasks_parameters_with_a_warning():
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.warns(UserWarning, match="task 1, parameter 'weight'.*differs"):
        opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets])
    assert torch.equal(nets[0].weight, nets[1].weight) and torch.equal(opt.initialization[0], nets[0].weight)


# Hyper-parameters


def test_learning_rate_schedulers_and_live_changes_act_on_the_next_step():
    nets, twins = make_nets(), make_nets()
    opt, other = make_optimizer(nets, lr=0.1), make_optimizer(twins, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.1)
    for step in range(5):
        train(nets, opt, 1, step)
        schedule.step()
        train(twins, other, 1, step)
        for group in other.param_groups:
            group["lr"] = 0.1 * 0.1 ** ((step + 1) // 2)
    for a, b in zip(values(nets, opt), values(twins, other), strict=True):
        torch.testing.assert_close(a, b)


def test_tensor_learning_rates_are_read_at_every_step():
    nets, twins = make_nets(), make_nets()
    lr, meta_lr = torch.tensor(0.0625), torch.tensor(0.125)
    opt, other = make_optimizer(nets, lr=lr, meta_lr=meta_lr), make_optimizer(twins, lr=0.0625, meta_lr=0.125)
    train(nets, opt, 2)
    train(twins, other, 2)
    lr.fill_(0.5)
    meta_lr.fill_(0.25)
    for group in other.param_groups:
        group.update(lr=0.5, meta_lr=0.25)
    train(nets, opt, 2, 2)
    train(twins, other, 2, 2)
    assert_same(values(nets, opt), values(twins, other))


@pytest.mark.parametrize("broken", [{"lr": float("nan")}, {"meta_lr": -1.0}, {"momentum": float("inf")}])
def test_a_bad_live_hyper_parameter_raises_before_anything_moved(broken):
    nets = make_nets()
    opt = make_optimizer(nets)
    backward(nets)
    before = values(nets, opt)
    opt.param_groups[0].update(broken)
    with pytest.raises(ValueError, match="Invalid"):
        opt.step()
    assert_same(before, values(nets, opt))
    assert opt.inner_step == 0


# The step


def test_the_closure_runs_once_with_gradients_and_its_value_comes_back():
    nets = make_nets()
    opt = make_optimizer(nets)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        opt.zero_grad()
        backward(nets)
        return 7.0

    with torch.no_grad():
        assert opt.step(closure) == 7.0
    assert calls == [True] and opt.inner_step == 1


def test_step_hooks_run_around_the_step():
    nets = make_nets()
    opt = make_optimizer(nets)
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o.inner_step)))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o.inner_step)))
    backward(nets)
    opt.step()
    assert seen == [("before", 0), ("after", 1)]


def test_hooks_of_a_subclass_with_its_own_step_run_once():
    class Printing(ShiftingMetaOptimizer):
        def step(self, closure=None):
            return super().step(closure)

    nets, seen = make_nets(), []
    opt = Printing([net[:2].parameters() for net in nets])
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append((args, o.inner_step)))
    backward(nets)
    opt.step()
    assert seen == [((opt,), 1)]


def test_hooks_of_all_optimizers_and_the_profiler_hear_the_step():
    nets, seen = make_nets(), []
    opt = make_optimizer(nets)
    backward(nets)
    handle = register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append(type(o)))
    try:
        opt.step()
    finally:
        handle.remove()
    assert seen == [ShiftingMetaOptimizer]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#ShiftingMetaOptimizer.step" in {event.key for event in profile.key_averages()}


def test_without_any_gradient_nothing_changes_counters_included():
    nets = make_nets()
    opt = make_optimizer(nets)
    before = values(nets, opt)
    opt.step()
    assert_same(before, values(nets, opt))
    assert (opt.inner_step, opt.meta_updates) == (0, 0)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_both_ways(set_to_none):
    nets = make_nets()
    opt = make_optimizer(nets)
    backward(nets)
    opt.step()
    opt.zero_grad(set_to_none=set_to_none)
    grads = [p.grad for group in opt.param_groups for p in group["params"]]
    assert all(g is None if set_to_none else not g.any() for g in grads)
    backward(nets, 1)
    opt.step()
    assert opt.inner_step == 2


def test_clip_grad_norm_works_on_groups_and_per_task():
    nets = make_nets()
    opt = make_optimizer(nets)
    backward(nets)
    nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.01)
    assert sum(p.grad.norm() ** 2 for p in opt.param_groups[0]["params"]).sqrt() <= 0.0101
    for net in nets:
        nn.utils.clip_grad_norm_(net.parameters(), 0.001)
    opt.step()
    assert opt.inner_step == 1


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_grad_scaler_unscales_in_the_step_and_skips_infinite_ones(backend):
    nets, twins = make_nets(), make_nets()
    opt, other = make_optimizer(nets, backend=backend), make_optimizer(twins, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(torch.ones(()))  # creates the scale
    for step in range(3):
        opt.zero_grad()
        backward(nets, step, scale=64.0)
        scaler.step(opt)
        scaler.update()
        other.zero_grad()
        backward(twins, step)
        other.step()
    for a, b in zip(values(nets, opt), values(twins, other), strict=True):
        torch.testing.assert_close(a, b)
    before, counters = values(nets, opt), (opt.inner_step, opt.round, opt.meta_updates)
    opt.zero_grad()
    backward(nets, 5, scale=float("inf"))
    scaler.step(opt)
    assert_same(before, values(nets, opt))
    assert counters == (opt.inner_step, opt.round, opt.meta_updates)


def test_nonfinite_raise_names_task_and_parameter():
    nets = make_nets()
    opt = make_optimizer(nets, nonfinite="raise")
    backward(nets)
    nets[1][1].weight.grad[2] = float("nan")
    with pytest.raises(RuntimeError, match="task 1, parameter '1.weight'"):
        opt.step()
    assert opt.inner_step == 1  # it was applied


def test_nonfinite_skip_leaves_everything_and_counts():
    nets = make_nets()
    opt = make_optimizer(nets, nonfinite="skip")
    backward(nets)
    nets[2][4].bias.grad[0] = float("inf")  # a head
    before = values(nets, opt)
    opt.step()
    assert_same(before, values(nets, opt))
    assert (opt.skipped_steps, opt.inner_step) == (1, 0)
    train(nets, opt, 1)
    assert (opt.skipped_steps, opt.inner_step) == (1, 1)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_graph_that_saved_a_parameter_notices_the_step(backend):
    if ops.unavailable(backend, torch.device("cpu"), torch.float32):
        pytest.skip(f"backend {backend} is off")
    nets = make_nets()
    opt = make_optimizer(nets, backend=backend)
    backward(nets)
    loss = (nets[0][0].weight ** 2).sum() + (opt.initialization[0] * nets[0][0].weight).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_exchanged_by_the_user_are_taken_back():
    nets = make_nets()
    opt = make_optimizer(nets, lr=0.0, meta_lr=0.0)
    fresh = torch.full_like(nets[1][0].weight, 2.0)
    nets[1][0].weight.data = fresh
    backward(nets)
    opt.step()
    assert (nets[1][0].weight == 2).all() and (opt.state[nets[1][0].weight]["theta"] == 2).all()
    assert nets[1][0].weight.data_ptr() != fresh.data_ptr()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_parameter_transposed_in_place_keeps_its_values(backend):
    params = [[nn.Parameter(torch.arange(9.0).view(3, 3))] for _ in range(2)]
    opt = ShiftingMetaOptimizer(params, lr=0.0, meta_lr=0.0, backend=backend)
    params[1][0].data = params[1][0].data.t()
    params[1][0].grad = torch.ones(3, 3)
    opt.step()
    expected = torch.arange(9.0).view(3, 3).t()
    assert torch.equal(params[1][0], expected) and torch.equal(opt.state[params[1][0]]["theta"], expected)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_gradient_that_torch_negates_lazily_is_read_negated(backend):
    params = [nn.Parameter(torch.tensor(1.0))]
    opt = ShiftingMetaOptimizer(params, lr=1.0, meta_lr=0.0, backend=backend)
    torch.complex(torch.tensor(1.0), params[0]).conj().mul(1j).real.backward()  # real(i (1 - i p)) = p
    assert params[0].grad.is_neg() and params[0].grad.item() == 1.0
    opt.step()
    assert params[0].item() == 0.0


def test_a_cast_after_construction_raises_and_says_what_to_do():
    nets = make_nets()
    opt = make_optimizer(nets)
    nets[2].double()
    with pytest.raises(ValueError, match="task 2, parameter '0.weight'.*before making the optimizer"):
        backward(nets[2:])
        opt.step()


def test_step_inside_torch_compile_is_a_graph_break_with_the_same_result():
    nets, twins = make_nets(2), make_nets(2)
    opt, other = make_optimizer(nets), make_optimizer(twins)
    torch._dynamo.reset()
    compiled = torch.compile(opt.step, backend="eager")

    @torch.compile(backend="eager")
    def training_step(scale):
        opt.step()
        return scale * 2

    for step in range(4):
        for these, own, act in ((nets, opt, compiled if step % 2 else lambda: training_step(torch.ones(1))), (twins, other, other.step)):
            own.zero_grad()
            backward(these, step)
            act()
    assert_same(values(nets, opt), values(twins, other))


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
T, shapes = 8, [(512, 512, 3, 3)] * 4 + [(512, 256, 3, 3)] + [(64,)] * 40
P = sum(torch.Size(s).numel() for s in shapes)
torch.set_num_threads(1)
tasks = [[torch.nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(T)]
opt = ShiftingMetaOptimizer(tasks, lr=0.1, momentum=0.9, weight_decay=1e-4, backend=sys.argv[1])
for task in tasks:
    for p in task:
        p.grad = torch.ones_like(p)
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before = resident()
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"): pass
open("/proc/self/clear_refs", "w").write("5")
opt.step()
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print((peak - before) / ((3 * T + 1) * P * 4))
"""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux's /proc/self/clear_refs")
    for backend in ("torch", "cpu"):
        if ops.unavailable(backend, torch.device("cpu"), torch.float32) is None:
            extra = float(subprocess.run([sys.executable, "-c", script, backend], check=True, capture_output=True, text=True).stdout)
            assert extra <= 0.05, backend


def test_the_environment_sets_the_default_backend(monkeypatch):
    monkeypatch.setenv("CTS_FAST_BACKEND", "reference")
    assert make_optimizer(make_nets()).backend == "reference"
    assert make_optimizer(make_nets(), backend="torch").backend == "torch"
    monkeypatch.setenv("CTS_FAST_BACKEND", "warp")
    with pytest.raises(ValueError, match="unknown backend 'warp'"):
        make_optimizer(make_nets())


def test_import_needs_torch_alone():
    extras = {"torchvision", "matplotlib", "tqdm", "safetensors", "tensorboard", "triton"}
    code = f"import sys, torch; torchs = set(sys.modules); import cts_fast; print({extras} & set(sys.modules) - torchs or set())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
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


def test_a_default_device_elsewhere_does_not_matter():
    nets = make_nets()
    opt = make_optimizer(nets, nonfinite="raise")
    backward(nets)
    try:
        torch.set_default_device("meta")
        opt.step()
    finally:
        torch.set_default_device(None)
    assert opt.inner_step == 1


def test_an_empty_group_is_allowed_beside_others():
    nets = make_nets(2)
    opt = ShiftingMetaOptimizer([{"params": []}, {"params": [net.parameters() for net in nets]}], lr=0.1)
    train(nets, opt, 1)
    assert opt.num_tasks == 2 and opt.inner_step == 1


def test_empty_heads_are_no_group():
    nets = make_nets(2)
    opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets], heads=[[], []])
    assert len(opt.param_groups) == 1
