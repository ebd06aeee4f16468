"""ResNet20 as the paper's image experiments use it."""

import pytest
import torch

from cts_fast.models.resnet20 import ResidualBlock, ResNet20


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
