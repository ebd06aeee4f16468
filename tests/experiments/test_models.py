"""ResNet20 as the paper's image experiments use it; other networks by name, and weights to begin at."""

import warnings

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from support.image_tasks import make_task
from torch import nn

from cts_fast.baselines import METHODS
from cts_fast.experiments.files import sha256_of
from cts_fast.experiments.meta_train import MetaTrainer, MetaTrainSettings
from cts_fast.experiments.weights import read_weights
from cts_fast.models.by_name import model
from cts_fast.models.resnet20 import ResidualBlock, ResNet20
from cts_fast.models.task_net import TaskNet


def test_body_has_57_tensors_and_head_2():
    net = ResNet20(10)
    assert len(list(net.body.parameters())) == 57
    assert len(list(net.head.parameters())) == 2
    assert sum(p.numel() for p in net.body.parameters()) == 269_072
    assert [p.shape for p in net.head.parameters()] == [(10, 64), (10,)]


@pytest.mark.parametrize("height, width", [(16, 16), (28, 28), (17, 13), (1, 1), (84, 84)])
def test_any_image_size_works(height, width):
    assert ResNet20(7).eval()(torch.zeros(2, 3, height, width)).shape == (2, 7)


def test_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = ResidualBlock(2, 4, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the block's own branch is then 0
    x = torch.rand(1, 2, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, 0].any() and not y[:, 3].any()


def test_convolutions_are_kaiming_normal_by_fan_out():
    torch.manual_seed(0)
    weight = ResNet20(10).body.stage3_block2.conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_parameters_are_channels_last():
    weight = ResNet20(10).body.stage3_block2.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_no_classes_is_refused():
    with pytest.raises(ValueError, match="num_classes"):
        ResNet20(0)


# Networks by name


def classifier(num_classes):
    """A net of one's own that is no TaskNet: batch norm, a hidden linear layer, and one for the classes."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.Linear(5, num_classes),
    )


def with_softmax(num_classes):
    return nn.Sequential(*classifier(num_classes), nn.Softmax(1))


def task_net(num_classes):
    return TaskNet(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), 4, num_classes)


def headless(num_classes):
    return nn.Sequential(nn.Conv2d(3, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def bodiless(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


def wide(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes + 1), nn.Linear(num_classes + 1, num_classes))


def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


class Tied(nn.Module):
    """Its last layer's weight is a parameter of its own, too."""

    def __init__(self, num_classes):
        super().__init__()
        self.body, self.last = nn.Linear(3, 4), nn.Linear(4, num_classes)
        self.again = nn.ParameterList([self.last.weight])

    def forward(self, x):
        return self.last(self.body(x.mean((2, 3))))


def tied(num_classes):
    return Tied(num_classes)


BODY = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))


def same_body(num_classes):
    return TaskNet(BODY, 4, num_classes)


def text(num_classes):
    return "a net"


def fails(num_classes):
    raise KeyError("depth")


def own(name):
    return f"{__name__}:{name}"


def test_a_torchvision_classifier_is_its_body_and_a_new_head():
    torch.manual_seed(0)
    whole = torchvision.models.resnet18(num_classes=2).eval()
    net = model("ResNet18", [(32, 32)])(2).eval()
    assert len(list(net.body.parameters())) == 60 and [p.shape for p in net.head.parameters()] == [(2, 512), (2,)]
    kept = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("fc.")}
    net.body.load_state_dict(kept)
    net.head.load_state_dict(whole.fc.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net(x), whole(x))


@pytest.mark.parametrize("name, head", [("mobilenet_v3_small", "classifier.3"), ("shufflenet_v2_x0_5", "fc")])
def test_the_last_linear_layer_is_found_wherever_it_is(name, head):
    found = model(name, [(32, 32)])
    assert found.head == head and found(7).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_functions_of_ones_own_give_nets_to_split_or_whole_ones():
    split, whole = model(own("classifier"), [(8, 8)]), model(own("task_net"), [(8, 8)])
    assert (split.head, whole.head) == ("5", "head")
    assert split(3)(torch.zeros(2, 3, 8, 8)).shape == whole(3)(torch.zeros(2, 3, 8, 8)).shape == (2, 3)
    assert {name for name, _ in split(3).body.named_parameters()} == {
        *("0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias")
    }


@pytest.mark.parametrize(
    "name, words",
    [
        ("resnet19", ["'resnet19'", "resnet18", "module:function"]),
        ("zebra", ["'zebra'", "resnet20"]),
        ("squeezenet1_1", ["no linear layer"]),
        ("googlenet", ["several classifiers", "aux1.fc2", "fc"]),
        ("alexnet", ["alexnet", "8 x 8"]),
        ("nowhere.at_all:net", ["nowhere"]),
        (own("zebra"), ["zebra"]),
        (own("text"), ["TaskNet", "str"]),
        (own("fails"), ["KeyError", "depth"]),
        (own("headless"), ["no linear layer"]),
        (own("bodiless"), ["no body"]),
        (own("wide"), ["another body"]),
        (own("lazy"), ["without a shape", "0.weight"]),
        (own("tied"), ["one parameter in two places", "last.weight", "again.0"]),
        (own("same_body"), ["every task needs its own"]),
        ("exits:net", ["cannot be imported"]),
        ("garbled:net", ["cannot be imported"]),
        (own("with_softmax"), ["after its last linear layer '5'", "logits"]),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_no_body_and_head_is_refused_by_name(name, words, tmp_path, monkeypatch):
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    (tmp_path / "garbled.py").write_text("def net(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        model(name, [(8, 8)])
    assert all(word in str(error.value) for word in words), error.value


def test_what_cannot_train_on_so_few_images_is_refused_before_a_run():
    with pytest.raises(ValueError, match="resnet18 cannot train on batches of 1 at 16 x 16 pixels.*--batch-size"):
        model("resnet18", [(16, 16)], 1)
    model("resnet18", [(16, 16)], 2)


def test_a_trial_leaves_torchs_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    model(own("classifier"), [(8, 8)])
    assert torch.equal(torch.rand(1), expected)


# Weights


def trained_classifier():
    torch.manual_seed(1)
    net = classifier(9)
    net(5 + torch.randn(4, 3, 8, 8))  # statistics that are not new ones'
    return net


@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_weights_are_the_whole_body_and_no_head(file, tmp_path):
    net, path = trained_classifier(), tmp_path / file
    torch.save(net.state_dict(), path) if path.suffix == ".pt" else save_file(net.state_dict(), path)
    weights = read_weights(path, model(own("classifier")))
    assert set(weights.left_out) == {"5.weight", "5.bias"} and weights.statistics and weights.sha256 == sha256_of(path)
    assert set(weights.parameters) == {name for name, _ in net[:5].named_parameters()}
    assert all(torch.equal(weights.state[name], tensor) for name, tensor in net[:5].state_dict().items())
    assert len(weights.state) == len(net[:5].state_dict())


def test_an_initialization_and_a_saved_task_net_are_weights_too(tmp_path):
    made = model(own("classifier"))
    net = made(3)
    save_file({name: p.detach() for name, p in net.body.named_parameters()}, tmp_path / "phi.safetensors")
    phi = read_weights(tmp_path / "phi.safetensors", made)
    assert not phi.statistics and phi.state["1.running_var"].eq(1).all() and phi.state["1.num_batches_tracked"] == 0
    torch.save(net.state_dict(), tmp_path / "net.pt")
    whole = read_weights(tmp_path / "net.pt", made)
    assert whole.left_out == ("head.weight", "head.bias")
    for name, p in net.body.named_parameters():
        assert torch.equal(phi.state[name], p) and torch.equal(whole.state[name], p)


def state_with(**changes):
    state = {**trained_classifier().state_dict(), **changes}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda: state_with(**{"0.weight": None}), ["missing: 0.weight"]),
        (lambda: state_with(**{"1.running_mean": None}), ["missing: 1.running_mean"]),
        (lambda: state_with(**{"6.weight": torch.zeros(1)}), ["not in the model: 6.weight"]),
        (lambda: state_with(**{"0.bias": torch.zeros(7)}), ["0.bias (7,) instead of (4,)"]),
        (lambda: state_with(**{"0.bias": torch.zeros(4, dtype=torch.int8)}), ["of another kind: 0.bias torch.int8"]),
        (lambda: state_with(**{"0.bias": torch.full((4,), torch.nan)}), ["not finite: 0.bias"]),
        (lambda: state_with(**{"0.bias": torch.full((4,), 1e300, dtype=torch.float64)}), ["not finite: 0.bias"]),
        (
            lambda: state_with(**{"0.bias": torch.zeros(4).to(torch.float8_e4m3fn)}),
            ["of another kind: 0.bias torch.float8_e4m3fn"],
        ),
        (
            lambda: state_with(**{"0.bias": torch.ones(4).to_sparse()}),
            ["of another kind: 0.bias torch.float32 torch.sparse_coo"],
        ),
        (lambda: {0: torch.zeros(1)}, ["no state dict", "0"]),
        (lambda: {"model": state_with(), "epoch": 3}, ["no state dict", "model, epoch"]),
        (lambda: [torch.zeros(1)], ["no state dict", "list"]),
        (trained_classifier, ["more than tensors"]),
    ],
)
def test_weights_that_do_not_fit_are_one_error_with_file_and_names(content, words, tmp_path):
    torch.save(content(), tmp_path / "w.pt")
    with pytest.raises(ValueError) as error:
        read_weights(tmp_path / "w.pt", model(own("classifier")))
    assert all(word in str(error.value) for word in [str(tmp_path / "w.pt"), *words]), error.value


@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_a_missing_or_damaged_file_of_weights_is_named(file, tmp_path):
    path = tmp_path / file
    with pytest.raises(ValueError, match="no such file"):
        read_weights(path, model(own("classifier")))
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_weights(path, model(own("classifier")))
    path.rmdir()
    path.write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match=f"{file} cannot be read"):
        read_weights(path, model(own("classifier")))


def test_a_program_in_the_place_of_weights_is_refused_and_nobody_is_advised_to_run_it(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's newer versions prefer torch.export
        torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2)).save(str(tmp_path / "w.pt"))
        with pytest.raises(ValueError, match="w.pt cannot be read .it may hold more than tensors") as error:
            read_weights(tmp_path / "w.pt", model(own("classifier")))
    assert "weights_only" not in str(error.value)


def test_meta_training_begins_at_the_weights_and_their_statistics_in_every_task(tmp_path):
    made = model(own("classifier"))
    torch.save(trained_classifier().state_dict(), tmp_path / "w.pt")
    weights = read_weights(tmp_path / "w.pt", made)
    settings = MetaTrainSettings(2, 1, batch_size=4)
    tasks = [make_task("a"), make_task("b", seed=1)]
    trainer = MetaTrainer(METHODS["cts"], tasks, settings, make_net=made, meta_lr=0.1, seed=0, start=weights.state)
    for net in trainer.nets:
        assert all(torch.equal(tensor, weights.state[name]) for name, tensor in net.body.state_dict().items())
    assert all(torch.equal(phi, weights.parameters[name]) for name, phi in trainer.initialization.items())
    assert not torch.equal(trainer.nets[0].head.weight, trainer.nets[1].head.weight)
