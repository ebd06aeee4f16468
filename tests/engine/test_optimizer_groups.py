"""Tasks, param groups, heads and hyper-parameters of `ShiftingMetaOptimizer`."""

import warnings

import pytest
import torch
from support.nets import assert_same, backward, make_nets, make_optimizer, train, values
from torch import nn

from cts_fast import ShiftingMetaOptimizer

# Tasks and groups


def test_one_line_changes_in_a_script_that_used_sgd():
    net = make_nets(1)[0]
    opt = ShiftingMetaOptimizer(net.parameters(), lr=0.1, momentum=0.9)
    assert opt.num_tasks == 1 and len(opt.initialization) == 6
    assert list(opt.initialization_state_dict()) == [str(i) for i in range(6)]
    backward([net])
    opt.step()
    assert opt.inner_step == 1


@pytest.mark.parametrize("named", [False, True])
def test_every_form_of_tasks_gives_the_same_run(named):
    def source(net):
        return net.named_parameters() if named else net.parameters()

    def groups(*slices):
        return lambda nets: [{"params": [source(net[part]) for net in nets]} for part in slices]

    forms = [lambda nets: [source(net) for net in nets], groups(slice(None))]
    if not named:  # the slices' names would not be the net's
        forms.append(groups(slice(2), slice(2, None)))
    results = []
    for form in forms:
        nets = make_nets(2)
        opt = ShiftingMetaOptimizer(form(nets), lr=0.05, meta_lr=0.1)
        train(nets, opt, 3)
        results.append(values(nets, opt))
    for result in results[1:]:
        assert_same(results[0], result)


def test_a_parameter_list_is_a_list_of_parameters():
    lists = [nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]) for _ in range(2)]
    assert ShiftingMetaOptimizer(lists).num_tasks == 2
    assert ShiftingMetaOptimizer(lists[0]).num_tasks == 1


@pytest.mark.parametrize("names", [["w"], ["w", "w"]], ids=["of one task", "of all"])
def test_names_may_stand_in_a_group(names):
    tasks = [[nn.Parameter(torch.ones(2))] for _ in range(2)]
    opt = ShiftingMetaOptimizer([{"params": tasks, "param_names": names, "lr_scale": 0.5}])
    opt.param_groups.append(opt.param_groups.pop())
    assert list(opt.initialization_state_dict()) == ["w"]
    assert opt.param_groups[0]["param_names"] == ["w", "w"]
    ShiftingMetaOptimizer([[("w", param) for param in task] for task in tasks]).load_state_dict(opt.state_dict())


def test_groups_carry_hyper_parameters_of_their_own():
    nets = make_nets(2)
    still = {"params": [net[0].parameters() for net in nets], "lr": 0.0, "meta_lr": 0.0}
    opt = ShiftingMetaOptimizer([still, {"params": [net[1:].parameters() for net in nets]}], lr=0.1)
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
    shared, own = [body.named_parameters() for body in bodies], [head.parameters() for head in heads]
    opt = ShiftingMetaOptimizer(shared, heads=own, lr=0.1, horizon=1)
    before = [h.weight.detach().clone() for h in heads]
    for body, head in zip(bodies, heads, strict=True):
        head(body(torch.ones(1, 3))).sum().backward()
    opt.step()
    assert list(opt.initialization_state_dict()) == ["weight", "bias"]
    assert all(not torch.equal(b, h.weight) for b, h in zip(before, heads, strict=True))


def test_differing_replicas_start_at_the_first_tasks_parameters_with_a_warning():
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets])
    assert torch.equal(nets[0].weight, nets[1].weight) and torch.equal(opt.initialization[0], nets[0].weight)
    nets[0].weight.grad = torch.ones(2, 2)
    with pytest.warns(UserWarning, match="task 1, parameter 'weight'.*differs"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()  # it says so once


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


def test_an_empty_group_is_allowed_beside_others():
    nets = make_nets(2)
    opt = ShiftingMetaOptimizer([{"params": []}, {"params": [net.parameters() for net in nets]}], lr=0.1)
    train(nets, opt, 1)
    assert opt.num_tasks == 2 and opt.inner_step == 1


def test_empty_heads_are_no_group():
    nets = make_nets(2)
    opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets], heads=[[], []])
    assert len(opt.param_groups) == 1
