from __future__ import annotations

import pytest
import torch
from torch import nn

from surestep import UserError, data, models, runs
from surestep.config import RunConfig


def test_logits_are_scaled_cosines():
    torch.manual_seed(0)
    head = models.HypersphereHead(5, 3, scale=7.0).double()
    features = torch.randn(4, 5, dtype=torch.float64)
    logits = head(features)
    for i in range(4):
        for k in range(3):
            a, w = features[i], head.weight[k]
            cosine = sum(p * q for p, q in zip(a, w, strict=True))
            cosine = cosine.detach() / (a.norm() * w.detach().norm())
            assert float(logits[i, k].detach()) == pytest.approx(7 * float(cosine))


def test_lengths_have_no_say_and_the_gradient_knows_it():
    torch.manual_seed(0)
    head = models.HypersphereHead(5, 3)
    features = torch.randn(4, 5, requires_grad=True)
    torch.testing.assert_close(head(features), head(3 * features))
    head(features)[:, 0].sum().backward()
    along = (features.grad * features).sum(1)
    torch.testing.assert_close(along, torch.zeros(4), atol=1e-5, rtol=0)


def test_cosines_are_float32_under_autocast():
    torch.manual_seed(0)
    head = models.HypersphereHead(64, 10)
    features = torch.randn(8, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head(features.float()))


@pytest.mark.parametrize("name", ["lenet+", "preactresnet18"])
def test_it_replaces_the_last_layer(name):
    size = 28 if name == "lenet+" else 32
    channels = 1 if name == "lenet+" else 3
    x = torch.rand(2, channels, size, size)
    model = models.on_hypersphere(models.create(name, 7), x, scale=20.0)
    assert isinstance(model.head, models.HypersphereHead)
    assert model.head.scale == 20
    logits = model.eval()(x)
    assert logits.shape == (2, 7)
    assert float(logits.detach().abs().max()) <= 20.001


def test_a_model_that_is_its_last_layer():
    assert isinstance(
        models.on_hypersphere(nn.Linear(4, 3), torch.rand(1, 4)), models.HypersphereHead
    )


def test_two_layers_that_may_make_the_logits():
    x, model = torch.rand(1, 9), nn.Sequential()
    model.add_module("body", nn.Linear(9, 4))
    model.add_module("head", nn.Linear(4, 3))
    models.on_hypersphere(model, x)
    model.head.register_module("dist", nn.Linear(4, 3))
    said = "several linear layers of one shape, head.dist, head, and which of them make the logits"
    with pytest.raises(UserError, match=said):
        models.on_hypersphere(model, x)


def test_layers_inside_are_no_heads():
    """Those that are square, as a transformer's are, and those that have no shape yet."""
    for inside, last in ((nn.LazyLinear(4), (4, 3)), (nn.Linear(4, 4), (4, 4))):
        model = models.on_hypersphere(nn.Sequential(inside, nn.Linear(*last)), torch.rand(1, 4))
        assert isinstance(model[1], models.HypersphereHead)
        assert model[0] is inside


def test_what_cannot_have_one():
    with pytest.raises(UserError, match="no linear layer"):
        models.on_hypersphere(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.rand(1, 1, 8, 8))
    with pytest.raises(UserError, match="scale is -1"):
        models.on_hypersphere(models.create("lenet+"), torch.rand(1, 1, 28, 28), scale=-1.0)


ODD = """
from torch import nn

class Net(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.head = last
        self.hidden = nn.LazyLinear(8)

    def forward(self, x):
        return self.head(self.hidden(x.flatten(1)))

def named_first():
    return Net(nn.Linear(8, 3))

class Gated(Net):
    def forward(self, x):
        return self.head(x.flatten(2)).flatten(1) * self.hidden(x.flatten(1)).mean()

def gated():
    return Gated(nn.Conv1d(1, 3, 16))

class Unused(Net):
    def forward(self, x):
        return x.flatten(1)

def unused():
    return Unused(nn.Linear(8, 3))
"""


def test_the_layer_that_runs_last_is_replaced_not_the_one_registered_last(tmp_path):
    """Or else none: a hidden layer would be trained on the sphere, and the logits not."""
    (tmp_path / "odd.py").write_text(ODD)
    images = data.as_images((torch.rand(3, 1, 4, 4), torch.arange(3)))

    def build(factory):
        config = RunConfig(model=f"{tmp_path / 'odd.py'}:{factory}", head="hypersphere")
        return runs.build_model(config, images)

    model = build("named_first")
    assert isinstance(model.head, models.HypersphereHead)
    assert type(model.hidden) is nn.Linear
    with pytest.raises(UserError, match="runs last, hidden, has 8 outputs, but the model 3 logits"):
        build("gated")
    with pytest.raises(UserError, match="no linear layer of the model runs"):
        build("unused")
