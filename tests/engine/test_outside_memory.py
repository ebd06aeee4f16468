"""Memory that others hold, gradients of odd kinds, copies, wrappers and interrupts: a step is right, or refused."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from support.nets import assert_same
from support.outside import BACKENDS, KINDS, Problem, everywhere, exchange_data, exchange_tensors
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from cts_fast import ShiftingMetaOptimizer
from cts_fast.baselines import METHODS

# Memory that others hold


def test_parameters_in_shared_memory_are_refused_at_once_and_later():
    net = nn.Linear(2, 2).share_memory()
    with pytest.raises(ValueError, match="task 0, parameter 'weight': lies in memory shared"):
        ShiftingMetaOptimizer([net.named_parameters()])
    problem = Problem()
    problem.step()
    problem.nets[1].share_memory()
    problem.assert_refused("task 1, parameter 'weight': lies in memory shared")


@pytest.mark.parametrize("which", ["initialization", "state", "held"])
def test_shared_state_is_refused_and_can_be_taken_out(which):
    problem = Problem(meta_lr=0.5)
    problem.step()
    param = problem.param("shared", 0)
    if which == "held":
        tensor = problem.opt.state[param]["momentum_buffer"]
        problem.step()
        tensor.share_memory_()
    else:
        tensor = problem.opt.state[param]["momentum_buffer"] if which == "state" else problem.opt.initialization[0]
        tensor.share_memory_()
    problem.assert_refused("lies in memory shared")
    tensor.data = tensor.data.clone()
    problem.step(2)
    entry = problem.opt.state[param]
    live = entry["momentum_buffer"] if which != "initialization" else entry["initialization"]
    assert live is tensor and int(entry["counters"][0]) == problem.opt.inner_step


def test_an_optimizer_is_not_sent_to_a_spawned_process():
    problem = Problem()
    process = torch.multiprocessing.get_context("spawn").Process(target=print, args=(problem.opt,))
    with pytest.raises(RuntimeError, match="cannot be sent to another process"):
        process.start()
    problem.step()


@pytest.mark.parametrize("where", ["one task", "two tasks", "head", "part"])
def test_parameters_in_one_memory_are_refused(where):
    memory = torch.zeros(6)
    one, two = nn.Parameter(memory[:4]), nn.Parameter(memory[2:] if where == "part" else memory[:4])
    tasks, heads = [[one], [two]], None
    if where == "one task":
        tasks = [[one, two]]
    elif where == "head":
        tasks, heads = [[one]], [[two]]
    with pytest.raises(ValueError, match="lies in the memory of task 0, parameter '0'"):
        ShiftingMetaOptimizer(tasks, heads=heads)


def test_interleaved_views_of_one_memory_are_two_parameters():
    memory = torch.zeros(2, 4)
    tasks = [[nn.Parameter(memory[t])] for t in range(2)]
    opt = ShiftingMetaOptimizer(tasks, lr=1.0)
    tasks[0][0].grad = torch.ones(4)
    opt.step()
    columns = [nn.Parameter(torch.zeros(4, 2)[:, 0]), nn.Parameter(torch.zeros(4, 2)[:, 1])]
    with pytest.warns(UserWarning, match="view of larger memory"):
        ShiftingMetaOptimizer([columns])


def test_an_expanded_parameter_is_refused():
    with pytest.raises(ValueError, match="several of its numbers lie in one place"):
        ShiftingMetaOptimizer([[nn.Parameter(torch.zeros(1).expand(4))]])


@pytest.mark.parametrize("kind", ["lazy", "freed", "zero"])
def test_tensors_without_memory_are_refused(kind):
    param = nn.Parameter(torch.ones(3))
    if kind == "lazy":
        param = nn.LazyLinear(2).weight
    elif kind == "freed":
        param.untyped_storage().resize_(0)
    else:
        param = torch._efficientzerotensor((3,)).requires_grad_()
    plain = nn.Parameter(torch.ones(2))
    before = plain.data_ptr()
    with pytest.raises(ValueError, match="task 0, parameter '1'"):
        ShiftingMetaOptimizer([[plain, param]])
    assert plain.data_ptr() == before


def test_views_of_phi_that_others_hold_stay_live_when_buffers_are_laid_out_anew():
    problem = Problem(meta_lr=0.5)
    problem.step()
    phi, theta = problem.opt.initialization[0], problem.opt.state[problem.param("shared", 0)]["theta"]
    problem.opt.add_param_group({"params": [[("more", nn.Parameter(torch.zeros(2)))] for _ in range(3)]})
    problem.step()
    assert phi is problem.opt.initialization[0] and torch.equal(theta, problem.param("shared", 0))
    entry = problem.opt.state[problem.param("shared", 0)]
    assert entry["initialization"] is phi and entry["theta"] is theta


@everywhere
@pytest.mark.parametrize("edit", ["more", "a step on shown weights", "heads gone"])
def test_buffers_that_were_laid_out_anew_hold_no_older_ones(backend, edit):
    problem = Problem(backend)
    problem.step()
    flats = [flat for kind in problem.opt.engine.flats for flat in kind if edit != "heads gone" or not flat.shared]
    older = [b for flat in flats for b in (flat.theta, flat.momentum, flat.phi) if b is not None]
    memory = [StorageWeakRef(buffer.untyped_storage()) for buffer in older]
    del flats, older
    if edit == "more":
        problem.opt.add_param_group({"params": [[("more", nn.Parameter(torch.zeros(2)))] for _ in range(3)]})
    elif edit == "heads gone":
        problem.opt.param_groups.pop()
    else:
        backup = problem.nets[1]["body"].weight.data
        problem.nets[1]["body"].weight.data = torch.zeros_like(backup)
    problem.step()
    backup = None
    gc.collect()
    assert all(one.expired() for one in memory)


def test_a_net_that_took_phi_by_assignment_makes_an_optimizer_of_its_own():
    problem = Problem(meta_lr=0.5)
    problem.step()
    net = nn.Linear(4, 3)
    net.load_state_dict(problem.opt.initialization_state_dict(), assign=True)
    before = [p.clone() for p in problem.opt.initialization]
    own = ShiftingMetaOptimizer([net.named_parameters()], lr=1.0)
    net.weight.grad = torch.ones(3, 4)
    own.step()
    assert_same(before, problem.opt.initialization)
    nets = [nn.Linear(4, 3) for _ in range(2)]
    for one in nets:
        one.load_state_dict(problem.opt.initialization_state_dict(), assign=True)
    with pytest.raises(ValueError, match="task 1, parameter 'weight': lies in the memory of task 0"):
        ShiftingMetaOptimizer([one.named_parameters() for one in nets])


# Gradients


@everywhere
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradients_values_count_not_its_memory(backend, kind):
    for gradient in (
        torch._neg_view(-torch.ones(6)),
        torch._efficientzerotensor((6,)),
        torch.ones(6, dtype=torch.float64),
        torch.ones(6, dtype=torch.bfloat16),
    ):
        params = [nn.Parameter(torch.zeros(6)) for _ in range(2)]
        heads = [[nn.Parameter(torch.zeros(6))] for _ in range(2)]
        opt = ShiftingMetaOptimizer(
            [[p] for p in params], heads=heads, lr=1.0, momentum=0.9, weight_decay=0.5, meta_lr=0.0, backend=backend
        )
        param = params[1] if kind == "shared" else heads[1][0]
        param.data.fill_(2.0) if kind == "head" else None
        start = param.detach().clone()
        param.grad_dtype = None
        param.grad = gradient
        opt.step()
        assert torch.equal(param, start - (gradient.float().clone() + 0.5 * start))
        assert opt.state[param]["momentum_started"]


@pytest.mark.parametrize("gradient", [torch.ones(3, dtype=torch.complex64), torch.ones(3, device="meta")], ids=str)
def test_gradients_that_sgd_does_not_take_are_refused(gradient):
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    opt = ShiftingMetaOptimizer([[p] for p in params], lr=1.0)
    params[0].grad = torch.ones(3)
    params[1].grad_dtype = None
    try:
        params[1].grad = gradient
    except RuntimeError:
        pytest.skip("this torch does not let such a gradient be set")
    with pytest.raises(ValueError, match="task 1, parameter '0': gradient is"):
        opt.step()
    assert not params[0].any() and opt.inner_step == 0


# Copies, wrappers, modes


def test_a_shallow_copy_is_a_second_handle():
    problem = Problem(meta_lr=0.25)
    other = copy.copy(problem.opt)
    twin = Problem(meta_lr=0.25)
    for i in range(6):
        problem.gradients()
        (other if i % 2 else problem.opt).step()
        twin.step()
    assert_same(problem.values(), twin.values())
    assert other.inner_step == problem.opt.inner_step == 6


class Wrapper(ShiftingMetaOptimizer):
    """As libraries wrap optimizers: a subclass that forwards what it lacks."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def test_a_wrapper_that_forwards_what_it_lacks():
    problem, twin = Problem(meta_lr=0.25), Problem(meta_lr=0.25)
    wrapper = Wrapper(problem.opt)
    for i in range(4):
        if i == 2:
            exchange_tensors(problem.opt)
            for p in (problem, twin):
                p.opt.add_param_group({"params": [[("more", nn.Parameter(torch.zeros(2)))] for _ in range(3)]})
        problem.gradients()
        (wrapper if i != 3 else problem.opt).step()
        twin.step()
    assert_same(problem.values(), twin.values())
    wrapper.load_state_dict(wrapper.state_dict())
    wrapper.zero_grad()


@everywhere
def test_inference_mode_leaves_training_possible(backend):
    plain, other = Problem(backend, meta_lr=0.25), Problem(backend, meta_lr=0.25)
    nets = copy.deepcopy(plain.nets)
    with torch.inference_mode():
        opt = ShiftingMetaOptimizer(
            [net["body"].named_parameters() for net in nets],
            heads=[net["head"].parameters() for net in nets],
            backend=backend,
            **other.options,
        )
    other.nets, other.opt = nets, opt
    for i in range(3):
        plain.step()
        other.gradients()
        with torch.inference_mode(i == 1):
            opt.step()
    more = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    with torch.inference_mode():
        opt.add_param_group({"params": [[("more", p)] for p in more]})
    nets[0]["head"](nets[0]["body"](torch.ones(1, 4))).sum().backward()
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.reset_tasks()
    with torch.inference_mode():
        made_there = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="was made under inference_mode"):
        ShiftingMetaOptimizer([[made_there]])


@everywhere
def test_a_cycle_through_a_parameter_is_freed(backend):
    gc.collect()
    nets = [nn.Linear(3, 2) for _ in range(2)]
    opt = ShiftingMetaOptimizer([net.parameters() for net in nets], backend=backend)
    nets[0].weight.optimizer = opt
    nets[0].weight.grad = torch.ones(2, 3)
    opt.step()
    alive = weakref.ref(opt)
    del opt, nets
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods_take_over_exchanged_state_too(method):
    def run(exchange):
        torch.manual_seed(0)
        params = [[nn.Parameter(torch.ones(5))] for _ in range(3)]
        opt = METHODS[method](params, lr=0.1, momentum=0.5, horizon=3)
        for step in range(7):
            if exchange and step == 4:
                exchange_tensors(opt), exchange_data(opt)
            losses = [((p - t) ** 2).sum() for t, (p,) in enumerate(params)]
            opt.zero_grad()
            for loss in losses:
                loss.backward()
            heldout = [lambda t=t: ((params[t][0] + t) ** 2).sum() for t in range(3)]
            opt.step(losses=[loss.detach() for loss in losses], heldout=heldout)
        return [p.detach() for (p,) in params] + list(opt.initialization)

    assert_same(run(False), run(True))


# What may be given


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (nn.Linear(2, 2), "tasks: is a module"),
        ([nn.Linear(2, 2)], "task 0: is a module|is a module"),
        (nn.ModuleList([nn.Linear(2, 2)]), "is a module"),
        ([[nn.Linear(2, 2)]], "task 0, parameter '0': is a module"),
        ([nn.Linear(2, 2).state_dict()], "state_dict"),
        (nn.Linear(2, 2).state_dict(), "state_dict"),
        ([[nn.Linear(2, 2).state_dict()]], "state_dict"),
    ],
)
def test_modules_and_state_dicts_are_named(tasks, message):
    with pytest.raises(TypeError, match=message):
        ShiftingMetaOptimizer(tasks)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "a._orig_mod."]
)
def test_torchs_wrappers_leave_no_trace_in_names(prefix):
    opt = ShiftingMetaOptimizer([[(f"{prefix}weight", nn.Parameter(torch.zeros(2)))]])
    assert list(opt.initialization_state_dict()) == ["a.weight" if prefix.startswith("a") else "weight"]
    opt = ShiftingMetaOptimizer([[("module.weight", nn.Parameter(torch.zeros(2)))]])
    assert list(opt.initialization_state_dict()) == ["module.weight"]


INTERRUPTED = """
import copy, signal, sys, torch
from cts_fast import ShiftingMetaOptimizer
backend = sys.argv[1]
torch.set_num_threads(1)
tasks = [[torch.nn.Parameter(torch.zeros(n)) for n in (3, 50_000, 7)] for _ in range(2)]
opt = ShiftingMetaOptimizer(tasks, lr=1.0, momentum=0.5, meta_lr=0.0, horizon=None, backend=backend)
for task in tasks:
    for p in task:
        p.grad = torch.ones_like(p)
steps = interrupts = 0
theta, v, expected = 0.0, 0.0, [0.0]
for _ in range(100):  # what a parameter is after so many steps
    v = 0.5 * v + 1
    theta -= v
    expected.append(theta)
armed = False
def interrupt(*_):
    if armed:
        raise KeyboardInterrupt
signal.signal(signal.SIGALRM, interrupt)
start = copy.deepcopy(opt.state_dict())
while interrupts < 150:
    if opt.inner_step > 90:
        opt.load_state_dict(start)
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + (steps * 7919 % 997) * 1.2e-6)
            while opt.inner_step <= 90:
                steps += 1
                opt.step()
        finally:
            armed = False
    except KeyboardInterrupt:
        interrupts += 1
    for p in tasks[0] + tasks[1]:
        assert torch.allclose(p, torch.tensor(expected[opt.inner_step])), (opt.inner_step, p[0].item())
        assert bool(opt.state[p]["momentum_started"]) == (opt.inner_step > 0)
print(interrupts, steps)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the native module is not built")
def test_a_keyboard_interrupt_leaves_a_step_done_or_not():
    result = subprocess.run([sys.executable, "-c", INTERRUPTED, "cpu"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("heads", [[nn.Linear(2, 2)], nn.ModuleList([nn.Linear(2, 2)]), [nn.Linear(2, 2).state_dict()]])
def test_modules_and_state_dicts_as_heads_are_named(heads):
    with pytest.raises(TypeError, match="heads, task 0: is a (module|dict)"):
        ShiftingMetaOptimizer([[nn.Parameter(torch.zeros(2))]], heads=heads)


@pytest.mark.parametrize("values", [None, 3, nn.Linear(2, 2), torch.zeros(2)], ids=lambda value: type(value).__name__)
def test_an_initialization_that_is_no_list_of_tensors_is_refused(values):
    opt = ShiftingMetaOptimizer([[nn.Parameter(torch.ones(2))]])
    with pytest.raises(ValueError, match="a list or a dict of tensors is needed"):
        opt.load_initialization(values)
    assert opt.initialization[0].eq(1).all()


def test_fake_tensors_are_refused():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        param = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="task 0, parameter '0': is a FakeTensor"):
        ShiftingMetaOptimizer([[param]])


def test_saving_through_a_wrapper_binds_it_to_nothing():
    problem, twin = Problem(meta_lr=0.25), Problem(meta_lr=0.25)
    wrapper = Wrapper(problem.opt)
    wrapper.state_dict()
    problem.step(), twin.step()
    problem.opt.state = {p: dict(entry) for p, entry in problem.opt.state.items()}
    problem.step(), twin.step()
    problem.gradients(), twin.gradients()
    wrapper.step(), twin.opt.step()
    assert_same(problem.values(), twin.values())
    seen = []
    problem.opt.register_state_dict_post_hook(lambda opt, state: seen.append(opt))
    problem.opt.state_dict()
    assert seen == [problem.opt]
