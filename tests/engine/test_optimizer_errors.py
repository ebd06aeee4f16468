"""Bad input raises at once, names task, parameter and reason, and leaves everything as it was."""

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims

from cts_fast import ShiftingMetaOptimizer


def parameters(*shapes, dtype=torch.float32, device="cpu"):
    return [
        nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=dtype.is_floating_point)
        for shape in shapes
    ]


TORCHS = get_error_inputs_for_all_optims("cpu", torch.float32)


@pytest.mark.parametrize("case", TORCHS, ids=[case.optimizer_error_input.desc for case in TORCHS])
def test_torchs_generic_error_inputs_give_the_same_class_and_message(case):
    inputs, kind = case.optimizer_error_input, case.error_type
    params = parameters((2,)) if inputs.params is None else inputs.params
    context = pytest.warns if issubclass(kind, Warning) else pytest.raises
    with context(kind, match=case.error_regex):
        ShiftingMetaOptimizer(params, **inputs.kwargs)


SHARED = parameters((2,))[0]
LEAF = torch.zeros(2, requires_grad=True)
BAD_TASKS = {
    "empty task list": ([], ValueError, "empty parameter list"),
    "tasks without parameters": ([[], []], ValueError, "no task has a parameter"),
    "a parameter of two tasks": ([[SHARED], [SHARED]], ValueError, "task 1, parameter 0: is a parameter of task 0 too"),
    "other counts": ([parameters((2,), (3,)), parameters((2,))], ValueError, "task 1: 1 parameters, but task 0 has 2"),
    "other shapes": (
        [parameters((2,)), parameters((3,))],
        ValueError,
        r"task 1, parameter '0': shape is \(3,\), but \(2,\) in task 0",
    ),
    "other dtypes": (
        [parameters((2,)), parameters((2,), dtype=torch.float64)],
        ValueError,
        "task 1, parameter '0': dtype is torch.float64",
    ),
    "other devices": (
        [parameters((2,)), parameters((2,), device="meta")],
        ValueError,
        "task 1, parameter '0': device is meta",
    ),
    "other names": (
        [[("a", parameters((2,))[0])], [("b", parameters((2,))[0])]],
        ValueError,
        "task 1, parameter 'b': name is b, but a in task 0",
    ),
    "integers": ([parameters((2,), dtype=torch.int64)], ValueError, "task 0, parameter '0': dtype is torch.int64"),
    "complex": (
        [parameters((2,), dtype=torch.complex64)],
        ValueError,
        "task 0, parameter '0': dtype is torch.complex64",
    ),
    "non-leaf": ([[LEAF * 2]], ValueError, "can't optimize a non-leaf Tensor"),
    "a set as a task": ([set(parameters((2,), (3,)))], TypeError, "task 0.*ordered collections"),
    "no tensors": ([[1.0]], TypeError, "task 0, parameter '0': optimizer can only optimize Tensors"),
    "a number as a task": ([3], TypeError, "task 0: optimizer can only optimize Tensors"),
    "names twice": (
        [[("a", parameters((2,))[0]), ("a", parameters((2,))[0])]],
        ValueError,
        "'a': two shared parameters have that name",
    ),
}


@pytest.mark.parametrize("kind", BAD_TASKS)
def test_bad_tasks(kind):
    tasks, error, message = BAD_TASKS[kind]
    with pytest.raises(error, match=message):
        ShiftingMetaOptimizer(tasks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"), ({"lr": float("nan")}, "Invalid learning rate: nan"), ({"momentum": -0.1}, "Invalid momentum value"),
        ({"weight_decay": -1}, "Invalid weight_decay value"), ({"meta_lr": -1.0}, "Invalid meta learning rate"),
        ({"meta_lr": float("nan")}, "Invalid meta learning rate"), ({"dampening": float("nan")}, "Invalid dampening"), ({"shift": float("nan")}, "Invalid shift"),
        ({"meta_lr": torch.ones(2)}, "Tensor meta_lr must be 1-element"), ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov"), ({"horizon": 0}, "Invalid horizon"), ({"horizon": 1.5}, "Invalid horizon"),
        ({"meta_interval": 0}, "Invalid meta_interval"), ({"nonfinite": "ask"}, "Invalid nonfinite"), ({"backend": "warp"}, "unknown backend 'warp'"),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ShiftingMetaOptimizer([parameters((2,))], **options)


def test_a_backend_that_cannot_run_says_why():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, so the cuda backend runs")
    with pytest.raises(RuntimeError, match="'cuda'"):
        ShiftingMetaOptimizer([parameters((2,))], backend="cuda")


@pytest.mark.parametrize(
    "option", ["horizon", "meta_interval", "reset_momentum", "capturable", "nonfinite", "backend", "process_group"]
)
def test_a_group_may_not_set_an_option_of_the_whole_optimizer(option):
    with pytest.raises(ValueError, match=f"{option} belongs to the whole optimizer"):
        ShiftingMetaOptimizer([{"params": [parameters((2,))], option: 1}])


def test_heads_for_another_number_of_tasks():
    with pytest.raises(ValueError, match="heads of 1 tasks given, but there are 2 tasks"):
        ShiftingMetaOptimizer([parameters((2,)), parameters((2,))], heads=[parameters((3,))])


def test_heads_alone_are_no_initialization():
    with pytest.raises(ValueError, match="every group is a head group"):
        ShiftingMetaOptimizer([{"params": [parameters((2,))], "shared": False}])
    with pytest.raises(ValueError, match="or empty; an initialization needs shared parameters"):
        ShiftingMetaOptimizer([{"params": [[], []]}, {"params": [parameters((2,)), parameters((3,))], "shared": False}])


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"params": [parameters((2,))]}, "1 tasks given, but the optimizer has 2"), ({"params": [parameters((2,)), parameters((3,))]}, "shape"),
        ({"params": [parameters((2,)), parameters((2,))], "lr": -1.0}, "Invalid learning rate"),
    ],
)  # fmt: skip
def test_a_bad_group_leaves_the_optimizer_as_it_was(group, error):
    tasks = [parameters((2,)), parameters((2,))]
    opt = ShiftingMetaOptimizer(tasks)
    live = opt.initialization[0]
    with pytest.raises(ValueError, match=error):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1 and opt.initialization[0] is live


def test_a_group_that_cannot_be_laid_out_leaves_the_optimizer_as_it_was():
    tasks = [[("a", parameter)] for parameter in parameters((2,), (2,))]
    opt = ShiftingMetaOptimizer(tasks, lr=1.0, meta_lr=0.0)
    live = opt.initialization[0]
    with pytest.raises(ValueError, match="'a': two shared parameters have that name"):
        opt.add_param_group({"params": [[("a", parameter)] for parameter in parameters((3,), (3,))]})
    assert len(opt.param_groups) == 1 and opt.initialization[0] is live
    tasks[0][0][1].grad = torch.ones(2)
    opt.step()
    assert tasks[0][0][1].tolist() == [-1, -1]


def test_a_failing_construction_leaves_the_parameters_as_they_were():
    tasks = [[nn.Parameter(torch.full((2,), float(t)))] for t in range(2)]
    where = tasks[1][0].data_ptr()
    with pytest.raises(RuntimeError, match="'cuda'"):
        ShiftingMetaOptimizer(tasks, backend="cuda")
    assert tasks[1][0].tolist() == [1, 1] and tasks[1][0].data_ptr() == where


@pytest.mark.parametrize("broken", [{"horizon": 0}, {"horizon": 2.5}, {"meta_interval": 0}])
def test_a_bad_live_option_raises_before_anything_moved(broken):
    tasks = [parameters((2,))]
    opt = ShiftingMetaOptimizer(tasks, lr=1.0)
    tasks[0][0].grad = torch.ones(2)
    opt.param_groups[0].update(broken)
    with pytest.raises(ValueError, match="Invalid"):
        opt.step()
    assert not tasks[0][0].any()


def test_head_tensors_do_not_change_tasks_in_loading():
    def build(*sizes):
        heads = [parameters(*[(3,)] * size) for size in sizes]
        return ShiftingMetaOptimizer([parameters((2,)), parameters((2,))], heads=heads)

    with pytest.raises(ValueError, match=r"group 1.*\[2, 1\].*\[1, 2\]"):
        build(1, 2).load_state_dict(build(2, 1).state_dict())


def test_a_state_dict_that_is_none():
    with pytest.raises(ValueError, match="'state' is missing"):
        ShiftingMetaOptimizer([parameters((2,))]).load_state_dict({})


def test_parameters_already_in_a_group():
    tasks = [parameters((2,)), parameters((2,))]
    opt = ShiftingMetaOptimizer(tasks)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": tasks})


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_sparse_gradients_raise_before_anything_moved(backend):
    tables = [nn.Embedding(5, 2, sparse=True) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    opt = ShiftingMetaOptimizer([table.parameters() for table in tables], backend=backend)
    before = tables[0].weight.detach().clone()
    for table in tables:
        table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="task 0, parameter '0': gradient is torch.sparse_coo"):
        opt.step()
    assert torch.equal(before, tables[0].weight) and opt.inner_step == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([torch.zeros(2)], "1 tensors given"),
        ([torch.zeros(3), torch.zeros(3)], "parameter '0'"),
        ({"0": torch.zeros(2)}, "parameter '1': not in"),
    ],
)
def test_a_wrong_initialization_raises_and_changes_nothing(given, message):
    opt = ShiftingMetaOptimizer([parameters((2,), (3,))])
    with pytest.raises(ValueError, match=message):
        opt.load_initialization(given)
    assert not any(phi.any() for phi in opt.initialization)
