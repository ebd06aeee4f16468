"""Meta-training: one loop for every method of `cts_fast.baselines.METHODS`."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cts_fast.capture import STREAMS, CapturedStep
from cts_fast.distributed import by_task
from cts_fast.experiments.batches import TaskBatches, draw_together, task_seed
from cts_fast.models.batch_counts import BatchCounts
from cts_fast.models.task_net import TaskNet

PRECISIONS = ("fp32", "bf16")
MakeNet = Callable[[int], TaskNet]  # number of classes → a network with `body` (meta-learned) and `head` (the task's)
_GLOBAL_GENERATOR = threading.Lock()  # modules draw from torch's one generator, and nets are made in many threads


@dataclass(frozen=True)
class MetaTrainSettings:
    """What all methods have in common while they meta-train.

    horizon: inner steps per round (K); rounds: M; size: side length of the images, None for each task's own;
    padding: of the random crop, None for 4 up to 32 pixels and 8 above; lr, momentum, weight_decay: inner SGD without
    Nesterov; held_back: fraction of each task's training images that no inner step sees, for methods that need
    held-out losses (the same for every method); normalization: see `cts_fast.experiments.batches.SCALES`;
    reset_momentum: whether a reset clears the momentum of the shared parameters too. Heads, their momentum and
    batch-norm statistics go on.
    """

    horizon: int
    rounds: int
    batch_size: int = 128
    size: int | None = None
    padding: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    held_back: float = 0.1
    normalization: str = "half"
    reset_momentum: bool = True

    @property
    def steps(self) -> int:
        """Inner steps of every task in the whole of meta-training: K M."""
        return self.horizon * self.rounds


def seed_draws(seed: int) -> None:
    """Seed what networks draw while they train; waits while another thread makes a network."""
    with _GLOBAL_GENERATOR:
        torch.manual_seed(seed)


def new_net(make_net: MakeNet, num_classes: int, *, seed: int, head: object) -> TaskNet:
    """A network whose body depends on `seed` alone, and whose head on `seed` and the name `head`."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.manual_seed(task_seed(seed, "head", head))
        net = make_net(num_classes)
        torch.manual_seed(task_seed(seed, "body"))
        net.body.load_state_dict(make_net(1).body.state_dict())
    return net


def draws_numbers(make_net: MakeNet, shape: Sequence[int]) -> bool:
    """Whether a network draws random numbers while it trains (dropout), by a pass of two images of this shape."""
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]), torch.no_grad():
        net = make_net(1).train()
        before = torch.get_rng_state()
        net(torch.zeros(2, 3, *shape))
        return not torch.equal(before, torch.get_rng_state())


def check_held_out(name: str, method: type, tasks: Sequence[Any], settings: MetaTrainSettings) -> None:
    """Raises ValueError where a method, called `name`, needs held-out images and a task holds none back."""
    few = [task.name for task in tasks if int(settings.held_back * len(task.train.labels)) == 0]
    if few and "heldout" in getattr(method, "needs", ()):
        raise ValueError(
            f"{name} needs held-out images of every task, and {', '.join(few)} hold{'s' * (len(few) == 1)} none back: "
            f"give --held-back F (held_back, the fraction, is {settings.held_back:g}), or leave {name} out"
        )


def pixels(task: Any, size: int | None) -> int:
    """Of an image as it is trained on: what a task costs beside another with batches as large."""
    return size * size if size else math.prod(task.train.images.shape[-2:])


class MetaTrainer:
    """T networks with one meta-learned body, trained by one method; each `train_step` is one inner step of all.

    With the same seed, every method starts from the same phi and heads and sees the same batches.

    Args:
        method: a class of `cts_fast.baselines.METHODS`; options: further arguments of it.
        tasks: `cts_fast.data.Task`s; their training images are used.
        make_net: number of classes to a network with `body`, which is meta-learned, and `head`, which is the task's.
        meta_lr: the method's beta.
        map_tasks: runs a function for every task, as `cts_fast.experiments.parallel.task_map` yields it.
        capture: replay the whole of a step, its batches included, as a CUDA graph (`cts_fast.capture`); only for
            methods with no needs.
        streams: CUDA streams of a captured step.
        start: the body's state dict to begin at, batch-norm statistics included, in every task; None: the seed's.
        precision: "fp32", or "bf16" for forward passes under autocast; parameters, gradients and batch-norm statistics
            stay float32.

    With the option `process_group` these are the tasks of this rank, and every rank makes the same calls.
    """

    def __init__(
        self,
        method: type,
        tasks: Sequence[Any],
        settings: MetaTrainSettings,
        *,
        make_net: MakeNet,
        meta_lr: float,
        seed: int,
        device: torch.device | str = "cpu",
        map_tasks: Callable[..., Any] = map,
        capture: bool = False,
        streams: int = STREAMS,
        precision: str = "fp32",
        start: Mapping[str, Tensor] | None = None,
        **options: Any,
    ):
        if not tasks:
            raise ValueError("meta-training needs at least one task")
        check_held_out(method.__name__, method, tasks, settings)
        self.tasks = tuple(task.name for task in tasks)
        self.step = 0
        self.device = torch.device(device)
        self.map_tasks = map_tasks
        self.nets = [new_net(make_net, len(task.classes), seed=seed, head=task.name).to(device) for task in tasks]
        if start is not None:
            for net in self.nets:
                net.body.load_state_dict(start)
        self.batches, self.held_out = _split_batches(tasks, settings, seed, device)
        shared = ("lr", "momentum", "weight_decay", "horizon", "reset_momentum")
        settings_of_all = {name: getattr(settings, name) for name in shared}
        if capture:
            settings_of_all["capturable"] = True
        if "seed" in getattr(method, "own_options", ()):  # what a method draws differs between runs too
            settings_of_all["seed"] = seed % (1 << 63)
        self.optimizer = method(
            [net.body.named_parameters() for net in self.nets],
            heads=[net.head.parameters() for net in self.nets],
            meta_lr=meta_lr,
            **(settings_of_all | options),
        )
        self.needs = frozenset(getattr(self.optimizer, "needs", ()))
        if capture and self.needs:
            needs = ", ".join(sorted(self.needs))
            raise ValueError(f"{method.__name__} needs {needs}, which a CUDA graph cannot give it")
        self.loss = partial(loss, precision=precision)
        self.counts = BatchCounts(self.nets)
        self.captured = None
        if capture:
            too_many = [
                name for name, batches in zip(self.tasks, self.batches, strict=True) if batches.lazy is not None
            ]
            if too_many:
                raise ValueError(
                    f"{', '.join(too_many)}: a CUDA graph needs images on the GPU, which are too many there"
                )
            prepare = [batches.batch for batches in self.batches]
            self.captured = CapturedStep(self.nets, self.optimizer, self.loss, prepare, streams)

    @property
    def initialization(self) -> dict[str, Tensor]:
        """A copy of phi, name to tensor."""
        return {name: tensor.detach().clone() for name, tensor in self.optimizer.initialization_state_dict().items()}

    def train_step(self) -> Tensor:
        """One inner step of every task and what the method does with it; returns the T training losses, detached."""
        drawn = draw_together(self.batches)
        losses = self.captured(drawn) if self.captured else self.eager_step(drawn)
        self.step += 1
        return losses

    def eager_step(self, drawn: Tensor) -> Tensor:
        """T forward and backward passes on what `draw_together` drew, and the optimizer's step; reads nothing back."""
        near = drawn.to(self.batches[0].device, non_blocking=True)  # one copy for all tasks
        draws = [near[t] if batches.lazy is None else drawn[t] for t, batches in enumerate(self.batches)]
        self.optimizer.zero_grad()
        with self.counts.together():
            losses = list(self.map_tasks(self._backward, self.nets, self.batches, draws))
        needed: dict[str, Any] = {}
        if "losses" in self.needs:
            needed["losses"] = losses
        if "heldout" in self.needs:
            needed["heldout"] = [
                HeldOutLoss(self.loss, net, cast(TaskBatches, batches))  # `check_held_out`
                for net, batches in zip(self.nets, self.held_out, strict=True)
            ]
        self.optimizer.step(**needed)
        return torch.stack(losses)

    def _backward(self, net: nn.Module, batches: TaskBatches, drawn: Tensor) -> Tensor:
        """Adds the gradients of one task's batch; returns its loss, detached."""
        loss = self.loss(net, *batches.batch(drawn))
        loss.backward()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-equal continuation needs; loads with `torch.load(weights_only=True)`.

        "shared" is the same on every rank; "own" is this rank's, what belongs to a task by the task's name.
        """
        optimizer = by_task.split(self.optimizer)
        parts = zip(self.tasks, self.nets, self.batches, self.held_out, optimizer.tasks, strict=True)
        tasks = {
            name: {
                "net": net.state_dict(),
                "stream": batches.state_dict(),
                "held_back": held_back and held_back.state_dict(),
                "optimizer": own,
            }
            for name, net, batches, held_back, own in parts
        }
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        own = {"tasks": tasks, "sums": optimizer.sums, "rng": torch.get_rng_state(), "cuda_rng": cuda_rng}
        return {"shared": {"step": self.step, "optimizer": optimizer.common}, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state` was taken; raises ValueError if it is of other tasks."""
        self.optimizer.load_state_dict(self.load_own(state["shared"], [state["own"]], as_saved=True))

    def load_own(
        self, shared: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], *, as_saved: bool, sums_up: bool = True
    ) -> dict[str, Any]:
        """Loads all but the optimizer, which talks to other ranks: its state dict is returned.

        parts: "own" of all ranks that had this one's tasks. as_saved: these are the tasks of the one part; otherwise
        what a method has summed over tasks goes on in the sum of all `parts` on the rank that `sums_up`, and random
        numbers that networks draw go on as they were seeded. Raises ValueError for other tasks.
        """
        found = {name: saved for part in parts for name, saved in part["tasks"].items()}
        if not found.keys() >= {*self.tasks} or as_saved and list(found) != list(self.tasks):
            raise ValueError(f"the state is of the tasks {', '.join(found)}, not of {', '.join(self.tasks)}")
        saved = [found[name] for name in self.tasks]
        for net, batches, held_back, of_task in zip(self.nets, self.batches, self.held_out, saved, strict=True):
            net.load_state_dict(of_task["net"])
            batches.load_state_dict(of_task["stream"])
            if held_back is not None:
                held_back.load_state_dict(of_task["held_back"])
        sums = parts[0]["sums"]
        if as_saved:
            torch.set_rng_state(parts[0]["rng"])
            if parts[0]["cuda_rng"] is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(parts[0]["cuda_rng"], self.device)
        else:
            sums = by_task.added([part["sums"] for part in parts], sums_up)
        self.step = shared["step"]
        own = by_task.ByTask(shared["optimizer"], [of_task["optimizer"] for of_task in saved], sums)
        return by_task.joined(self.optimizer.state_dict(), own)


class HeldOutLoss:
    """Calling it returns the loss, with its graph, of the next batch of images that no inner step sees."""

    def __init__(self, loss: Callable[..., Tensor], net: nn.Module, batches: TaskBatches):
        self.loss, self.net, self.batches = loss, net, batches

    def __call__(self) -> Tensor:
        return self.loss(self.net, *next(self.batches))


def _split_batches(
    tasks: Sequence[Any], settings: MetaTrainSettings, seed: int, device: torch.device | str
) -> tuple[list[TaskBatches], list[TaskBatches | None]]:
    """The batches of every task's inner steps, and those of its images that are held back, None where it has none."""
    inner, held_out = [], []
    for task in tasks:
        labels = task.train.labels
        held = int(settings.held_back * len(labels))
        generator = torch.Generator().manual_seed(task_seed(seed, "held back", task.name))
        order = torch.randperm(len(labels), generator=generator)
        make = partial(
            TaskBatches,
            task.train.images,
            labels,
            batch_size=settings.batch_size,
            size=settings.size,
            padding=settings.padding,
            flip=task.flip,
            normalization=settings.normalization,
            device=device,
        )
        inner.append(make(part=order[held:], seed=task_seed(seed, "train", task.name)))
        held_back = make(part=order[:held], seed=task_seed(seed, "held out", task.name)) if held else None
        held_out.append(held_back)
    return inner, held_out


def logits(net: nn.Module, x: Tensor, precision: str = "fp32") -> Tensor:
    """What a net says of images, in float32; "bf16" runs it under autocast, parameters and statistics in float32."""
    if precision == "fp32":
        return net(x)
    with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):  # each weight is cast once a pass anyway
        return net(x).float()


def loss(net: nn.Module, x: Tensor, y: Tensor, precision: str = "fp32") -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(logits(net, x, precision), y)
