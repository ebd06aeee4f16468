"""Batches, the meta-training loop and the meta-test."""

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.image_tasks import make_task
from support.nets import SmallNet

from cts_fast.baselines import METHODS
from cts_fast.distributed.launch import ALONE
from cts_fast.experiments.batches import TaskBatches, draw_together, normalize, resize, task_seed
from cts_fast.experiments.checkpoint import Checkpoints
from cts_fast.experiments.meta_test import MetaTester, MetaTestSettings, balanced_subset
from cts_fast.experiments.meta_train import MetaTrainer, MetaTrainSettings, logits, loss, new_net, seed_draws
from cts_fast.experiments.parallel import task_map
from cts_fast.experiments.signals import Stop
from cts_fast.experiments.statistics import mean_and_interval
from cts_fast.experiments.training import Diverged, Training
from cts_fast.models.batch_counts import BatchCounts
from cts_fast.models.resnet20 import ResNet20
from cts_fast.models.task_net import TaskNet

SETTINGS = MetaTrainSettings(horizon=2, rounds=2, batch_size=4, padding=1, held_back=0.2)


def make_trainer(method="cts", tasks=None, settings=SETTINGS, **options):
    method = METHODS[method] if isinstance(method, str) else method
    if tasks is None:
        tasks = [make_task("a"), make_task("b", classes=5, channels=3, seed=1)]
    return MetaTrainer(method, tasks, settings, **{"make_net": ResNet20, "meta_lr": 0.1, "seed": 0, **options})


def make_tester(task, settings):
    return MetaTester(task, settings, make_net=ResNet20)


def numbers(count=10, channels=1, side=4):
    """Image i is i everywhere."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, channels, side, side).contiguous()


# Batches


def test_every_epoch_holds_every_image_once():
    stream = TaskBatches(numbers(10), torch.arange(10), 4, seed=0)
    seen = torch.cat([next(stream)[1] for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_a_batch_larger_than_the_task_repeats_images():
    _, labels = next(TaskBatches(numbers(3), torch.arange(3), 7, seed=0))
    assert sorted(labels[:3].tolist()) == sorted(labels[3:6].tolist()) == [0, 1, 2]


def test_images_keep_their_labels_and_are_normalised_to_three_channels_last():
    x, y = next(TaskBatches(numbers(10), torch.arange(10), 10, seed=0, padding=0))
    assert x.shape == (10, 3, 4, 4) and x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x, (y / 127.5 - 1)[:, None, None, None].expand_as(x))


def test_crops_move_by_up_to_the_padding_and_flips_mirror():
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    crops = {tuple(padded[0, 0, r : r + 5, c : c + 5].flatten().tolist()) for r in range(3) for c in range(3)}
    mirrored = {
        tuple(padded.flip(-1)[0, 0, r : r + 5, c : c + 5].flatten().tolist()) for r in range(3) for c in range(3)
    }
    for flip, expected in ((False, crops), (True, crops | mirrored)):
        x, _ = next(TaskBatches(image, torch.zeros(1, dtype=torch.int64), 400, seed=0, padding=1, flip=flip))
        pixels = ((x[:, 0] + 1) * 127.5).round().int().flatten(1).tolist()
        assert set(map(tuple, pixels)) == expected


def test_a_batch_is_made_of_its_draw_alone_and_draws_of_all_tasks_lie_together():
    streams = [TaskBatches(numbers(10 + i), torch.arange(10 + i), 4, seed=i, padding=1, flip=i > 0) for i in range(3)]
    twins = [TaskBatches(numbers(10 + i), torch.arange(10 + i), 4, seed=i, padding=1, flip=i > 0) for i in range(3)]
    for _ in range(4):
        drawn = draw_together(streams)
        assert drawn.shape == (3, 4, 4) and drawn.dtype == torch.int64
        for stream, twin, one in zip(streams, twins, drawn, strict=True):
            for a, b in zip(stream.batch(one), next(twin), strict=True):
                assert torch.equal(a, b)


def test_batch_norms_that_are_counted_together_count_as_they_do_alone():
    def made():
        torch.manual_seed(0)
        kinds = [torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3, momentum=None)]
        return [torch.nn.Sequential(*kinds, torch.nn.BatchNorm2d(3, track_running_stats=False)) for _ in range(2)]

    alone, together = made(), made()
    alone[1][0].eval(), together[1][0].eval()  # a frozen layer counts nothing
    counts = BatchCounts(together)
    for step in range(3):
        x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))
        with counts.together():
            results = [net(x) for net in together]
        for net, result in zip(alone, results, strict=True):
            assert torch.equal(net(x), result)
    for a, b in zip(alone, together, strict=True):
        assert a.state_dict().keys() == b.state_dict().keys()
        assert all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())


def test_batch_norms_that_need_their_own_counter_keep_it():
    shared = torch.nn.BatchNorm2d(3)
    nets = [
        torch.nn.Sequential(shared, torch.nn.BatchNorm2d(3)),
        torch.nn.Sequential(shared, torch.nn.SyncBatchNorm(3)),
    ]
    counts = BatchCounts(nets)
    assert counts.layers == [nets[0][1]]
    with counts.together():
        assert nets[1][1].num_batches_tracked is not None
        for net in (nets[0], nets[1][:1]):
            net(torch.randn(4, 3, 2, 2))
    assert (shared.num_batches_tracked, nets[0][1].num_batches_tracked) == (2, 1)


def test_bf16_keeps_parameters_gradients_and_statistics_in_float32_and_learns_about_the_same():
    full, half = make_trainer(), make_trainer(precision="bf16")
    for _ in range(4):
        torch.testing.assert_close(full.train_step(), half.train_step(), rtol=0.05, atol=0.05)
    for net in half.nets:
        assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32, torch.int64}
        assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    assert {phi.dtype for phi in half.optimizer.initialization} == {torch.float32}
    x = torch.randn(2, 3, 8, 8)
    assert logits(half.nets[0], x, "bf16").dtype == torch.float32
    assert not torch.equal(logits(half.nets[0], x, "bf16"), logits(half.nets[0], x))
    assert loss(half.nets[0], x, torch.tensor([0, 1]), "bf16").requires_grad


def test_a_network_is_made_alike_while_another_thread_seeds_what_its_own_draws():
    threads = []

    def disturbed(classes):
        threads.append(threading.Thread(target=seed_draws, args=(5,)))
        threads[-1].start()
        threads[-1].join(0.1)
        return ResNet20(classes)

    net, alone = new_net(disturbed, 3, seed=0, head="x"), new_net(ResNet20, 3, seed=0, head="x")
    for thread in threads:
        thread.join()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in alone.state_dict().items())


def test_a_stream_goes_on_exactly_from_its_state():
    make = lambda: TaskBatches(numbers(10), torch.arange(10), 4, seed=3, padding=2, flip=True)  # noqa: E731
    first, second = make(), make()
    for _ in range(3):
        next(first)
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        for a, b in zip(next(first), next(second), strict=True):
            assert torch.equal(a, b)


def test_a_stream_refuses_the_state_of_another_task():
    stream = TaskBatches(numbers(10), torch.arange(10), 4, seed=0)
    next(stream)
    with pytest.raises(ValueError, match="10 images, this task has 9"):
        TaskBatches(numbers(9), torch.arange(9), 4, seed=0).load_state_dict(stream.state_dict())


def test_a_task_without_images_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        TaskBatches(numbers(0), torch.arange(0), 4, seed=0)


def test_resize_keeps_uint8_and_a_constant_image():
    assert torch.equal(resize(numbers(10, side=9), 6), numbers(10, side=6))
    images = numbers(3)
    assert resize(images, None) is images and resize(images, 4) is images


def test_black_is_minus_one_and_white_is_one():
    assert (
        normalize(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)).flatten().tolist() == [-1] * 3 + [1] * 3
    )


def test_seeds_depend_on_every_name():
    assert len({task_seed(0, "a"), task_seed(1, "a"), task_seed(0, "b"), task_seed(0, "a", "b")}) == 4


# Meta-training


def test_every_method_starts_at_the_same_phi_and_heads_and_sees_the_same_batches():
    one, other = make_trainer("cts"), make_trainer("reptile")
    for a, b in zip(one.nets, other.nets, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    for a, b in zip(one.batches, other.batches, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(next(a), next(b), strict=True))


def test_what_a_method_draws_depends_on_the_seed():
    trainers = [make_trainer("random-shift", seed=seed) for seed in (0, 1, -1)]
    assert len({trainer.optimizer.param_groups[0]["seed"] for trainer in trainers}) == 3
    trainers[-1].train_step()


def test_the_body_depends_on_the_seed_alone():
    nets = [
        new_net(ResNet20, 3, seed=0, head="a"),
        new_net(ResNet20, 5, seed=0, head="b"),
        new_net(ResNet20, 3, seed=1, head="a"),
    ]
    bodies = [torch.cat([p.detach().reshape(-1) for p in net.body.parameters()]) for net in nets]
    assert torch.equal(bodies[0], bodies[1]) and not torch.equal(bodies[0], bodies[2])


def test_any_network_with_a_body_and_a_head_is_meta_trained_and_meta_tested():
    def make_net(num_classes):
        return TaskNet(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()), 48, num_classes)

    def with_layer(num_classes):
        net = make_net(num_classes)
        net.body.append(torch.nn.Linear(48, 48))
        return net

    trainer = make_trainer(make_net=with_layer)
    trainer.train_step()
    assert set(trainer.initialization) == {"2.weight", "2.bias"}
    tester = MetaTester(make_task("a"), MetaTestSettings(steps=1, padding=0), make_net=with_layer)
    assert 0 <= tester.accuracy(trainer.initialization, 0) <= 1
    tester = MetaTester(make_task("a"), MetaTestSettings(steps=1, padding=0), make_net=make_net)
    with pytest.raises(ValueError, match="TaskNet has not: 2.weight, 2.bias"):
        tester.accuracy(trainer.initialization, 0)


# tests/baselines resumes every method's optimizer; here one of each kind of step resumes the whole loop
@pytest.mark.parametrize("name", ["cts", "random-shift", "leap", "imaml"])
def test_resume_equals_uninterrupted_bit_for_bit(name, tmp_path):
    whole = make_trainer(name)
    losses = [whole.train_step() for _ in range(5)]
    first = make_trainer(name)
    for _ in range(3):
        first.train_step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make_trainer(name)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.step == 3
    assert torch.equal(torch.stack(losses[3:]), torch.stack([second.train_step() for _ in range(2)]))
    for key, value in whole.initialization.items():
        assert torch.equal(value, second.initialization[key]), key


def test_the_state_of_other_tasks_is_refused():
    state = make_trainer().state_dict()
    other = make_trainer(tasks=[make_task("a"), make_task("c")])
    with pytest.raises(ValueError, match="a, b, not of a, c"):
        other.load_state_dict(state)


def test_two_runs_with_one_seed_give_bit_equal_phi_and_threads_change_nothing():
    results = []
    for _ in range(2):
        with task_map("cpu") as map_tasks:
            trainer = make_trainer(map_tasks=map_tasks)
            for _ in range(3):
                trainer.train_step()
            results.append(trainer.initialization)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = make_trainer()
    for _ in range(3):
        trainer.train_step()
    torch.set_num_threads(threads)
    for key, value in trainer.initialization.items():
        assert torch.equal(value, results[0][key]) and torch.equal(value, results[1][key]), key


def test_losses_and_held_out_losses_come_to_the_methods_that_need_them():
    received = {}

    class Needy(METHODS["cts"]):
        needs = frozenset({"losses", "heldout"})

        def step(self, closure=None, *, losses=None, heldout=None):
            received.update(losses=losses, heldout=[function() for function in heldout])
            return super().step(closure, losses=losses, heldout=heldout)

    trainer = make_trainer(Needy, [make_task("a"), make_task("b")])
    losses = trainer.train_step()
    assert torch.equal(torch.stack(received["losses"]), losses)
    assert all(loss.requires_grad and loss.dim() == 0 for loss in received["heldout"])


def test_inner_steps_never_see_held_back_images():
    trainer = make_trainer()
    assert [len(batches.labels) for batches in trainer.batches] == [48, 48]
    assert [len(batches.labels) for batches in trainer.held_out] == [12, 12]


def test_held_out_losses_without_held_back_images_are_refused():
    class Needy(METHODS["cts"]):
        needs = frozenset({"heldout"})

    with pytest.raises(ValueError, match="held_back"):
        make_trainer(Needy, [make_task("a")], MetaTrainSettings(2, 2, held_back=0.0))


def test_nets_made_in_many_threads_depend_on_their_seeds_alone():
    heads = list(range(8))
    alone = [new_net(ResNet20, 3, seed=0, head=head) for head in heads]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda head: new_net(ResNet20, 3, seed=0, head=head), heads))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_a_gradient_that_a_device_tells_of_only_when_it_is_asked_ends_the_run_in_its_own_words(tmp_path):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = make_trainer(make_net=SmallNet, device=device, capturable=True, backend="triton", nonfinite="raise")
    trainer.loss = lambda net, x, y: loss(net, x, y) * (float("nan") if net is trainer.nets[1] else 1.0)
    names = list(trainer.tasks)
    whole = dict(steps=1, snapshot_steps=(), rates="its lr is too large", shown=False)
    training = Training("cts", trainer, Checkpoints(tmp_path, {}), ALONE, tasks=names, spread=[names], **whole)
    with pytest.raises(Diverged, match="cts, at or before step 1: the gradient of task 'b', parameter '0.weight'"):
        training.run(Stop())
    assert not list(tmp_path.iterdir())


def test_no_tasks_are_refused():
    with pytest.raises(ValueError, match="at least one task"):
        make_trainer(tasks=[])


# Meta-test


def test_equal_seeds_give_equal_accuracy_and_learning_beats_chance():
    tester = make_tester(make_task("a", images=120), MetaTestSettings(steps=20, batch_size=16, padding=0))
    accuracy = tester.accuracy({}, 0)
    assert accuracy == tester.accuracy({}, 0)
    assert accuracy > 0.5


def test_the_whole_test_set_is_scored():
    task = make_task("a", images=1010)  # 505 test images: a last batch of 5
    tester = make_tester(task, MetaTestSettings(steps=1, batch_size=4, padding=0))
    assert (tester.accuracy({}, 0) * 505) % 1 == pytest.approx(0, abs=1e-9)


def test_a_net_whose_outputs_are_nan_gets_nothing_right():
    tester = make_tester(make_task("a", classes=3), MetaTestSettings(steps=2, lr=1e30))
    assert tester.accuracy({}, 0) == 0.0


def test_a_fine_tuning_run_can_be_left_before_every_step_and_batch_of_the_test():
    asked, settings = [], MetaTestSettings(steps=3, batch_size=4, padding=0)
    tester = MetaTester(make_task("a", images=1010), settings, make_net=ResNet20, check=lambda: asked.append(1))
    tester.accuracy({}, 0)
    assert len(asked) == 3 + 2


def test_an_initialization_of_another_network_is_refused():
    with pytest.raises(ValueError, match=re.escape("ResNet20 has not: fc.weight")):
        make_tester(make_task("a"), MetaTestSettings(steps=1)).accuracy({"fc.weight": torch.zeros(1)}, 0)


def test_a_subset_of_the_training_images_is_balanced():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)
    chosen = balanced_subset(labels, 23, seed=0)
    assert len(set(chosen.tolist())) == 23
    assert labels[chosen].bincount().tolist() == [10, 10, 3]
    assert len(balanced_subset(labels, None, seed=0)) == len(balanced_subset(labels, 1000, seed=0)) == 83


def test_interval_is_students():
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(mean_and_interval([1.0])[1])
    assert mean_and_interval([0.0, 1.0])[1] == pytest.approx(12.7062 / 2, rel=1e-5)
