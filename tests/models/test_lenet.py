import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surestep.errors import UserError
from surestep.models import CNNSmall, LeNetPlus


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def textbook(weights: list[Tensor], x: Tensor) -> Tensor:
    """LeNet+ as published: relu first, then max-pool."""
    w1, b1, w2, b2, w3, b3, w4, b4 = weights
    x = F.max_pool2d(F.relu(F.conv2d(x, w1, b1, padding=2)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, w2, b2, padding=2)), 2)
    return F.linear(F.relu(F.linear(x.flatten(1), w3, b3)), w4, b4)


def test_lenet_equals_the_textbook_order_with_all_gradients():
    torch.manual_seed(0)
    model = LeNetPlus().double()
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    # Blank borders, as in MNIST: whole windows tie there.
    x = F.pad(torch.rand(8, 1, 20, 20, dtype=torch.float64), (4, 4, 4, 4))
    y = torch.arange(8)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    torch.testing.assert_close(model(x), textbook(weights, x), rtol=0, atol=0)
    got, expected = model(ours), textbook(weights, theirs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    got_grads = torch.autograd.grad(F.cross_entropy(got, y), [ours, *model.parameters()])
    expected_grads = torch.autograd.grad(F.cross_entropy(expected, y), [theirs, *weights])
    for a, b in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_parameter_counts():
    assert count(LeNetPlus()) == 832 + 51_264 + 3_212_288 + 10_250 == 3_274_634
    assert count(CNNSmall()) == 272 + 8_224 + 156_900 + 1_010


@pytest.mark.parametrize("cls", [LeNetPlus, CNNSmall])
def test_other_sizes(cls):
    model = cls(num_classes=5, in_channels=3, image_size=32)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("cls", [LeNetPlus, CNNSmall])
def test_size_must_be_a_multiple_of_four(cls):
    with pytest.raises(UserError, match="image_size 30 is not a multiple of 4"):
        cls(image_size=30)
