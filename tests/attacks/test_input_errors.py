"""Bad input is refused in one line that names the value."""

import re
import warnings

import pytest
import torch
from torch import nn

import surestep
from surestep import Linf, UserError, attacks
from surestep.attacks.inputs import check_inputs


def refusal(*words):
    """Match a message of one line that has all the words."""
    return r"\A" + "".join(f"(?=.*{re.escape(w)})" for w in words) + r".*\Z"


BAD_BATCHES = {
    "0 to 255": (lambda x: (255 * x).round(), None, ("x", "[0, 1]", "scale")),
    "normalised": (lambda x: (x - 0.5) / 0.25, None, ("x", "-1.", "normalisation")),
    "nan": (lambda x: x.index_fill(0, torch.tensor([2]), float("nan")), None, ("x", "nan")),
    "infinite": (lambda x: x.index_fill(0, torch.tensor([2]), float("inf")), None, ("x", "inf")),
    "a hair above": (lambda x: x.index_fill(0, torch.tensor([2]), 1.001), None, ("x", "1.001")),
    "uint8": (lambda x: (255 * x).to(torch.uint8), None, ("x", "torch.uint8", "/ 255")),
    "int64": (lambda x: x.long(), None, ("x", "torch.int64")),
    "no batch dimension": (lambda x: x.flatten(), None, ("x", "(216,)")),
    "empty": (lambda x: x[:0], lambda y: y[:0], ("x", "(0, 1, 6, 6)")),
    "wrong size": (lambda x: x[..., :4], None, ("(1, 6, 4)", "mat1 and mat2")),
    "wrong channels": (lambda x: x.repeat(1, 3, 1, 1), None, ("(3, 6, 6)", "channels")),
    "float64 images": (lambda x: x.double(), None, ("torch.float64",)),
    "float labels": (None, lambda y: y.float(), ("y", "torch.float32", "torch.int64")),
    "int32 labels": (None, lambda y: y.int(), ("y", "torch.int32")),
    "one-hot labels": (None, lambda y: nn.functional.one_hot(y, 4), ("y", "(6, 4)", "(6,)")),
    "too few labels": (None, lambda y: y[:-1], ("y", "(5,)", "(6,)")),
    "label K": (None, lambda y: y.clone().fill_(4), ("y", "4", "4 classes", "0 to 3")),
    "label -1": (None, lambda y: y.index_fill(0, torch.tensor([1]), -1), ("y", "from -1")),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batch(convnet, images, threat, case):
    spoil_x, spoil_y, words = BAD_BATCHES[case]
    x, y = images()
    x = x if spoil_x is None else spoil_x(x)
    y = y if spoil_y is None else spoil_y(y)
    with pytest.raises(UserError, match=refusal(*words)):
        attacks.fgsm(convnet, x, y, threat)


def test_every_attack_looks_at_its_input(convnet, images, threat, attack):
    x, y = images()
    for bad_x, bad_y in ((255 * x, y), (x, y + 4), (x[..., 1:], y)):
        with pytest.raises(UserError, match=refusal()):
            attack(convnet, bad_x, bad_y, threat)


def test_the_range_is_the_threat_models_own(convnet, images):
    x, y = images()
    attacks.fgsm(convnet, 2 * x - 1, y, Linf(0.1, (-1.0, 1.0)))
    attacks.fgsm(convnet, 255 * x, y, Linf(8, (0.0, 255.0)))
    with pytest.raises(UserError, match=refusal("[-1, 1]")):
        attacks.fgsm(convnet, 255 * x, y, Linf(0.1, (-1.0, 1.0)))


class Spoilt(nn.Module):
    def __init__(self, net, spoil):
        super().__init__()
        self.net, self.spoil = net, spoil

    def forward(self, x):
        return self.spoil(self.net, x)


def fail_on_size(net, x):
    assert x.shape[-1] == 224, "Input image width (6) doesn't match model (224)."
    return net(x)


BAD_MODELS = {
    "empty tuple": (lambda net, x: (), ("tuple", "logits")),
    "tuple of dicts": (lambda net, x: ({"logits": net(x)},), ("tuple", "logits")),
    "dict": (lambda net, x: {"scores": net(x)}, ("dict", "logits")),
    "one score": (lambda net, x: net(x)[:, :1], ("(1, 1)", "K >= 2")),
    "no classes": (lambda net, x: net(x)[:, 0], ("(1,)", "(N, K)")),
    "maps": (lambda net, x: net(x)[:, :, None], ("(1, 4, 1)", "(N, K)")),
    "other batch": (lambda net, x: net(x).repeat(2, 1), ("(2, 4)", "1 images")),
    "detached images": (lambda net, x: net(x.detach()), ("no gradient", "detach()")),
    "detached logits": (lambda net, x: net(x).detach(), ("no gradient", "detach()")),
    "assertion": (fail_on_size, ("(1, 6, 6)", "doesn't match model (224)")),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model(convnet, images, threat, gradient_attack, case):
    spoil, words = BAD_MODELS[case]
    modes = [m.training for m in convnet.modules()]
    with pytest.raises(UserError, match=refusal(*words)):
        gradient_attack(Spoilt(convnet, spoil), *images(), threat)
    assert [m.training for m in convnet.modules()] == modes


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda net: net.state_dict(), ("state_dict", "load_state_dict", "pass the module")),
        (lambda net: net.forward, ("a method", "torch.nn.Module", "wrap")),
        (lambda net: "runs/one", ("'runs/one'", "surestep.load")),
    ],
)
def test_no_module(convnet, images, threat, model, words):
    x, y = images()
    given = model(convnet)
    for call in (
        lambda: attacks.fgsm(given, x, y, threat),
        lambda: surestep.evaluate(given, (x, y), threat),
        lambda: surestep.audit(given, (x, y), threat),
        lambda: surestep.fit(given, (x, y), surestep.methods.Standard(threat)),
    ):
        with pytest.raises(UserError, match=refusal(*words)):
            call()


def test_numpy_images(convnet, images, threat):
    x, y = images()
    step = surestep.methods.Standard(threat)
    with pytest.raises(UserError, match=refusal("x is a numpy array", "torch.from_numpy(x)")):
        step(convnet, x.numpy(), y)
    with pytest.raises(UserError, match=refusal("y is a list", "tensor")):
        step(convnet, x, y.tolist())


def test_what_fails_in_torchscript(images, threat):
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ torch.ones(3, 2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net = torch.jit.script(Net())
    with pytest.raises(UserError, match=refusal("mat1 and mat2 shapes")):
        attacks.fgsm(net, *images(), threat)
    with pytest.raises(UserError, match=refusal("mat1 and mat2 shapes")):
        surestep.evaluate(net, images(), threat, ["fgsm"])


def test_the_ends_of_a_data_range_that_float32_has_not():
    """What clamp returns is inside, though it is above 2.64 in float64."""
    threat = Linf(0.1, bounds=(-2.1179, 2.64))
    x = torch.tensor([[9.0, -9.0, 0.0]]).clamp(*threat.bounds)
    net = torch.nn.Linear(3, 2)
    check_inputs(net, x, torch.tensor([0]), threat)
    with pytest.raises(UserError, match="x has values in"):
        check_inputs(net, x * 1.0001, torch.tensor([0]), threat)
