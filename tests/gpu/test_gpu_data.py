"""Images in mapped files, on a GPU: in its memory where they are few, a batch at a time where they are many."""

import numpy as np
import pytest
import torch
from support.image_tasks import make_task

from cts_fast.baselines import METHODS
from cts_fast.data import ImageSet, Task
from cts_fast.data.images import MappedImages
from cts_fast.experiments import batches
from cts_fast.experiments.batches import TaskBatches
from cts_fast.experiments.meta_train import MetaTrainer, MetaTrainSettings
from cts_fast.models.resnet20 import ResNet20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture
def mapped(tmp_path):
    """Images in a file, the same in memory, and labels."""
    task = make_task("a", channels=3)
    np.save(tmp_path / "images.npy", task.train.images.numpy())
    return MappedImages(tmp_path / "images.npy"), task.train.images, task.train.labels


@pytest.mark.parametrize("resident", [True, False])
def test_batches_are_those_of_the_cpu(mapped, resident, monkeypatch):
    if not resident:
        monkeypatch.setattr(batches, "RESIDENT", 0)
    images, in_memory, labels = mapped
    options = {"seed": 0, "padding": 1, "flip": True, "part": torch.arange(50)}
    here = TaskBatches(images, labels, 8, device="cuda", **options)
    there = TaskBatches(in_memory, labels, 8, **options)
    assert (here.lazy is None) == resident
    for _ in range(10):
        for a, b in zip(next(here), next(there), strict=True):
            assert a.is_cuda and torch.equal(a.cpu(), b)


def test_a_captured_step_takes_mapped_images_that_fit(mapped, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # else two equal runs differ too
    images, in_memory, labels = mapped
    losses = []
    for kept in (images, in_memory):
        part = ImageSet(kept, labels)
        task = Task("own", part, part, ("a", "b", "c", "d"), True, "train", "", "")
        settings = MetaTrainSettings(horizon=4, rounds=2, batch_size=8, padding=1)
        trainer = MetaTrainer(
            METHODS["cts"], [task, task], settings, make_net=ResNet20, meta_lr=0.1, seed=0, device="cuda", capture=True
        )
        losses.append(torch.stack([trainer.train_step() for _ in range(6)]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
