"""What holds for every method where training is not plain.

Scaled and broken gradients, mixed precision, and users who interfere.
"""

import signal

import pytest
import torch
from support.method_cases import Quadratics, assert_a_new_start, phi_of

from cts_fast.baselines import METHODS
from cts_fast.engine.step import unavailable

OPTIONS = dict(lr=0.05, momentum=0.5, meta_lr=0.2, horizon=3)
every_method = pytest.mark.parametrize("name", METHODS)
every_backend = pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
with_heldout = pytest.mark.parametrize("name", ["fomaml", "fomaml++", "imaml"])


def make(name, tasks, backend="torch", **options):
    if reason := unavailable(backend, torch.device("cpu"), torch.float64):
        pytest.skip(reason)
    return METHODS[name](tasks.params, backend=backend, **{**OPTIONS, **options})


@every_method
@every_backend
def test_scaled_gradients_are_unscaled(name, backend):
    plain, scaled = Quadratics(), Quadratics()
    opt, other = make(name, plain, backend), make(name, scaled, backend)
    other.grad_scale = torch.tensor(4.0)
    for _ in range(7):
        plain.step(opt)
        scaled.step(other, gradient_scale=4.0)
    torch.testing.assert_close(phi_of(other), phi_of(opt), rtol=1e-12, atol=1e-12)


@every_method
@every_backend
def test_a_gradient_that_is_not_finite_is_named(name, backend):
    tasks = Quadratics()
    opt = make(name, tasks, backend, nonfinite="raise")
    tasks.params[1][1].register_hook(lambda g: g * float("nan"))
    with pytest.raises(RuntimeError, match="task 1, parameter '1'"):
        tasks.step(opt)


@every_method
@every_backend
def test_parameters_of_two_precisions_train_together(name, backend):
    mixed, exact = Quadratics(), Quadratics()
    mixed.params = [[torch.nn.Parameter(task[0].detach().float()), task[1]] for task in mixed.params]
    opt, oracle = make(name, mixed, backend), make(name, exact, "reference")
    for _ in range(10):
        mixed.step(opt)
        exact.step(oracle)
    torch.testing.assert_close(phi_of(opt).double(), phi_of(oracle), rtol=1e-5, atol=1e-5)


@every_method
@every_backend
def test_a_theta_written_in_a_round_is_where_low_precision_goes_on(name, backend):
    low, exact = Quadratics(), Quadratics()
    low.params = [[torch.nn.Parameter(p.detach().bfloat16()) for p in task] for task in low.params]
    low.theta = lambda t: torch.cat([p.flatten() for p in low.params[t]]).double()
    options = {"lam": 5.0, "meta_lr": 1.0} if name == "imaml" else {}
    opt, oracle = make(name, low, backend, **options), make(name, exact, "reference", **options)
    for step in range(3):
        for tasks in (low, exact) if step == 1 else ():
            for p in (p for task in tasks.params for p in task):
                p.data.fill_(10.0)
        low.step(opt)
        exact.step(oracle)
    torch.testing.assert_close(phi_of(opt).double(), phi_of(oracle), rtol=0.05, atol=0.05)


@every_method
@every_backend
def test_loading_an_initialization_repairs_a_run_that_met_a_nan(name, backend):
    tasks, fresh = Quadratics(), Quadratics()
    opt, other = make(name, tasks, backend), make(name, fresh, backend)
    loss = tasks.loss
    for step in range(5):
        tasks.loss = lambda t, bad=step == 1: loss(t) * (float("nan") if bad else 1.0)
        tasks.step(opt)
    assert not phi_of(opt).isfinite().all()
    assert_a_new_start(opt, tasks, other, fresh)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random-shift"])  # which moves every coordinate
@every_backend
def test_a_frozen_parameter_is_a_constant_to_every_method(name, backend):
    frozen, constant = Quadratics(), Quadratics()
    for task in frozen.params:
        task[1].requires_grad_(False)
    held = torch.full((4,), 3.0, dtype=torch.float64)
    constant.params = [task[:1] for task in constant.params]
    constant.theta = lambda t: torch.cat([constant.params[t][0], held])
    opt, other = make(name, frozen, backend), make(name, constant, backend)
    for _ in range(7):
        frozen.step(opt)
        constant.step(other)
    torch.testing.assert_close(phi_of(opt), torch.cat([phi_of(other), held]), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(task[1].flatten(), held) for task in frozen.params)


FAULTS = (
    (lambda loss: loss.detach(), ValueError, "task 2: its heldout returned"),
    (lambda loss: loss * torch.ones(2), ValueError, "task 2: its heldout returned"),
    (lambda loss: next(iter(())), StopIteration, None),
    (lambda loss: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, None),
)


@with_heldout
@every_backend
@pytest.mark.parametrize(("broken", "error", "message"), FAULTS, ids=["detached", "vector", "empty", "interrupt"])
def test_where_a_heldout_fails_the_inner_step_counts_and_the_next_step_ends_the_round(
    name, backend, broken, error, message
):
    phi, ask = [], Quadratics.heldout
    for horizon, fails in ((2, True), (3, False)):
        tasks = Quadratics()
        opt = make(name, tasks, backend, horizon=horizon, momentum=0.9)
        tasks.step(opt)
        before = phi_of(opt).clone()
        if fails:
            tasks.heldout = lambda t, tasks=tasks: ask(tasks, t) if t < 2 else broken(ask(tasks, t))
            with pytest.raises(error, match=message):
                tasks.step(opt)
            del tasks.heldout
        else:
            tasks.step(opt)
        assert torch.equal(phi_of(opt), before) and (opt.inner_step, opt.round) == (2, 0)
        tasks.step(opt)
        assert (opt.inner_step, opt.round) == (0, 1)
        assert all(torch.equal(tasks.theta(t), phi_of(opt)) for t in range(3))
        phi.append(phi_of(opt).clone())
    assert name == "fomaml++" or torch.equal(*phi)  # where one of the held-out gradients is missing


@with_heldout
@every_backend
def test_a_theta_that_a_heldout_function_exchanges_is_phi_after_the_round(name, backend):
    tasks = Quadratics()
    opt = make(name, tasks, backend, horizon=1)

    def heldout(t, ask=tasks.heldout):
        for p in tasks.params[t]:
            p.data = p.detach().clone()
        return ask(t)

    tasks.heldout = heldout
    tasks.step(opt)
    assert all(torch.equal(tasks.theta(t), phi_of(opt)) for t in range(3))


@with_heldout
@every_backend
def test_a_graph_made_in_a_heldout_function_notices_the_end_of_the_round(name, backend):
    tasks, kept = Quadratics(), []
    opt = make(name, tasks, backend, horizon=1)

    def heldout(t, ask=tasks.heldout):
        kept.append(tasks.params[t][0].square().sum())
        return ask(t)

    tasks.heldout = heldout
    tasks.step(opt)
    for value in kept:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if getattr(kind, "once_a_round", False)])
@pytest.mark.parametrize("before", [0, 4])
def test_a_new_horizon_moves_the_meta_update_with_it(name, before):
    tasks = Quadratics()
    opt = make(name, tasks, horizon=6)
    for _ in range(before):
        tasks.step(opt)
    start = phi_of(opt).clone()
    for group in opt.param_groups:
        group["horizon"] = 3
    for _ in range(1 if before else 3):
        assert torch.equal(phi_of(opt), start) and opt.meta_updates == 0
        tasks.step(opt)
    assert not torch.equal(phi_of(opt), start) and (opt.inner_step, opt.round, opt.meta_updates) == (0, 1, 1)
    for group in opt.param_groups:
        group["horizon"] = None
    with pytest.raises(ValueError, match="meta_interval"):
        tasks.step(opt)
