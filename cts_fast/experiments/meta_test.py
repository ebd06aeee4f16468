"""Meta-test: fine-tune an initialization on a task that meta-training has not seen, and count what it gets right."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cts_fast.data.suite import stratified_order
from cts_fast.experiments.batches import Scale, TaskBatches, normalize, resize, task_seed
from cts_fast.experiments.meta_train import MakeNet, logits, loss, new_net, seed_draws


@dataclass(frozen=True)
class MetaTestSettings:
    """How an initialization is fine-tuned: SGD with Nesterov momentum; lr times `decay` at each fraction of the steps.

    images: training images drawn from each task (each class in turn), None for all of them; normalization "own" is by
    these images; the rest as in `MetaTrainSettings`.
    """

    steps: int
    seeds: int = 5
    images: int | None = None
    batch_size: int = 128
    size: int | None = None
    padding: int | None = None
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: float = 0.3
    decay_at: tuple[float, ...] = (0.4, 0.7, 0.9)
    normalization: str = "half"


class MetaTester:
    """Fine-tunes initializations on one task; equal seeds give equal images, batches and heads to each of them.

    make_net: number of classes to a network with a `body`, which an initialization belongs to, and a `head`.
    check: called before every step and every batch of the test, so that a long run can be left; what it raises ends it.
    """

    def __init__(
        self,
        task: Any,
        settings: MetaTestSettings,
        *,
        make_net: MakeNet,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        check: Callable[[], None] = lambda: None,
    ):
        self.task, self.settings, self.make_net, self.check = task, settings, make_net, check
        self.device, self.precision = device, precision
        self.train_images, self.test_images = task.train.images, task.test.images
        if isinstance(self.train_images, Tensor):
            self.train_images = resize(self.train_images, settings.size)
        if isinstance(self.test_images, Tensor):
            self.test_images = resize(self.test_images, settings.size).to(device)
        self.test_labels = task.test.labels.to(device)

    def accuracy(self, initialization: Mapping[str, Tensor], seed: int) -> float:
        """Fraction of the whole test set that a net fine-tuned from `initialization` classifies correctly.

        The head and the batch-norm statistics are new. `initialization` maps names of the body's parameters to tensors;
        an empty one leaves the random body of `seed`: training from scratch.
        """
        net, scale = self.fine_tune(initialization, seed)
        return self.test(net, scale)

    def fine_tune(self, initialization: Mapping[str, Tensor], seed: int) -> tuple[torch.nn.Module, Scale]:
        """The net that `accuracy` tests, and how its images are normalised."""
        settings = self.settings
        name = self.task.name
        net = new_net(self.make_net, len(self.task.classes), seed=seed, head=("meta-test", name))
        unexpected = net.body.load_state_dict(dict(initialization), strict=False).unexpected_keys
        if unexpected:
            raise ValueError(
                f"the initialization holds tensors that {type(net).__name__} has not: {', '.join(unexpected)}"
            )
        net.to(self.device)
        seed_draws(task_seed(seed, "meta-test", name))
        chosen = balanced_subset(self.task.train.labels, settings.images, task_seed(seed, "images", name))
        batches = TaskBatches(
            self.train_images,
            self.task.train.labels,
            settings.batch_size,
            part=chosen,
            size=settings.size,
            padding=settings.padding,
            flip=self.task.flip,
            normalization=settings.normalization,
            device=self.device,
            seed=task_seed(seed, "meta-test", name),
        )
        optimizer = torch.optim.SGD(
            net.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        milestones = [round(fraction * settings.steps) for fraction in settings.decay_at]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=settings.decay)
        for _ in range(settings.steps):
            self.check()
            x, y = next(batches)
            optimizer.zero_grad()
            loss(net, x, y, self.precision).backward()
            optimizer.step()
            schedule.step()
        return net, batches.scale

    @torch.inference_mode()
    def test(self, net: torch.nn.Module, scale: Scale = None) -> float:
        """Fraction of the test set that a net classifies correctly; an output that is NaN is of no class."""
        net.eval()
        correct = 0
        for start in range(0, len(self.test_labels), 500):
            self.check()
            chosen = slice(start, start + 500)
            images = resize(self.test_images[chosen].to(self.device), self.settings.size)
            found = logits(net, normalize(images, scale), self.precision)
            right = found.argmax(1) == self.test_labels[chosen]  # argmax says where a NaN is: class 0
            correct += (right & ~found.isnan().any(1)).sum()
        return int(correct) / len(self.test_labels)


def balanced_subset(labels: Tensor, count: int | None, seed: int) -> Tensor:
    """Numbers of `count` images, each class in turn as long as it lasts; all images if count is None or too large."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if count is None or count >= len(labels):
        return order
    return order[stratified_order(labels[order])[:count]]
