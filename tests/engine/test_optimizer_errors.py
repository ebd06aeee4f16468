"""Bad input raises at once, names task, parameter and reason, and leaves everything as it was."""

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims

from cts_fast import ShiftingMetaOptimizer


def parameters(*shapes, dtype=torch.float32, device="cpu"):
    zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    return [nn.Parameter(values, requires_grad=dtype.is_floating_point) for values in zeros]


TORCH_CASES = get_error_inputs_for_all_optims("cpu", torch.float32)


@pytest.mark.parametrize("case", TORCH_CASES, ids=[case.optimizer_error_input.desc for case in TORCH_CASES])
def test_generic_error_inputs_of_torch_give_the_same_class_and_message(case):
    inputs, kind = case.optimizer_error_input, case.error_type
    params = parameters((2,)) if inputs.params is None else inputs.params
    context = pytest.warns if issubclass(kind, Warning) else pytest.raises
    with context(kind, match=case.error_regex):
        ShiftingMetaOptimizer(params, **inputs.kwargs)


def two_tasks(shape=(2,), **other):
    """Two tasks of one parameter, the second one's with another shape, dtype or device."""
    return [parameters((2,)), parameters(shape, **other)]


def named(*names):
    """A task of one parameter a name."""
    return [(name, parameters((2,))[0]) for name in names]


SHARED = parameters((2,))[0]
LEAF = torch.zeros(2, requires_grad=True)
BAD_VALUES = {
    "empty task list": ([], "empty parameter list"),
    "tasks without parameters": ([[], []], "no task has a parameter"),
    "a parameter of two tasks": ([[SHARED], [SHARED]], "task 1, parameter 0: is a parameter of task 0 too"),
    "other counts": ([parameters((2,), (3,)), parameters((2,))], "task 1: 1 parameters, but task 0 has 2"),
    "other shapes": (two_tasks((3,)), r"task 1, parameter '0': shape is \(3,\), but \(2,\) in task 0"),
    "other dtypes": (two_tasks(dtype=torch.float64), "task 1, parameter '0': dtype is torch.float64"),
    "other devices": (two_tasks(device="meta"), "task 1, parameter '0': device is meta"),
    "no device": ([parameters((2,), device="meta")], "task 0, parameter '0': is on the meta device"),
    "other names": ([named("a"), named("b")], "task 1, parameter 'b': name is b, but a in task 0"),
    "integers": ([parameters((2,), dtype=torch.int64)], "task 0, parameter '0': dtype is torch.int64"),
    "complex": ([parameters((2,), dtype=torch.complex64)], "task 0, parameter '0': dtype is torch.complex64"),
    "non-leaf": ([[LEAF * 2]], "can't optimize a non-leaf Tensor"),
    "names twice": ([named("a", "a")], "'a': two shared parameters have that name"),
}
BAD_TYPES = {
    "a set as a task": ([set(parameters((2,), (3,)))], "task 0.*ordered collections"),
    "no tensors": ([[1.0]], "task 0, parameter '0': optimizer can only optimize Tensors"),
    "a number as a task": ([3], "task 0: optimizer can only optimize Tensors"),
    "nothing": (None, "tasks: is NoneType; give an iterable of parameters"),
    "a method": (nn.Linear(2, 2).parameters, "tasks: is torch.nn.modules.module.Module.parameters; give an iterable"),
    "a group of nothing": ([{"params": None}], "params: is NoneType; give an iterable"),
}
BAD_TASKS = {kind: (*case, ValueError) for kind, case in BAD_VALUES.items()}
BAD_TASKS |= {kind: (*case, TypeError) for kind, case in BAD_TYPES.items()}


@pytest.mark.parametrize("kind", BAD_TASKS)
def test_bad_tasks_raise(kind):
    tasks, message, error = BAD_TASKS[kind]
    with pytest.raises(error, match=message):
        ShiftingMetaOptimizer(tasks)


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": NAN}, "Invalid learning rate: nan"),
        ({"momentum": -0.1}, "Invalid momentum value"),
        ({"weight_decay": -1}, "Invalid weight_decay value"),
        ({"meta_lr": -1.0}, "Invalid meta learning rate"),
        ({"meta_lr": NAN}, "Invalid meta learning rate"),
        ({"dampening": NAN}, "Invalid dampening"),
        ({"shift": NAN}, "Invalid shift"),
        ({"meta_lr": torch.ones(2)}, "Tensor meta_lr must be 1-element"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov"),
        ({"horizon": 0}, "Invalid horizon"),
        ({"horizon": 1.5}, "Invalid horizon"),
        ({"meta_interval": 0}, "Invalid meta_interval"),
        ({"nonfinite": "ask"}, "Invalid nonfinite"),
        ({"backend": "warp"}, "unknown backend 'warp'"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ShiftingMetaOptimizer([parameters((2,))], **options)


def test_a_backend_that_cannot_run_says_why():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, so the cuda backend runs")
    with pytest.raises(RuntimeError, match="'cuda'"):
        ShiftingMetaOptimizer([parameters((2,))], backend="cuda")


OF_THE_OPTIMIZER = "horizon meta_interval reset_momentum capturable nonfinite backend process_group".split()


@pytest.mark.parametrize("option", OF_THE_OPTIMIZER)
def test_a_group_may_not_set_an_option_of_the_whole_optimizer(option):
    with pytest.raises(ValueError, match=f"{option} belongs to the whole optimizer"):
        ShiftingMetaOptimizer([{"params": [parameters((2,))], option: 1}])


@pytest.mark.parametrize("names", [None, 3, "ab", ["a"], ["a", 1], ["a", "b", "c"]], ids=str)
def test_names_of_a_group_that_name_not_every_parameter_raise(names):
    with pytest.raises(ValueError, match="param_names"):
        ShiftingMetaOptimizer([{"params": parameters((2,), (3,)), "param_names": names}])


def test_heads_for_another_number_of_tasks_raise():
    with pytest.raises(ValueError, match="heads of 1 tasks given, but there are 2 tasks"):
        ShiftingMetaOptimizer([parameters((2,)), parameters((2,))], heads=[parameters((3,))])


@pytest.mark.parametrize(("heads", "where"), [(3, "heads"), ([parameters((3,)), None], "heads, task 1")])
def test_heads_that_are_no_iterables_are_named(heads, where):
    with pytest.raises(TypeError, match=f"{where}: is .*; give an iterable"):
        ShiftingMetaOptimizer([parameters((2,)), parameters((2,))], heads=heads)


def test_heads_alone_are_no_initialization():
    with pytest.raises(ValueError, match="every group is a head group"):
        ShiftingMetaOptimizer([{"params": [parameters((2,))], "shared": False}])
    with pytest.raises(ValueError, match="or empty; an initialization needs shared parameters"):
        ShiftingMetaOptimizer([{"params": [[], []]}, {"params": [parameters((2,)), parameters((3,))], "shared": False}])


@pytest.mark.parametrize(
    ("group", "error"),
    [
        ({"params": [parameters((2,))]}, "1 tasks given, but the optimizer has 2"),
        ({"params": two_tasks((3,))}, "shape"),
        ({"params": two_tasks(), "lr": -1.0}, "Invalid learning rate"),
    ],
)
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


def test_loading_moves_no_head_tensor_to_another_task():
    def build(*sizes):
        heads = [parameters(*[(3,)] * size) for size in sizes]
        return ShiftingMetaOptimizer([parameters((2,)), parameters((2,))], heads=heads)

    with pytest.raises(ValueError, match=r"group 1.*\[2, 1\].*\[1, 2\]"):
        build(1, 2).load_state_dict(build(2, 1).state_dict())


def test_a_dict_that_is_no_state_dict_raises():
    with pytest.raises(ValueError, match="'state' is missing"):
        ShiftingMetaOptimizer([parameters((2,))]).load_state_dict({})


def test_parameters_already_in_a_group_raise():
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
        ([torch.ones(2), torch.ones(3, device="meta")], "parameter '1': a Tensor on meta that holds no numbers"),
    ],
)
def test_a_wrong_initialization_raises_and_changes_nothing(given, message):
    opt = ShiftingMetaOptimizer([parameters((2,), (3,))])
    with pytest.raises(ValueError, match=message):
        opt.load_initialization(given)
    assert not any(phi.any() for phi in opt.initialization)
