"""What holds for every method of the registry."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from support.method_cases import Quadratics, assert_a_new_start, given, phi_of

from cts_fast import ShiftingMetaOptimizer
from cts_fast.baselines import METHODS
from cts_fast.engine.step import unavailable

OPTIONS = dict(lr=0.05, momentum=0.5, meta_lr=0.2, horizon=6)
ROUND = ("reptile", "fomaml", "fomaml++", "imaml", "leap")  # one meta-update a round
BAD_OPTIONS = [{"lr": -1}, {"meta_lr": float("nan")}, {"horizon": 0}, {"momentum": -0.1}, {"backend": "none"}]
BAD_OPTIONS_OF_ONE = [
    ("imaml", {"cg_steps": 0}),
    ("imaml", {"lam": 0.0}),
    ("leap", {"measure": "width"}),
    ("random-shift", {"seed": -1}),
    ("no-shift", {"shift": 0.5}),
    ("cts-accurate", {"meta_interval": 3}),
]
NAMES = "cts reptile fomaml fomaml++ imaml leap mtl no-shift random-shift cts-accurate".split()
every_method = pytest.mark.parametrize("name", METHODS)


def make(name, tasks, **options):
    return METHODS[name](tasks.params, **{**OPTIONS, **options})


@every_method
def test_meta_training_on_convex_tasks_lowers_the_mean_loss_at_phi(name):
    tasks = Quadratics()
    opt = make(name, tasks)
    before = tasks.mean_loss_at(phi_of(opt))
    for _ in range(20 * 6):
        tasks.step(opt)
    assert tasks.mean_loss_at(phi_of(opt)) < 0.7 * before


@every_method
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_backend_takes_every_method_as_the_reference_does(name, backend):
    if reason := unavailable(backend, torch.device("cpu"), torch.float64):
        pytest.skip(reason)
    tasks, exact = Quadratics(tasks=9), Quadratics(tasks=9)
    opt, oracle = make(name, tasks, backend=backend), make(name, exact, backend="reference")
    for _ in range(15):
        tasks.step(opt)
        exact.step(oracle)
    torch.testing.assert_close(phi_of(opt), phi_of(oracle), rtol=1e-10, atol=1e-12)
    for t in range(9):
        torch.testing.assert_close(tasks.theta(t), exact.theta(t), rtol=1e-10, atol=1e-12)


@every_method
def test_the_order_of_tasks_does_not_matter(name):
    tasks, permuted = Quadratics(), Quadratics()
    order = [2, 0, 1]
    opt, other = make(name, tasks), METHODS[name]([permuted.params[t] for t in order], **OPTIONS)
    for _ in range(20):
        tasks.step(opt)
        permuted.step(other, order)
    torch.testing.assert_close(phi_of(other), phi_of(opt), rtol=1e-10, atol=1e-12)
    for t in range(3):
        torch.testing.assert_close(permuted.theta(t), tasks.theta(t), rtol=1e-10, atol=1e-12)


@every_method
@pytest.mark.parametrize("steps", [4, 6, 9])
def test_a_resumed_run_continues_bit_for_bit(name, steps):
    tasks, resumed = Quadratics(), Quadratics()
    opt = make(name, tasks)
    for _ in range(steps):
        tasks.step(opt)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    other = make(name, resumed, lr=0.9)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(11):
        assert tasks.step(opt) == resumed.step(other)
    assert torch.equal(phi_of(opt), phi_of(other))
    assert all(torch.equal(tasks.theta(t), resumed.theta(t)) for t in range(3))
    assert (opt.inner_step, opt.round, opt.meta_updates) == (other.inner_step, other.round, other.meta_updates)


@every_method
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_as_the_original(name, copied):
    tasks = Quadratics()
    opt = make(name, tasks)
    for _ in range(4):
        tasks.step(opt)
    other, other_tasks = copied((opt, tasks))
    for _ in range(5):
        tasks.step(opt)
        other_tasks.step(other)
    assert torch.equal(phi_of(opt), phi_of(other))


@every_method
def test_nothing_moves_without_gradients(name):
    tasks = Quadratics()
    opt = make(name, tasks)
    tasks.step(opt)
    before = copy.deepcopy(opt.state_dict()["state"])
    opt.zero_grad()
    opt.step(**given(opt, [0.0] * 3, [lambda: 0.0] * 3))
    torch.testing.assert_close(opt.state_dict()["state"], before, rtol=0, atol=0)


@every_method
def test_heads_take_the_inner_step_alone(name):
    tasks = Quadratics()
    heads = [[torch.nn.Parameter(torch.full((t + 1,), 2.0, dtype=torch.float64))] for t in range(3)]
    alone = [head[0].detach().clone().requires_grad_() for head in heads]
    opt = make(name, tasks, heads=heads)
    sgd = torch.optim.SGD(alone, lr=0.05, momentum=0.5)
    for _ in range(15):
        for loss in [head[0].square().sum() for head in heads] + [head.square().sum() for head in alone]:
            loss.backward()
        for t in range(3):
            tasks.loss(t).backward()
        losses = [tasks.loss(t).detach() for t in range(3)]
        opt.step(**given(opt, losses, [lambda t=t: tasks.heldout(t) for t in range(3)]))
        sgd.step()
        opt.zero_grad()
        sgd.zero_grad()
    assert len(opt.initialization) == 2
    assert all(torch.equal(head[0], one) for head, one in zip(heads, alone, strict=True))


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_method_runs_in_every_precision(name, dtype):
    exact, tasks = Quadratics(), Quadratics()
    tasks.params = [[torch.nn.Parameter(p.detach().to(dtype)) for p in task] for task in tasks.params]
    tasks.theta = lambda t: torch.cat([p.flatten() for p in tasks.params[t]]).double()
    opt, oracle = make(name, tasks), make(name, exact)
    for _ in range(12):
        tasks.step(opt)
        exact.step(oracle)
    assert opt.initialization[0].dtype == torch.float32
    atol = 0.05 if dtype != torch.float32 else 1e-4
    torch.testing.assert_close(phi_of(opt).double(), phi_of(oracle), rtol=0.05, atol=atol)


COUPLE_COORDINATES = ("leap", "random-shift", "imaml")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in COUPLE_COORDINATES])
def test_two_groups_with_their_own_rates_equal_two_optimizers_in_one_dimension_each(name):
    results = []
    for split in (True, False):
        p = [[torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)] for _ in range(2)]
        rates = [{"lr": 0.1 * (i + 1), "meta_lr": 0.3 * (i + 1)} for i in range(2)]
        groups = [{"params": [[task[i]] for task in p], **rates[i]} for i in range(2)]
        opts = [METHODS[name](groups, horizon=2)] if split else [METHODS[name]([group], horizon=2) for group in groups]
        for _ in range(5):
            for t, task in enumerate(p):
                ((task[0] - t).square().sum() + 2 * (task[1] - t).square().sum()).backward()
            heldout = [lambda a=a, b=b: (a + 1).square().sum() + (b + 2).square().sum() for a, b in p]
            for opt in opts:
                opt.step(**given(opt, [0.0] * 2, heldout))
            for task in p:
                task[0].grad = task[1].grad = None
        results.append(torch.cat([phi_of(opt) for opt in opts]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@every_method
def test_loading_an_initialization_starts_the_round_anew(name):
    tasks, fresh = Quadratics(), Quadratics()
    opt, other = make(name, tasks), make(name, fresh)
    for _ in range(4):
        tasks.step(opt)
    assert_a_new_start(opt, tasks, other, fresh)


@every_method
def test_adding_a_group_keeps_what_the_method_has_gathered(name):
    tasks, other_tasks = Quadratics(), Quadratics()
    opt, other = make(name, tasks), make(name, other_tasks)
    for i in range(6):
        if i == 3:
            heads = [[torch.zeros(2, dtype=torch.float64)] for _ in range(3)]
            other.add_param_group({"params": heads, "shared": False})
        tasks.step(opt)
        other_tasks.step(other)
    assert torch.equal(phi_of(opt), phi_of(other))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random-shift"])  # it moves every coordinate
def test_shared_parameters_added_in_a_round_and_not_trained_change_nothing(name):
    tasks, other_tasks = Quadratics(), Quadratics()
    opt, other = make(name, tasks), make(name, other_tasks)
    added = [[torch.full((2,), 5.0, dtype=torch.float64)] for _ in range(3)]
    for i in range(8):
        if i == 3:
            opt.add_param_group({"params": added})
        tasks.step(opt)
        other_tasks.step(other)
    assert torch.equal(phi_of(opt), torch.cat([phi_of(other), added[0][0]])) and (added[0][0] == 5).all()


@every_method
def test_missing_or_wrong_needs_raise_before_anything_moves(name):
    tasks = Quadratics()
    opt = make(name, tasks)
    for t in range(3):
        tasks.loss(t).backward()
    before = phi_of(opt), tasks.theta(0)
    losses, heldout = [1.0] * 3, [lambda: tasks.heldout(0)] * 3
    for name in opt.needs:
        with pytest.raises(ValueError, match=f"needs {name}"):
            opt.step()
        with pytest.raises(ValueError, match="of 2 tasks given, but there are 3"):
            opt.step(**{**given(opt, losses, heldout), name: given(opt, losses, heldout)[name][:2]})
    if "losses" in opt.needs:
        with pytest.raises(ValueError, match="task 1: its loss has the shape"):
            opt.step(losses=[1.0, torch.ones(2), 1.0])
        with pytest.raises(TypeError, match="task 2: its loss is None"):
            opt.step(losses=[1.0, 1.0, None])
    if "heldout" in opt.needs:
        with pytest.raises(ValueError, match="task 0: its heldout is 1.0"):
            opt.step(heldout=[1.0] * 3)
    assert opt.needs <= {"losses", "heldout"}
    assert torch.equal(before[0], phi_of(opt)) and torch.equal(before[1], tasks.theta(0)) and opt.inner_step == 0


FORMS = {
    "tensor": torch.stack,
    "numpy": lambda losses: torch.stack(losses).numpy(),
    "generator": lambda losses: (loss for loss in losses),
    "values": lambda losses: dict(enumerate(losses)).values(),
}


@pytest.mark.parametrize("form", FORMS)
def test_losses_in_any_form_are_those_in_a_list(form):
    results = []
    for given_as in (list, FORMS[form]):
        tasks = Quadratics()
        opt = make("leap", tasks)
        for _ in range(6):
            opt.zero_grad()
            losses = [tasks.loss(t) for t in range(3)]
            sum(losses).backward()
            opt.step(losses=given_as([loss.detach() for loss in losses]))
        results.append(phi_of(opt))
    assert torch.equal(*results)


def test_a_closure_may_fill_the_losses_that_step_was_given():
    tasks, plain = Quadratics(), Quadratics()
    opt, other = make("leap", tasks), make("leap", plain)
    losses = []

    def closure():
        opt.zero_grad()
        losses[:] = [tasks.loss(t) for t in range(3)]
        sum(losses).backward()
        return sum(losses).item()

    for _ in range(6):
        opt.step(closure, losses=losses)
        plain.step(other)
    assert torch.equal(phi_of(opt), phi_of(other))


@pytest.mark.parametrize("name", ["losses", "heldout"])
@pytest.mark.parametrize(
    "given", [lambda: 0.0, torch.tensor(1.0), {0: 1.0, 1: 2.0, 2: 3.0}], ids=["one", "0-d", "dict"]
)
def test_needs_that_are_no_list_of_the_tasks_raise(name, given):
    tasks = Quadratics()
    opt = make("leap" if name == "losses" else "fomaml", tasks)
    tasks.loss(0).backward()
    with pytest.raises(TypeError, match=f"{name} are .*; give a list with one for each"):
        opt.step(**{name: given})
    assert opt.inner_step == 0 and torch.equal(tasks.theta(0), phi_of(opt))


@every_method
@pytest.mark.parametrize("bad", BAD_OPTIONS)
def test_bad_options_raise(name, bad):
    with pytest.raises(ValueError):
        make(name, Quadratics(), **bad)


@every_method
def test_unknown_options_raise(name):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        make(name, Quadratics(), sped=0.5)


@pytest.mark.parametrize("name", ROUND)
def test_methods_of_whole_rounds_need_a_horizon(name):
    with pytest.raises(ValueError, match="give a horizon"):
        make(name, Quadratics(), horizon=None)
    with pytest.raises(ValueError, match="not every 2 steps"):
        make(name, Quadratics(), meta_interval=2)


@pytest.mark.parametrize(("name", "bad"), BAD_OPTIONS_OF_ONE)
def test_bad_options_of_one_method_raise(name, bad):
    with pytest.raises(ValueError, match="not every 3 steps" if "meta_interval" in bad else next(iter(bad))):
        make(name, Quadratics(), **bad)


SET_LATER = [
    ("imaml", "lam", 0.0),
    ("imaml", "cg_steps", 0),
    ("leap", "measure", "lenght"),
    ("random-shift", "seed", -1),
    ("mtl", "horizon", 0),
    ("cts-accurate", "horizon", 0),
]


@pytest.mark.parametrize(("name", "option", "value"), SET_LATER)
def test_a_bad_value_that_is_set_later_raises_at_the_next_step_before_anything_moves(name, option, value):
    tasks = Quadratics()
    opt = make(name, tasks)
    tasks.step(opt)
    before = copy.deepcopy(opt.state_dict()["state"])
    opt.param_groups[0][option] = value
    with pytest.raises(ValueError, match=f"Invalid {option}"):
        tasks.step(opt)
    torch.testing.assert_close(opt.state_dict()["state"], before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "option"), [("imaml", "cg_steps"), ("random-shift", "seed")])
def test_whole_numbers_of_numpy_are_whole_numbers(name, option):
    opt = make(name, Quadratics(), **{option: np.int64(7)})
    assert type(opt.param_groups[0][option]) is int and opt.param_groups[0][option] == 7


@pytest.mark.parametrize("name", ["no-shift", "random-shift"])
def test_a_shift_of_a_group_or_of_another_methods_state_dict_raises_before_anything_moves(name):
    tasks = Quadratics()
    opt = make(name, tasks)
    opt.load_state_dict({**opt.state_dict(), "param_groups": make("cts", Quadratics()).state_dict()["param_groups"]})
    other = METHODS[name]([{"params": Quadratics().params, "shift": 0.5}])
    before = phi_of(opt), tasks.theta(0)
    for one, shift in ((opt, 1.0), (other, 0.5)):
        one.param_groups[0]["params"][0].grad = torch.ones(3, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"shift is 0 by definition, but shift={shift} was given, in group 0"):
            one.step()
    assert torch.equal(before[0], phi_of(opt)) and torch.equal(before[1], tasks.theta(0))


def test_the_registry_has_the_names_of_the_command_line():
    assert list(METHODS) == NAMES and METHODS["cts"] is ShiftingMetaOptimizer
    assert all(issubclass(method, ShiftingMetaOptimizer) for method in METHODS.values())
