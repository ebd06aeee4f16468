"""What only a GPU can show: graphs, streams, scalers, launches and synchronisations, and more than 2³¹ elements."""

import copy
import json
import signal
import warnings

import pytest
import torch
from support.image_tasks import make_suite, make_task
from torch import nn

from cts_fast import ShiftingMetaOptimizer
from cts_fast.baselines import METHODS
from cts_fast.engine.step import unavailable
from cts_fast.experiments.meta_train import MetaTrainer, MetaTrainSettings
from cts_fast.models.resnet20 import ResNet20

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
BACKENDS = []
if torch.cuda.is_available():
    BACKENDS = [name for name in ("cuda", "triton") if not unavailable(name, torch.device("cuda"), torch.float32)]
each = pytest.mark.parametrize("backend", BACKENDS)
OPTIONS = dict(lr=0.05, momentum=0.9, weight_decay=1e-3, meta_lr=0.1, horizon=5)


def make(backend, tasks=3, **options):
    """(nets, optimizer): small convolutional nets with heads of different sizes."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    )
    nets = [nn.Sequential(copy.deepcopy(body), nn.Linear(8 * 36, 4 + t)).cuda() for t in range(tasks)]
    bodies, heads = [net[0].named_parameters() for net in nets], [net[1].parameters() for net in nets]
    opt = ShiftingMetaOptimizer(bodies, heads=heads, backend=backend, **{**OPTIONS, **options})
    return nets, opt


def batches(step, tasks=3):
    draw = torch.Generator().manual_seed(step)
    return [
        (torch.randn(16, 3, 8, 8, generator=draw).cuda(), torch.randint(4, (16,), generator=draw).cuda())
        for _ in range(tasks)
    ]


def loss(net, x, y):
    return nn.functional.cross_entropy(net(x), y)


def train_eagerly(nets, opt, steps, before=lambda step: None):
    for step in range(steps):
        before(step)
        opt.zero_grad()
        for net, batch in zip(nets, batches(step), strict=True):
            loss(net, *batch).backward()
        opt.step()


def values(nets, opt):
    thetas = [p.detach().double() for net in nets for p in net.parameters()]
    return thetas + [phi.double() for phi in opt.initialization]


def random_gradients(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)


@each
def test_replays_of_the_whole_training_step_equal_eager_steps(backend, monkeypatch):
    from cts_fast.capture import CapturedStep

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else two eager runs differ too
    nets, opt = make(backend)
    train_eagerly(nets, opt, 12)
    captured_nets, captured = make(backend, capturable=True)
    step = CapturedStep(captured_nets, captured, loss)
    for i in range(12):
        step(batches(i))
    assert step.graph is not None and (captured.inner_step, captured.round, captured.meta_updates) == (2, 2, 12)
    for a, b in zip(values(nets, opt), values(captured_nets, captured), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_graphs_of_several_devices_lie_each_on_its_own():
    from cts_fast.capture import CapturedStep

    losses = []
    for device in ("cuda:0", "cuda:1"):
        nets = [nn.Linear(3, 2).to(device) for _ in range(2)]
        for net in nets:
            nn.init.constant_(net.weight, 0.5)
            nn.init.zeros_(net.bias)
        opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets], **OPTIONS, capturable=True)
        step = CapturedStep(nets, opt, loss)
        x, y = torch.eye(3, device=device), torch.arange(3, device=device) % 2
        losses.append(torch.stack([step([(x, y)] * 2) for _ in range(7)]).cpu())
        assert opt.round == 1 and opt.inner_step == 2
    torch.testing.assert_close(*losses)


def test_a_graph_takes_no_rate_from_the_host():
    from cts_fast.capture import CapturedStep

    nets = [nn.Linear(3, 2).cuda() for _ in range(2)]
    opt = ShiftingMetaOptimizer([net.named_parameters() for net in nets], **OPTIONS, capturable=True)
    opt.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(ValueError, match="lr is a tensor on cpu, of which a CUDA graph keeps the number: put it on"):
        CapturedStep(nets, opt, loss)


@each
def test_a_captured_step_equals_eager_ones_while_lr_changes(backend):
    nets, eager = make(backend, horizon=4)
    lr = torch.tensor(0.05, device="cuda")
    twins, captured = make(backend, horizon=4, lr=lr, capturable=True)
    random_gradients(eager)
    eager_params = [p for g in eager.param_groups for p in g["params"]]
    captured_params = [p for g in captured.param_groups for p in g["params"]]
    for p, q in zip(eager_params, captured_params, strict=True):
        q.grad = p.grad.clone()
    rates = [0.05, 0.1, 0.02, 0.3, 0.01, 0.2]
    graph = None
    for rate in rates:
        for group in eager.param_groups:
            group["lr"] = torch.tensor(rate).item()
        eager.step()
        lr.fill_(rate)
        if graph is None:
            captured.step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured.step()
        else:
            graph.replay()
        for p, q in zip(eager_params, captured_params, strict=True):
            assert torch.equal(p, q)
    assert captured.inner_step == 2 and captured.round == 1


@each
def test_the_step_runs_on_the_current_stream(backend):
    nets, opt = make(backend)
    twins, other = make(backend)
    random_gradients(opt)
    params, twin_params = ([p for g in o.param_groups for p in g["params"]] for o in (opt, other))
    for p, q in zip(params, twin_params, strict=True):
        q.grad = p.grad.clone()
    opt.step()
    opt.step()
    other.step()  # what is made and sent once
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        other.step()
        done = torch.cuda.Event()
        done.record()
        assert not done.query()  # it waits its turn behind the sleep, and the host does not wait at all
    torch.cuda.synchronize()
    for p, q in zip(params, twin_params, strict=True):
        assert torch.equal(p, q)


@each
@pytest.mark.parametrize("capturable", [False, True])
def test_a_gradient_scaler_unscales_in_the_kernel_and_skips_overflows(backend, capturable):
    nets, opt = make(backend, capturable=capturable, nonfinite="ignore")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    before = None
    for step in range(3):
        opt.zero_grad()
        for net, batch in zip(nets, batches(step), strict=True):
            scaler.scale(loss(net, *batch)).backward()
        if step == 1:
            nets[0][0][0].weight.grad[0] = float("inf")
            before = values(nets, opt)
        scaler.step(opt)
        if step == 1:
            after = values(nets, opt)
            params = len(list(nets[0].parameters())) * len(nets)
            assert all(torch.equal(a, b) for a, b in zip(before[:params], after[:params], strict=True))
        scaler.update()
    assert opt.inner_step == 2


@each
def test_the_device_guard_leaves_the_current_device_alone(backend):
    nets, opt = make(backend)
    random_gradients(opt)
    current = torch.cuda.current_device()
    opt.step()
    assert torch.cuda.current_device() == current


@each
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("capturable", [False, True])
def test_networks_on_another_device_than_the_current_one_step_there(backend, capturable):
    here, there = (
        [[nn.Parameter(torch.ones(300, device=device))] for _ in range(3)] for device in ("cuda:0", "cuda:1")
    )
    for tasks in (here, there):
        opt = ShiftingMetaOptimizer(tasks, **OPTIONS, backend=backend, capturable=capturable)
        for step in range(7):
            for t, (p,) in enumerate(tasks):
                p.grad = torch.full_like(p, 0.1 * t + step)
            opt.step()
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(p.cpu(), q.cpu()) for (p,), (q,) in zip(here, there, strict=True))


@each
def test_a_step_with_unchanged_pointers_is_one_launch_without_copies_or_synchronisations(backend):
    nets, opt = make(backend)
    random_gradients(opt)
    for _ in range(3):
        opt.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        opt.step()
        torch.cuda._sleep(1000)  # so that a profile of nothing is not taken for one of no launches
    torch.cuda.synchronize()
    # torch labels the time of a step on the device too
    events = [event for event in profile.events() if not event.is_user_annotation]
    device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in device if "shifting_step" in name]
    asleep = [name for name in device if "spin" in name or "sleep" in name.lower()]
    others = [name for name in device if name not in kernels and name not in asleep]
    host = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    assert len(kernels) == 1 and others == []
    waits = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpyAsync"}
    assert waits.intersection(host) == set()


@each
def test_a_host_wait_is_never_needed(backend):
    nets, opt = make(backend)
    random_gradients(opt)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
        random_gradients(opt)  # at other addresses
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(run):
    """How often the host waits for the device meanwhile."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


@each
def test_the_host_waits_once_a_round(backend):
    nets, opt = make(backend)
    random_gradients(opt)
    for _ in range(5):
        opt.step()
    assert opt.inner_step == 0
    assert [waits(opt.step) for _ in range(7)] == [1, 0, 0, 0, 0, 1, 0]


@each
@pytest.mark.parametrize("nonfinite", ["ignore", "skip"])
def test_a_capturable_step_never_waits(backend, nonfinite):
    nets, opt = make(backend, lr=torch.tensor(0.05, device="cuda"), capturable=True, nonfinite=nonfinite)
    random_gradients(opt)
    opt.found_inf, opt.grad_scale = torch.zeros(1, device="cuda"), torch.ones(1, device="cuda")
    opt.step()
    assert [waits(opt.step) for _ in range(7)] == [0] * 7
    assert (opt.round, opt.inner_step) == (1, 3)


@each
@pytest.mark.parametrize("capturable", [False, True])
def test_a_table_larger_than_a_launch_holds_waits_for_nobody_and_can_be_captured(backend, capturable):
    def params():
        # 72 kB of addresses
        return [[nn.Parameter(torch.ones(1, device="cuda")) for _ in range(300)] for _ in range(30)]

    tasks, twins = params(), params()
    opt, other = (ShiftingMetaOptimizer(p, **OPTIONS, backend=backend, capturable=capturable) for p in (tasks, twins))
    random_gradients(opt)
    kept = []

    def renew():  # the same gradients at other addresses
        for task, twin in zip(tasks, twins, strict=True):
            for p, q in zip(task, twin, strict=True):
                kept.append(q.grad)
                q.grad = p.grad.clone()

    for _ in range(4):
        opt.step()
    for _ in range(2):  # what is sent twice has its pinned memory
        renew()
        other.step()
    renew()
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)
    other.step()
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    if capturable:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            other.step()
        graph.replay()
    else:
        other.step()
    for task, twin in zip(tasks, twins, strict=True):
        for p, q in zip(task, twin, strict=True):
            assert torch.equal(p, q)


@each
def test_a_graph_holds_more_addresses_than_4_kilobytes(backend):
    tasks, twins = (
        [[nn.Parameter(torch.ones(5 + i % 3, device="cuda")) for i in range(100)] for _ in range(8)] for _ in range(2)
    )
    opt, other = (ShiftingMetaOptimizer(p, **OPTIONS, backend=backend, capturable=True) for p in (tasks, twins))
    random_gradients(opt)
    for task, twin in zip(tasks, twins, strict=True):
        for p, q in zip(task, twin, strict=True):
            q.grad = p.grad.clone()
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        other.step()
    for _ in range(6):  # over a reset
        graph.replay()
    for _ in range(7):
        opt.step()
    assert (opt.round, opt.inner_step) == (other.round, other.inner_step) == (1, 2)
    for task, twin in zip(tasks, twins, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(task, twin, strict=True))


TRAIN = MetaTrainSettings(horizon=4, rounds=2, batch_size=16, padding=1)


def trainer(**options):
    tasks = [make_task("a"), make_task("b", classes=5, channels=3, seed=1), make_task("c", classes=6, seed=2)]
    options = {"make_net": ResNet20, "meta_lr": 0.1, "seed": 0, "device": "cuda", **options}
    return MetaTrainer(METHODS["cts"], tasks, TRAIN, **options)


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("streams", [1, 2, 8])
def test_captured_training_equals_eager_training_with_its_resets_and_snapshots(streams, deterministic):
    eager, captured = trainer(), trainer(capture=True, streams=streams)
    for _ in range(TRAIN.steps):
        losses = eager.train_step(), captured.train_step()
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        for name, phi in eager.initialization.items():  # what a snapshot keeps
            torch.testing.assert_close(captured.initialization[name], phi, rtol=1e-4, atol=1e-5)
    assert (captured.optimizer.round, captured.optimizer.inner_step) == (2, 0) and captured.captured.graph is not None
    counts = [
        [m.num_batches_tracked.item() for m in net.modules() if isinstance(m, nn.BatchNorm2d)] for net in captured.nets
    ]
    assert all(count == TRAIN.steps for net in counts for count in net)


def test_a_captured_step_leaves_cudnns_flags_as_the_user_set_them(monkeypatch):
    from cts_fast.capture import CapturedStep

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    seen = []

    def watched(net, x, y):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
        return loss(net, x, y)

    nets, opt = make(BACKENDS[0], capturable=True)
    CapturedStep(nets, opt, watched, benchmark=True)(batches(0))
    assert seen == [(False, True)] * 3 and not torch.backends.cudnn.benchmark
    with pytest.raises(ValueError, match="2 tasks"):
        CapturedStep(nets, opt, loss)(batches(0)[:2])


@pytest.mark.parametrize("capture", [False, True])
def test_training_goes_on_exactly_from_a_checkpoint_that_was_written_on_the_gpu(capture, deterministic, tmp_path):
    whole, first, second = (trainer(capture=capture) for _ in range(3))
    expected = [whole.train_step() for _ in range(TRAIN.steps)][5:]
    for _ in range(5):  # into the second round
        first.train_step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu"))
    got = [second.train_step() for _ in range(TRAIN.steps - 5)]
    assert torch.equal(torch.stack(expected), torch.stack(got))
    for name, phi in whole.initialization.items():
        assert torch.equal(second.initialization[name], phi)


def test_the_program_resumes_on_the_gpu_what_it_was_stopped_in(deterministic, tmp_path, monkeypatch):
    from cts_fast.data import suite
    from cts_fast.examples import resnet20

    monkeypatch.setitem(suite.SUITES, "tiny", make_suite)
    arguments = "--suite tiny --horizon 3 --rounds 2 --test-steps 2 --test-seeds 2 --methods cts --device cuda".split()
    assert resnet20.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    step = MetaTrainer.train_step

    def stopped_in_the_middle(self):
        if self.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(MetaTrainer, "train_step", stopped_in_the_middle)
        assert resnet20.main([*arguments, "--out", str(tmp_path / "stopped")]) == 130
    assert resnet20.main([*arguments, "--out", str(tmp_path / "stopped"), "--resume"]) == 0
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "stopped")]
    assert results[0] == results[1]


@each
def test_more_elements_than_32_bits_can_count(backend):
    count = (1 << 31) + 1000
    if torch.cuda.mem_get_info()[0] < 14 * count * 2:  # 9 are kept, the rest is of the construction
        pytest.skip("not enough free memory")
    param = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.zeros_like(param)
    ends = torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, count - 1], device="cuda")
    param.grad[ends] = 1.0
    opt = ShiftingMetaOptimizer([[param]], lr=0.5, meta_lr=0.0, horizon=None, backend=backend)
    opt.step()
    assert (param.detach()[ends] == -0.5).all() and int((param.detach() != 0).sum()) == len(ends)


@each
def test_a_graph_survives_new_gradients_of_eager_steps(backend):
    nets, opt = make(backend, capturable=True)
    random_gradients(opt)
    opt.step()
    kept = [p.grad for g in opt.param_groups for p in g["params"]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    random_gradients(opt)
    opt.step()  # other pointers
    before = opt.inner_step
    graph.replay()
    assert opt.inner_step == (before + 1) % OPTIONS["horizon"] and len(kept) > 0
