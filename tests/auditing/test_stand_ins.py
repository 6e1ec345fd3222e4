"""What the attacks made for models that hide are built from, and the binarization test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from constructed import Layer
from torch import nn

import surestep
from surestep import UserError
from surestep.attacks.inputs import features_of
from surestep.auditing import stand_ins
from surestep.auditing.binarization import binarization_rates

THREAT = surestep.Linf(0.3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_program_has_no_layers_to_look_into(net, images):
    program = torch.jit.trace(net.eval(), images[0][:2])
    assert stand_ins.blocking_layers(program, images[0]) == []


def test_blocking_layers_are_the_innermost(net, images):
    model = nn.Sequential(
        nn.Sequential(nn.Identity(), Layer(torch.round), nn.Identity()),
        net,
        nn.Sequential(nn.Identity()),
    )
    assert stand_ins.blocking_layers(model, images[0]) == ["0.1"]
    assert stand_ins.blocking_layers(net, images[0]) == []
    hidden = nn.Sequential(Layer(torch.Tensor.detach), net)
    assert stand_ins.blocking_layers(hidden, images[0]) == ["0"]


def test_a_layer_with_a_wrong_backward_is_passed_straight_through(net, images):
    """Its own gradient is not zero, only useless."""
    x, _ = images
    other = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def forward(z):
        fake = (z.flatten(1) @ other).view_as(z)
        return (z * 7).round().detach() / 7 + fake - fake.detach()

    model = nn.Sequential(Layer(forward), net)
    assert stand_ins.blocking_layers(model, x) == ["0"]
    with stand_ins.bpda(model, x, ["0"]) as smooth:
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(smooth(z).sum(), z)
    q = Layer(forward)(x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(net(q).sum(), q)
    assert torch.allclose(grad, expected, atol=1e-5)


def test_sound_layers_are_not_taken_for_wrong_ones(images):
    """Max-pooling of ties, noise, discontinuities, layers in low precision."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Layer(lambda x: x + 0.1 * torch.randn_like(x)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Layer(lambda z: torch.where(z > 0.3, z, 0.0)),
        nn.MaxPool2d(3, 1, 1),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Softmax(1),
        nn.Flatten(),
        nn.Linear(512, 3),
    )
    assert stand_ins.blocking_layers(model.eval(), images[0][:32]) == []
    half = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 3)).bfloat16()
    wrapped = nn.Sequential(Layer(torch.Tensor.bfloat16), half)
    assert stand_ins.blocking_layers(wrapped, images[0]) == []


def test_straight_through_keeps_the_forward_and_gives_a_gradient(net, images):
    x, _ = images
    quantise = Layer(lambda z: (z * 7).round() / 7)
    model = nn.Sequential(quantise, net)
    plain = model(x)
    with stand_ins.bpda(model, x, ["0"]) as smooth:
        z = x.clone().requires_grad_()
        out = smooth(z)
        (grad,) = torch.autograd.grad(out.sum(), z)
        assert torch.equal(out, plain)
    # The gradient of what follows, at the quantised point.
    q = quantise(x).requires_grad_()
    (expected,) = torch.autograd.grad(net(q).sum(), q)
    assert torch.allclose(grad, expected, atol=1e-5)
    z = x.clone().requires_grad_()
    assert not torch.autograd.grad(model(z).sum(), z)[0].any()


def quantise_in_place(x):
    return x.mul_(7).round_().div_(7)


def code_and_overwrite(x):
    codes = 10 * (x > 0.5).float().repeat(1, 2, 1, 1)
    x.zero_()
    return codes


def test_layers_that_work_in_place_are_passed_like_others(net, images):
    """Alone such a layer must not get a leaf, and what it was given is gone when it is done."""
    x, _ = images
    model = nn.Sequential(Layer(lambda z: 1 * z), Layer(quantise_in_place), net)
    plain = model(x)
    assert stand_ins.blocking_layers(model, x) == ["1"]
    with stand_ins.bpda(model, x, ["1"]) as smooth:
        z = x.clone().requires_grad_()
        out = smooth(z)
        (grad,) = torch.autograd.grad(out.sum(), z)
        assert torch.equal(out, plain)
    q = quantise_in_place(x.clone()).requires_grad_()
    (expected,) = torch.autograd.grad(net(q).sum(), q)
    assert torch.allclose(grad, expected, atol=1e-5)


def test_a_network_is_fitted_to_what_a_layer_was_given(images, monkeypatch):
    fitted = []
    monkeypatch.setattr(stand_ins, "_surrogate", lambda *pair: fitted.append(pair))
    coded = nn.Sequential(Layer(code_and_overwrite), nn.ReLU6(inplace=True))
    model = nn.Sequential(Layer(lambda z: 1 * z), coded, nn.Flatten())
    with stand_ins.bpda(model, images[0], ["1.0"]):
        pass
    ((given, returned),) = fitted
    assert torch.equal(given, images[0])
    assert torch.equal(returned, code_and_overwrite(images[0].clone()))


def test_a_network_is_fitted_to_what_a_forward_in_inference_mode_makes(images):
    class Inferring(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    model = Inferring(Layer(lambda z: 1 * z), Layer(code_and_overwrite), nn.Flatten())
    with stand_ins.bpda(model, images[0], ["1"]):
        assert len(model[1]._forward_hooks) == 1


def test_a_layer_that_others_count_on_to_overwrite_its_input_still_does(images):
    """As a block whose shortcut is what its first activation has left."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.round = Layer(quantise_in_place)

        def forward(self, x):
            x = 1 * x
            return self.round(x) + x

    model, (x, _) = nn.Sequential(Block(), nn.Flatten()), images
    plain = model(x)
    with stand_ins.bpda(model, x, ["0.round"]) as smooth:
        assert torch.equal(smooth(x), plain)


@pytest.mark.parametrize("sound", [False, True])
def test_a_layer_that_changes_nothing_may_block_all_the_same(net, images, sound):
    """Whole numbers stay as they are when rounded; an identity is sound."""
    x = images[0].round()
    model = nn.Sequential(Layer((lambda z: 1 * z) if sound else torch.round), net)
    assert torch.equal(model[0](x), x)
    assert stand_ins.blocking_layers(model, x) == ([] if sound else ["0"])


LEVELS = torch.arange(0.05, 1, 0.1)


@pytest.mark.parametrize(
    "codes",
    [
        lambda z: (z > LEVELS.view(1, -1, 1, 1)).float(),
        lambda z: (z.flatten(1)[:, :, None] > LEVELS).float().flatten(1),
    ],
    ids=["channels", "vector"],
)
def test_a_layer_that_changes_shape_gets_a_fitted_network(images, codes):
    x = images[0][:, :, :3, :3]
    torch.manual_seed(0)
    model = nn.Sequential(Layer(codes), Layer(lambda z: z.flatten(1)))
    with stand_ins.bpda(model, x, ["0"]) as smooth:
        z = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(smooth(z).sum(), z)
    # More light, more comparisons hold: about ten per unit of light.
    assert grad.mean() > 5
    assert (grad > 0).float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_a_fitted_layer_gets_its_type(images, dtype):
    x = images[0].to(dtype)
    codes = Layer(lambda z: (z > 0.5).to(z.dtype).repeat(1, 2, 1, 1))
    model = nn.Sequential(codes, nn.Flatten(), nn.Linear(128, 3)).to(dtype)
    plain = model(x)
    with stand_ins.bpda(model, x, ["0"]) as smooth:
        assert torch.equal(smooth(x), plain)


def test_codes_that_are_whole_numbers_are_not_replaced(run, images):
    """What follows takes nothing else; gradient-free attacks are left."""
    torch.manual_seed(0)
    codes = Layer(lambda z: (z.flatten(1) > 0.5).long())
    model = nn.Sequential(codes, nn.Embedding(2, 2), nn.Flatten(), nn.Linear(128, 3))
    assert stand_ins.blocking_layers(model, images[0]) == []
    found = run(model, data=(images[0], model(images[0]).argmax(1)))
    assert found.verdict != "robust"


def test_a_fit_that_fails_leaves_no_hook(images, net, monkeypatch):
    calls = []

    def fail(given, out):
        if calls:
            raise RuntimeError("no memory")
        calls.append(given)
        return lambda z: z

    monkeypatch.setattr(stand_ins, "_surrogate", fail)
    model = nn.Sequential(Layer(lambda z: z.round()), Layer(lambda z: z.round()), net)
    with (
        pytest.raises(RuntimeError, match="no memory"),
        stand_ins.bpda(model, images[0], ["0", "1"]),
    ):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_expectation_over_passes(net, images, monkeypatch):
    monkeypatch.setattr(stand_ins, "EOT_SAMPLES", 25)
    x, _ = images
    noisy = nn.Sequential(Layer(lambda z: z + 0.3 * torch.randn_like(z)), net)
    torch.manual_seed(0)

    def spread(model):
        return torch.stack([model(x).log_softmax(1) for _ in range(8)]).std(0).mean()

    assert spread(stand_ins.Expected(noisy)) < 0.4 * spread(noisy)


def test_log_probabilities_undo_a_softmax(net, images):
    x, _ = images
    inverse = stand_ins.LogProbabilities(nn.Sequential(net, nn.Softmax(1)))
    apart = inverse(x) - net(x)
    assert torch.allclose(apart, apart[:, :1].expand_as(apart), atol=1e-4)


def test_binarization(net, images, monkeypatch):
    """Among fewer points around an image PGD finds the planted one less often."""
    monkeypatch.setattr("surestep.auditing.binarization.INNER", 999)
    x, _ = images
    torch.manual_seed(0)
    pgd, noise, posed = binarization_rates(net, x[:20], surestep.Linf(0.05), 1000)
    assert posed == 20
    assert pgd > 0.9 > noise
    blind = nn.Sequential(Layer(lambda z: (z * 7).round() / 7), net)
    pgd, noise, posed = binarization_rates(blind, x[:20], surestep.Linf(0.05), 1000) or (0, 0, 0)
    assert pgd < 0.5
    assert binarization_rates(Layer(lambda z: z.flatten(1)[:, :3] * 0), x[:3], THREAT, 1000) is None


def test_binarization_on_one_feature(images):
    """A last layer that sees one number is not a model without logits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Linear(1, 3))
    pgd, _, posed = binarization_rates(net, images[0][:10], surestep.Linf(0.05), 1000)
    assert posed > 0
    assert pgd > 0.9
    failing = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    failing.register_forward_hook(lambda *_: torch.zeros(1))
    with pytest.raises(UserError, match="expected logits"):
        binarization_rates(failing, images[0][:3], THREAT, 1000)


def test_features_are_those_of_the_layer_that_runs_last(images):
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(5, 3), nn.Linear(64, 5)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu())

    net = HeadFirst()
    assert torch.equal(features_of(net, images[0]), net.body(images[0].flatten(1)).relu())


def test_an_attack_that_fails_leaves_no_hook(run, net, monkeypatch):
    """The traceback keeps the generator alive; what it hung on the model must go all the same."""
    model = nn.Sequential(Layer(lambda x: (x * 7).round() / 7), net)

    def fail(*_, **__):
        raise RuntimeError("no more")

    monkeypatch.setattr(stand_ins, "in_turn", fail)
    with pytest.raises(RuntimeError, match="no more") as caught:
        run(model, 0.05)
    assert caught.tb  # it holds all frames
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Heads(nn.Module):
    """A gate, and modules that a look at what decides must pass over."""

    def __init__(self):
        super().__init__()
        self.gate, self.body = nn.Linear(64, 2), nn.Linear(64, 3)
        self.aside, self.probe, self.rare = nn.Linear(64, 4), nn.Linear(64, 2), nn.Linear(64, 2)
        self.some = nn.Linear(64, 2)

    def forward(self, x):
        z = x.flatten(1)
        gate = self.gate(z).argmax(1, keepdim=True)
        self.aside(z)  # nothing depends on it
        self.probe(z.detach())
        if len(x) == 8:
            gate = gate + 0 * self.rare(z).argmax(1, keepdim=True)
        shown = z[z[:, 0] < 2] if len(x) == 8 else z[:1]
        turn = self.some(shown).argmax(1).float().mean()  # does not answer for each image
        return self.body(z) * (1 + gate) + turn


def test_only_what_decides_is_a_switch():
    torch.manual_seed(0)
    model, x = Heads().eval(), torch.rand(8, 1, 8, 8)
    assert stand_ins.switches(model, x) == ["some", "gate"]
    x, y = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    threat = surestep.Linf(0.3)
    attack = stand_ins.on_switch(model, "gate", threat, 10)
    assert attack.uses_gradient
    moved = attack.run(model, x, y)
    turned = [model.gate(z.flatten(1)).argmax(1) for z in (x, moved)]
    assert (turned[0] != turned[1]).float().mean() > 0.5
    assert (moved - x).abs().max() <= 0.3 + 1e-6
    for name in ("some", "rare"):  # on twenty images it does not answer for each, or not at all
        assert stand_ins.on_switch(model, name, threat, 10).run(model, x, y) is x


def test_what_votes_without_any_gradient_is_a_switch():
    torch.manual_seed(0)

    class Vote(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 3), nn.Linear(64, 3)

        def forward(self, x):
            nets = (self.one, self.two)
            return sum(F.one_hot(net(x.flatten(1)).argmax(1), 3).float() for net in nets)

    assert stand_ins.switches(Vote().eval(), torch.rand(8, 1, 8, 8)) == ["two", "one"]


def test_rounding_to_a_lower_precision_is_no_wrong_gradient():
    """The small steps that layers are compared on would be lost in bfloat16, or TF32 on a GPU."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(192, 3)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert stand_ins.blocking_layers(net, torch.rand(8, 3, 8, 8)) == []
