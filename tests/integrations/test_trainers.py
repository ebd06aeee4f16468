"""Lightning and Accelerate: fit, checkpoint and resume are the plain loop, bit for bit."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cts_fast import ShiftingMetaOptimizer

DEVICES = [
    pytest.param("cpu"),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]
TASKS, EPOCHS, BATCHES = 3, 4, 3


def make_nets():
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()), "head": nn.Linear(8, 2)})
    return nn.ModuleList(copy.deepcopy(net) for _ in range(TASKS))


def make_optimizer(nets):
    return ShiftingMetaOptimizer(
        [net["body"].named_parameters() for net in nets],
        heads=[net["head"].parameters() for net in nets],
        lr=0.1,
        momentum=0.9,
        meta_lr=0.2,
        horizon=5,
    )


def loader():
    """Batches [N, T, …] of all tasks at once, in one order."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4 * BATCHES, TASKS, 6, generator=draw)
    y = torch.randint(2, (4 * BATCHES, TASKS), generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def losses(nets, batch):
    x, y = batch
    return [cross_entropy(net["head"](net["body"](x[:, t])), y[:, t]) for t, net in enumerate(nets)]


def everything(nets, opt):
    return [t.detach().cpu().clone() for t in (*nets.state_dict().values(), *opt.initialization)]


def plain_loop(device, epochs=EPOCHS):
    nets = make_nets().to(device)
    opt = make_optimizer(nets)
    for _ in range(epochs):
        for batch in loader():
            opt.zero_grad()
            for loss in losses(nets, [part.to(device) for part in batch]):
                loss.backward()
            opt.step()
    return everything(nets, opt)


def assert_equal(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_lightning(device, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class MetaTraining(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.nets = make_nets()

        def configure_optimizers(self):
            return make_optimizer(self.nets)

        def training_step(self, batch):
            opt = self.optimizers()
            opt.zero_grad()
            for loss in losses(self.nets, batch):
                self.manual_backward(loss)
            opt.step()

    def trainer(epochs):
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch")
        whole, first, second = trainer(EPOCHS), trainer(2), trainer(EPOCHS)
        model = MetaTraining()
        whole.fit(model, loader())
        assert_equal(everything(model.nets, whole.optimizers[0]), plain_loop(device))

        half = MetaTraining()
        first.fit(half, loader())
        first.save_checkpoint(tmp_path / "half.ckpt")
        resumed = MetaTraining()
        second.fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_equal(everything(resumed.nets, second.optimizers[0]), plain_loop(device))
    assert second.optimizers[0].inner_step == EPOCHS * BATCHES % 5


@pytest.mark.parametrize("device", DEVICES)
def test_accelerate(device, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def prepared():
        accelerator = accelerate.Accelerator(cpu=device == "cpu")
        nets = make_nets().to(accelerator.device)
        opt = make_optimizer(nets)
        nets, opt, batches = accelerator.prepare(nets, opt, loader())
        return accelerator, nets, opt, batches

    def train(accelerator, nets, opt, batches, epochs):
        for _ in range(epochs):
            for batch in batches:
                opt.zero_grad()
                for loss in losses(nets, batch):
                    accelerator.backward(loss)
                opt.step()

    accelerator, nets, opt, batches = prepared()
    train(accelerator, nets, opt, batches, 2)
    accelerator.save_state(str(tmp_path / "half"))
    train(accelerator, nets, opt, batches, EPOCHS - 2)
    expected = plain_loop(device)
    assert_equal(everything(nets, opt.optimizer), expected)

    accelerator, nets, opt, batches = prepared()
    accelerator.load_state(str(tmp_path / "half"))
    train(accelerator, nets, opt, batches, EPOCHS - 2)
    assert_equal(everything(nets, opt.optimizer), expected)
