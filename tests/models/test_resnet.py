import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surestep.errors import UserError
from surestep.models import PreActResNet, ResNet, WideResNet, create
from surestep.models.resnet import BasicBlock, PreActBlock


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def preact_count(depths, widths, stem, classes=10, channels=3):
    """Weights of a pre-activation network, from its definition alone."""
    total, before = channels * 9 * stem, stem
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for j in range(depth):
            total += 2 * before + 9 * before * width + 2 * width + 9 * width * width
            if before != width or (i > 0 and j == 0):
                total += before * width
            before = width
    return total + 2 * before + before * classes + classes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("preactresnet18", 11_172_170),
        ("wrn-28-10", 36_479_194),
    ],
)
def test_published_parameter_counts(name, expected):
    with torch.device("meta"):
        assert count(create(name)) == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("preactresnet18", ((2,) * 4, (64, 128, 256, 512), 64)),
        ("preactresnet10-slim", ((1,) * 4, (16, 32, 64, 128), 16)),
        ("wrn-28-10", ((4,) * 3, (160, 320, 640), 16)),
    ],
)
def test_parameter_counts_by_hand(name, shape):
    with torch.device("meta"):
        assert count(create(name)) == preact_count(*shape)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "preactresnet18", "wrn-28-10"])
def test_strides(name):
    """The last stage works on 1/8 of 32 pixels (ResNets) or 1/4 (WRN), as in the originals."""
    with torch.device("meta"):
        model = create(name, num_classes=100)
        sizes = []
        model.get_submodule("body.pool").register_forward_pre_hook(
            lambda _, args: sizes.append(tuple(args[0].shape[1:]))
        )
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)
    assert sizes == [(640, 8, 8) if name == "wrn-28-10" else (512, 4, 4)]


@pytest.mark.parametrize("size", [28, 33, 8])
def test_any_image_size(size):
    for model in (ResNet((1, 1), (4, 8)), PreActResNet((1, 1), (4, 8))):
        assert model(torch.rand(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("in_width", "stride"), [(4, 1), (4, 2), (2, 1)])
def test_basic_block_is_the_published_formula(in_width, stride):
    block = BasicBlock(in_width, 4, stride).eval()
    x = torch.randn(2, in_width, 6, 6)
    changed = (in_width, stride) != (4, 1)
    shortcut = block.shortcut[1](block.shortcut[0](x)) if changed else x
    out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(out + shortcut))
    assert len(block.shortcut) == (2 if changed else 0)


@pytest.mark.parametrize(("in_width", "stride"), [(4, 1), (4, 2), (2, 1)])
def test_preact_block_is_the_published_formula(in_width, stride):
    block = PreActBlock(in_width, 4, stride).eval()
    x = torch.randn(2, in_width, 6, 6)
    active = F.relu(block.bn1(x))
    shortcut = x if block.shortcut is None else block.shortcut(active)
    out = block.conv2(F.relu(block.bn2(block.conv1(active))))
    torch.testing.assert_close(block(x), out + shortcut)
    assert (block.shortcut is None) == ((in_width, stride) == (4, 1))


def test_preact_ends_in_norm_and_relu():
    model = PreActResNet((1, 1), (4, 8)).eval()
    children = [name for name, _ in model.body.named_children()]
    assert children == ["conv1", "layer1", "layer2", "bn", "relu", "pool", "flatten"]
    assert (model.features(torch.rand(2, 3, 8, 8)) >= 0).all()


def test_wrn_init_is_he_over_the_fan_out():
    torch.manual_seed(0)
    model = WideResNet(10, 4)
    assert not model.get_parameter("head.bias").any()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 10_000]
    assert convs
    for conv in convs:
        fan_out = conv.out_channels * math.prod(conv.kernel_size)
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)


@pytest.mark.parametrize("depth", [4, 20, 27])
def test_wrn_depth(depth):
    with pytest.raises(UserError, match=f"depth {depth} is not a WRN"):
        WideResNet(depth)


def test_batch_statistics_move_only_in_train_mode():
    model = create("preactresnet10-slim")
    before = {k: v.clone() for k, v in model.named_buffers()}
    x = torch.rand(4, 3, 32, 32)
    model.eval()(x)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    model.train()(x)
    moved = {k for k, v in model.named_buffers() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if not k.startswith("normalize.")}
