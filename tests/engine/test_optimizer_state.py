"""State dicts, checkpoints, copies: everything continues bit for bit, and files stay small."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.nets import assert_same, make_nets, make_optimizer, train, values
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from cts_fast import ShiftingMetaOptimizer

OPTIONS = [{}, {"momentum": 0.0}, {"dampening": 0.5}, {"reset_momentum": False}, {"meta_interval": 3}]


def counters(opt):
    return opt.inner_step, opt.round, opt.meta_updates, opt.skipped_steps


def reload(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("modules_first", [True, False])
def test_resume_is_bit_for_bit(dtype, options, modules_first):
    nets = make_nets(dtype=dtype)
    opt = make_optimizer(nets, **options)
    train(nets, opt, 6)
    saved = reload({"nets": [net.state_dict() for net in nets], "opt": opt.state_dict()})
    train(nets, opt, 5, 6)

    fresh = make_nets(dtype=dtype, seed=9)
    if modules_first:
        for net, state in zip(fresh, saved["nets"], strict=True):
            net.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the replicas differ, but a state dict is about to be loaded
            fresh_opt = make_optimizer(fresh, **options)
            fresh_opt.load_state_dict(saved["opt"])
        for net, state in zip(fresh, saved["nets"], strict=True):  # batch-norm statistics are the modules' own
            net.load_state_dict({k: v for k, v in state.items() if "running" in k or "num_batches" in k}, strict=False)
    else:
        fresh_opt = make_optimizer(fresh, **options)
        fresh_opt.load_state_dict(saved["opt"])
        for net, state in zip(fresh, saved["nets"], strict=True):
            net.load_state_dict(state)
    train(fresh, fresh_opt, 5, 6)
    assert_same(values(nets, opt), values(fresh, fresh_opt))
    assert counters(opt) == counters(fresh_opt)


def test_the_state_dict_alone_holds_every_parameter():
    nets, fresh = make_nets(), make_nets(seed=3)
    opt, other = make_optimizer(nets), make_optimizer(fresh)
    train(nets, opt, 3)
    other.load_state_dict(opt.state_dict())
    assert_same(values(nets, opt), values(fresh, other))


def test_the_state_dict_holds_references():
    nets = make_nets()
    opt = make_optimizer(nets)
    state = opt.state_dict()["state"]
    weight = nets[0][0].weight
    assert state[0]["theta"].data_ptr() == weight.data_ptr()
    assert state[0]["initialization"].data_ptr() == opt.initialization[0].data_ptr()


def test_state_is_never_empty_and_dtypes_are_kept():
    nets = make_nets(dtype=torch.float16)
    opt = make_optimizer(nets, momentum=0.0)
    assert all(opt.state[p] for group in opt.param_groups for p in group["params"])
    train(nets, opt, 1)
    opt.load_state_dict(reload(opt.state_dict()))
    entry = opt.state[nets[0][0].weight]
    dtypes = [entry[name].dtype for name in ("theta", "momentum_buffer", "initialization")]
    assert dtypes == [torch.float32, torch.float16, torch.float32]


def test_dicts_without_newer_options_load():
    nets = make_nets()
    opt = make_optimizer(nets)
    train(nets, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        for name in ("meta_interval", "shift", "sizes", "reset_momentum"):
            del group[name]
    opt.load_state_dict(state)
    assert opt.param_groups[0]["meta_interval"] == 1


def broken(kind):
    opt = make_optimizer(make_nets(2 if kind == "tasks" else 3, torch.float64 if kind == "dtype" else torch.float32))
    state = copy.deepcopy(opt.state_dict())
    if kind == "name":
        state["param_groups"][0]["param_names"][1] = "other"
    if kind == "shape":
        state["state"][3]["theta"] = torch.zeros(2)
    if kind == "missing":
        del state["state"][5]["momentum_buffer"]
    if kind == "groups":
        state["param_groups"].pop()
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("tasks", "has 2 tasks, but the optimizer has 3"),
        ("name", "'other'"),
        ("dtype", "float64"),
        ("groups", "parameter groups"),
        ("shape", r"task 0, parameter '1.bias'.*\(2,\)"),
        ("missing", "task 1, parameter '0.bias'.*missing"),
    ],
)
def test_a_wrong_state_dict_raises_before_anything_changed(kind, message):
    nets = make_nets()
    opt = make_optimizer(nets)
    train(nets, opt, 2)
    before, count = values(nets, opt), counters(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(broken(kind))
    assert_same(before, values(nets, opt))
    assert count == counters(opt)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_continue_like_the_original(how):
    nets = make_nets()
    opt = make_optimizer(nets)
    train(nets, opt, 3)
    if how == "deepcopy":
        other_nets, other = copy.deepcopy((nets, opt))
    elif how == "pickle":
        other_nets, other = pickle.loads(pickle.dumps((nets, opt)))
    else:
        file = io.BytesIO()
        torch.save((nets, opt), file)
        file.seek(0)
        other_nets, other = torch.load(file, weights_only=False)
    assert_same(values(nets, opt), values(other_nets, other))
    train(nets, opt, 4, 3)
    train(other_nets, other, 4, 3)
    assert_same(values(nets, opt), values(other_nets, other))


def test_files_and_copies_stay_linear_in_size():
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(30)])
    nets = [copy.deepcopy(net) for _ in range(4)]
    alone, plain = io.BytesIO(), io.BytesIO()
    torch.save(net.state_dict(), plain)
    opt = ShiftingMetaOptimizer([n.named_parameters() for n in nets], momentum=0.9)
    torch.save(nets[1].state_dict(), alone)
    assert alone.getbuffer().nbytes <= 1.05 * plain.getbuffer().nbytes
    size = sum(p.numel() for p in net.parameters()) * 4
    buffers = (3 * 4 + 1) * size  # parameters, theta, momentum of four tasks and phi
    assert len(pickle.dumps(opt)) <= 1.5 * buffers + 400_000
    assert len(pickle.dumps(nets[0])) <= 1.5 * size + 100_000


def test_torch_distributed_checkpoint_loads_in_place_without_stepping(tmp_path):
    nets, fresh = make_nets(), make_nets(seed=4)
    opt, other = make_optimizer(nets), make_optimizer(fresh)
    train(nets, opt, 3)
    model, fresh_model = nn.ModuleList(nets), nn.ModuleList(fresh)
    dcp.save({"opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=tmp_path)
    state = {"opt": get_optimizer_state_dict(fresh_model, other)}
    assert counters(other) == (0, 0, 0, 0)
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(fresh_model, other, state["opt"])
    assert_same(values(nets, opt), values(fresh, other))
    assert counters(opt) == counters(other)
    for net, twin in zip(nets, fresh, strict=True):
        twin.load_state_dict(net.state_dict())
    train(nets, opt, 3, 3)
    train(fresh, other, 3, 3)
    assert_same(values(nets, opt), values(fresh, other))


def test_load_state_dict_hooks_run():
    opt = make_optimizer(make_nets())
    seen = []
    opt.register_load_state_dict_pre_hook(lambda o, state: seen.append("before"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before", "after"]


def test_loading_takes_over_parameters_exchanged_by_the_user():
    nets = make_nets()
    opt = make_optimizer(nets)
    state = copy.deepcopy(opt.state_dict())
    expected = nets[0][0].weight.detach().clone()
    nets[0][0].weight.data = torch.zeros_like(expected)
    opt.load_state_dict(state)
    assert torch.equal(nets[0][0].weight, expected)
