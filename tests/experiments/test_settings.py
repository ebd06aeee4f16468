"""The presets against the numbers of the paper, and what its protocols ask of images, optimizers and rounds."""

import pytest
import torch
from support.image_tasks import make_task
from support.nets import SmallNet
from torchvision.transforms import Normalize

from cts_fast.baselines import METHODS
from cts_fast.data.paper.suite import BY_NAME
from cts_fast.experiments.batches import TaskBatches, channel_scale, normalize
from cts_fast.experiments.cli import about_settings
from cts_fast.experiments.meta_test import MetaTester, MetaTestSettings
from cts_fast.experiments.meta_train import MetaTrainer, MetaTrainSettings
from cts_fast.experiments.settings import IMAGENET_PRESETS, PRESETS, of_horizons, snapshot_steps

# What the paper says, and the released code's factor of the decay; the rest is ours: README.md in cts_fast/examples.
SECTION_4_2 = {
    "meta_train": {
        **{"horizon": 1000, "rounds": 200, "steps": 200_000, "batch_size": 128, "lr": 0.01, "momentum": 0.9},
        **{"weight_decay": 5e-4, "nesterov": False, "normalization": "half", "size": None, "padding": None},
        **{"reset_momentum": True, "reset_heads": False, "reset_statistics": False},
    },
    "meta_test": {
        **{"steps": 1000, "seeds": 5, "images": None, "lr": 0.1, "momentum": 0.9, "nesterov": True},
        **{"weight_decay": 5e-4, "decay": 0.3, "decay_at": [0.4, 0.7, 0.9], "normalization": "half", "size": None},
        **{"padding": None, "new_head": True, "new_statistics": True},
    },
}
SECTION_4_3 = {
    "meta_train": {
        **{"horizon": 1000, "rounds": 50, "steps": 50_000, "batch_size": 256, "lr": 0.01, "momentum": 0.9},
        **{"weight_decay": 0.0, "nesterov": False, "size": None},
    },
    "meta_test": {
        **{"steps": 1000, "seeds": 5, "images": 1000, "batch_size": 256, "lr": 0.01, "momentum": 0.9},
        **{"nesterov": True, "weight_decay": 1e-4, "decay": 0.2, "decay_at": [0.4, 0.7, 0.9]},
        **{"normalization": "own", "size": None},
    },
}


@pytest.mark.parametrize(
    "preset, published, rates",
    [
        (PRESETS["paper"], SECTION_4_2, {"cts": 0.01, "reptile": 1.0, "leap": 0.1}),
        (IMAGENET_PRESETS["paper"], SECTION_4_3, {"cts": 0.001, "reptile": 1.0}),
    ],
)
def test_the_paper_presets_hold_the_papers_numbers(preset, published, rates):
    config = about_settings(preset.train, preset.test)
    for phase, numbers in published.items():
        assert {name: config[phase][name] for name in numbers} == numbers
    assert {name: preset.meta_lr[name] for name in rates} == rates
    assert set(preset.meta_lr) == set(METHODS)


def test_section_4_2_has_its_data_sets_at_their_sizes():
    train = {"tiny_imagenet_a": (64, 100), "tiny_imagenet_b": (64, 100), "cifar100": (32, 100)}
    train |= {"stanford_dogs": (84, 120), "aircraft": (84, 100), "cub": (84, 200)}
    train |= {"fashion_mnist": (28, 10), "svhn": (32, 10)}
    target = {"stanford_cars": 196, "quickdraw": 345, "flowers": 102, "pets": 37, "stl10": 10}
    by_role = {
        role: {name: data for name, data in BY_NAME.items() if data.roles.get("paper") == role}
        for role in ("train", "target")
    }
    assert {name: (data.size, data.classes) for name, data in by_role["train"].items()} == train
    assert {name: data.classes for name, data in by_role["target"].items()} == target
    assert all(data.size in (28, 32, 64, 84) for data in by_role["target"].values())


def test_section_4_3_has_eight_groups_of_imagenet_and_nine_data_sets():
    roles = {name: data.roles.get("imagenet") for name, data in BY_NAME.items()}
    assert [name for name, role in roles.items() if role == "train"] == [f"imagenet_{i}" for i in range(1, 9)]
    targets = {"cifar100", "cifar10", "svhn", "stanford_dogs", "pets", "flowers", "food101", "cub", "dtd"}
    assert {name for name, role in roles.items() if role == "target"} == targets


def test_phi_is_tested_at_the_steps_of_figure_7():
    preset = PRESETS["paper"]
    expected = [5_000, 10_000, 25_000, 50_000, 100_000, 150_000, 200_000]
    assert snapshot_steps(preset.train, preset.snapshots) == expected


def test_horizons_share_the_steps_of_the_longest():
    found = of_horizons(MetaTrainSettings(7, 200), [10, 1000, 100])
    assert [(train.horizon, train.rounds) for train in found] == [(10, 20_000), (1000, 200), (100, 2000)]
    with pytest.raises(ValueError, match="--horizon 3 "):
        of_horizons(MetaTrainSettings(7, 2), [3, 1000])


@pytest.mark.parametrize("reset_momentum", [True, False])
def test_the_reset_policy_reaches_the_optimizer(reset_momentum):
    settings = MetaTrainSettings(3, 1, batch_size=4, reset_momentum=reset_momentum)
    tasks = [make_task("a"), make_task("b")]
    trainer = MetaTrainer(METHODS["cts"], tasks, settings, make_net=SmallNet, meta_lr=0.1, seed=0)
    for _ in range(3):
        trainer.train_step()
    body, head = (group["params"][0] for group in trainer.optimizer.param_groups)
    assert bool(trainer.optimizer.state[body]["momentum_buffer"].any()) is not reset_momentum
    assert trainer.optimizer.state[head]["momentum_buffer"].any()
    mean = trainer.nets[0].body[1]
    assert isinstance(mean, torch.nn.BatchNorm2d) and mean.num_batches_tracked == 3


# Normalization


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, 6])
def test_by_their_own_scale_images_have_mean_0_and_deviation_1_in_every_channel(channels, size):
    images = make_task("a", channels=channels, images=1200).train.images
    batches = TaskBatches(images, torch.zeros(1200).long(), 1200, seed=0, size=size, padding=0, normalization="own")
    x, _ = next(batches)
    assert x.shape == (1200, 3, size or 8, size or 8)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_imagenets_scale_is_that_of_torchvisions_weights():
    images = make_task("a", channels=3).train.images
    expected = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(images.float() / 255)
    torch.testing.assert_close(normalize(images, channel_scale("imagenet", images, None)), expected)


def test_a_black_channel_stays_finite_under_its_own_scale():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert normalize(images, channel_scale("own", images, None)).eq(0).all()


def test_the_meta_test_normalises_training_and_test_images_by_the_images_that_it_trains_on():
    task = make_task("a", channels=3, images=100)
    tester = MetaTester(task, MetaTestSettings(steps=1, images=20, normalization="own"), make_net=SmallNet)
    seen = []
    net, scale = tester.fine_tune({}, seed=0)
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tester.test(net, scale)
    assert torch.equal(torch.cat(seen), normalize(task.test.images, scale))
    whole = channel_scale("own", task.train.images, None)
    assert not torch.equal(scale, whole)  # of 20 images, not of all
    torch.testing.assert_close(scale, whole, rtol=0.1, atol=5)
