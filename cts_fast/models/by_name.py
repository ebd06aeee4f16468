"""Networks by name: ResNet20, torchvision's classifiers and functions of one's own, each as a body and a head."""

import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cts_fast.models.resnet20 import ResNet20
from cts_fast.models.task_net import TaskNet

OWN = {"resnet20": ResNet20}
TRIAL = 1009  # classes of a network made for a trial: a prime, so that no layer inside has as many outputs


@dataclass(frozen=True)
class Model:
    """What `--model` names; called with a number of classes, it makes a `TaskNet`.

    make: number of classes to a TaskNet, or to a classifier that is split: logits = head(body(x)), where the body is
    all but its last linear layer, and the head a new one. head: the name of that layer; "head" for TaskNets.
    """

    name: str
    make: Callable[[int], nn.Module]
    head: str

    def __call__(self, num_classes: int) -> TaskNet:
        return _split(self.make(num_classes), self.head, num_classes)


def model(name: str, sizes: Iterable[tuple[int, int]] = (), batch_size: int = 2) -> Model:
    """The model "resnet20", "resnet18" or another of torchvision's, or "module:function", after a trial of it.

    sizes: heights and widths of images that it must take; batch_size: how few of them it must train on. A function is
    called with the number of classes; it returns a TaskNet or a classifier to be split. Raises ValueError: no such
    model, one with several classifiers or without a linear layer at the end, one that cannot take images of these
    sizes or train on so few, a function that returns something else, or another body for other numbers of classes.
    """
    sizes = list(dict.fromkeys(sizes))
    name = name if ":" in name else name.lower()
    make = _function(name) if ":" in name else _known(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        net = make(TRIAL).eval()
        found = Model(name, make, _head(name, net))
        other = found(1)
        if {*map(id, net.parameters())} & {*map(id, other.parameters())}:
            raise ValueError(f"the model {name!r} returns parameters that it returned before: every task needs its own")
        if _shapes(_tried(found, net, sizes)) != _shapes(other.body):
            raise ValueError(
                f"the model {name!r} has another body for another number of classes: tasks cannot share it"
            )
        _train(name, other.train(), sizes, batch_size)
    return found


def _known(name: str) -> Callable[[int], nn.Module]:
    if name in OWN:
        return OWN[name]
    try:
        from torchvision import models
    except ImportError as error:
        raise ValueError(
            f"the model {name!r} is looked for in torchvision, which cannot be imported ({error}): "
            "pip install 'cts-fast[examples]'"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, [*OWN, *known], n=5)
        raise ValueError(
            f"there is no model {name!r}{'; near it are: ' * bool(near)}{', '.join(near)}; give {', '.join(OWN)}, a "
            "classifier of torchvision.models, or module:function"
        )
    builder = models.get_model_builder(name)
    return lambda num_classes: builder(num_classes=num_classes).to(memory_format=torch.channels_last)


def _function(name: str) -> Callable[[int], nn.Module]:
    where, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(where), attribute)
    except (Exception, SystemExit) as error:  # the module's code runs
        raise ValueError(f"the model {name!r} cannot be imported: {_said(error)}") from error

    def make(num_classes: int) -> nn.Module:
        try:
            net = function(num_classes)
        except Exception as error:
            raise ValueError(f"the model {name!r}, called with {num_classes}, failed: {_said(error)}") from error
        if not isinstance(net, nn.Module):
            raise ValueError(
                f"the model {name!r} must return a TaskNet or a torch.nn.Module, not {type(net).__name__}: {net!r:.80}"
            )
        return net

    return make


def _head(name: str, net: nn.Module) -> str:
    """The name of the only linear layer with an output for each class of the trial."""
    lazy = [path for path, parameter in net.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"the model {name!r} has parameters without a shape ({lazy[0]}): give it layers that know theirs"
        )
    heads = [
        path
        for path, module in net.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == TRIAL  # also of a TaskNet
    ]
    if len(heads) > 1:
        raise ValueError(f"the model {name!r} has several classifiers, where one is needed: {', '.join(heads)}")
    if not heads:
        raise ValueError(
            f"the model {name!r} has no linear layer whose outputs are the classes: there is no head to split off"
        )
    shared = [parameter for path, parameter in net.named_parameters() if not path.startswith(f"{heads[0]}.")]
    if not heads[0] or not shared:
        raise ValueError(f"the model {name!r} has no parameters but those of its last layer: there is no body")
    own = {*map(id, net.get_submodule(heads[0]).parameters())}
    tied = [path for path, parameter in net.named_parameters(remove_duplicate=False) if id(parameter) in own]
    if len(tied) > len(own):
        raise ValueError(
            f"the model {name!r} has one parameter in two places: {', '.join(tied)}: it has no head of its own"
        )
    return heads[0]


def _split(net: nn.Module, head: str, num_classes: int) -> TaskNet:
    """A classifier as body and head; a TaskNet as it is."""
    if isinstance(net, TaskNet):
        return net
    last = net.get_submodule(head)
    assert isinstance(last, nn.Linear)
    net.set_submodule(head, nn.Identity())
    return TaskNet(net, last.in_features, num_classes)


def _shapes(body: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in body.state_dict().items()}


def _tried(found: Model, net: nn.Module, sizes: Iterable[tuple[int, int]]) -> nn.Module:
    """The body of the network `net`.

    Raises ValueError where the network cannot take images of a size, or says another thing once it is split.
    """
    last = net.get_submodule(found.head)
    for parameter in last.parameters():  # some begin at zero, which would hide what comes after
        nn.init.normal_(parameter)
    images = [torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last) for size in sizes]
    whole = [_logits(found.name, net, x) for x in images]
    body = _split(net, found.head, TRIAL).body
    for x, y in zip(images, whole, strict=True):
        if not torch.allclose(last(body(x)), y, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"the model {found.name!r} computes something after its last linear layer {found.head!r}, which a body "
                "and a head cannot: return the logits themselves"
            )
    return body


def _logits(name: str, net: nn.Module, images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    try:
        logits = net(images)
    except Exception as error:
        raise ValueError(
            f"the model {name!r} cannot take images of {height} x {width} pixels: {_said(error)}; give another size "
            "(--size), or another model"
        ) from error
    expected = (len(images), TRIAL)
    if not isinstance(logits, Tensor) or logits.shape != expected:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model {name!r} must return one tensor [images, classes], here {expected}, not {got}")
    return logits


def _train(name: str, net: TaskNet, sizes: Iterable[tuple[int, int]], batch_size: int) -> None:
    """Raises ValueError where a network in training mode cannot take so few images: batch norms want several values."""
    for height, width in sizes:
        try:
            net(torch.randn(batch_size, 3, height, width).contiguous(memory_format=torch.channels_last))
        except Exception as error:
            raise ValueError(
                f"--model {name} cannot train on batches of {batch_size} at {height} x {width} pixels: {_said(error)}; "
                "give larger batches (--batch-size, --test-batch-size) or images (--size)"
            ) from error


def _said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
