import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.models import create
from surestep.models._stem import GreyConv2d


def by_hand(conv: GreyConv2d, x: Tensor) -> Tensor:
    """The sums of a convolution of one channel, pixel by pixel."""
    (size, _), (pad, _) = conv.kernel_size, conv.padding
    assert conv.bias is not None
    padded = torch.zeros(len(x), x.shape[2] + 2 * pad, x.shape[3] + 2 * pad, dtype=x.dtype)
    padded[:, pad : pad + x.shape[2], pad : pad + x.shape[3]] = x[:, 0]
    height, width = (s + 2 * pad - size + 1 for s in x.shape[2:])
    pixels = [
        (padded[:, None, i : i + size, j : j + size] * conv.weight[:, 0]).sum((2, 3)) + conv.bias
        for i in range(height)
        for j in range(width)
    ]
    return torch.stack(pixels, 2).view(len(x), -1, height, width)


@pytest.fixture
def conv() -> GreyConv2d:
    torch.manual_seed(0)
    return GreyConv2d(1, 3, 5, padding=1).double()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 1, 7, 9, dtype=torch.float64, requires_grad=True)


def test_the_sums_and_all_gradients_are_a_convolutions(conv, x):
    out = conv(x)
    torch.testing.assert_close(out, by_hand(conv, x), rtol=1e-12, atol=1e-12)
    towards = torch.rand_like(out)
    ours = torch.autograd.grad(out, (x, *conv.parameters()), towards)
    theirs = torch.autograd.grad(by_hand(conv, x), (x, *conv.parameters()), towards)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_second_derivatives(conv, x):
    assert torch.autograd.gradgradcheck(conv, x)


def test_forward_alone_is_torchs_own(conv, x):
    own = nn.Conv2d(1, 3, 5, padding=1).double()
    own.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x.detach()), own(x.detach()), rtol=0, atol=0)


def test_colour_is_torchs_own():
    conv, x = GreyConv2d(3, 4, 5, padding=2), torch.rand(2, 3, 8, 8, requires_grad=True)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=2)
    torch.testing.assert_close(conv(x), expected, rtol=0, atol=0)


def test_an_attack_goes_by_rows(monkeypatch):
    """What makes it fast is taken: on a CPU, where the images want a gradient."""
    calls = []
    plain = GreyConv2d._by_rows
    monkeypatch.setattr(GreyConv2d, "_by_rows", lambda c, x: calls.append(1) or plain(c, x))
    model = create("lenet+")
    model(torch.rand(2, 1, 28, 28))
    assert not calls
    model(torch.rand(2, 1, 28, 28, requires_grad=True))
    assert calls
