from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from surestep import Linf, UserError, posthoc
from surestep.activations import straight_through
from surestep.attacks.gradients import input_gradient
from surestep.attacks.losses import log_odds
from surestep.data import as_images
from surestep.evaluation import evaluate
from surestep.posthoc.mean_sparse import layers, set_statistics


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(70, 1, 8, 8, generator=generator)
    y = torch.arange(70) % 3
    for k in range(3):
        x[y == k, :, k::3] = 0.5 + 0.5 * x[y == k, :, k::3]
    return as_images((x, y))


@pytest.fixture(scope="module")
def weights():
    return {}


@pytest.fixture
def trained(net, images, weights):
    """Trained for the first test that asks."""
    net = copy.deepcopy(net)
    if not weights:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images.x), images.y).backward()
            optimizer.step()
        net.zero_grad()
        weights.update(copy.deepcopy(net.state_dict()))
    net.load_state_dict(weights)
    return net.eval()


def test_values_near_the_mean_become_the_mean():
    layer = posthoc.MeanSparse(2, 0.5)
    layer.mean.copy_(torch.tensor([1.0, -1.0]))
    layer.std.copy_(torch.tensor([2.0, 0.2]))
    x = torch.tensor([[[0.1, 2.1], [-1.05, -1.2]], [[1.9, -3.0], [5.0, -0.95]]])
    expected = torch.tensor([[[1.0, 2.1], [-1.0, -1.2]], [[1.0, -3.0], [5.0, -1.0]]])
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("batch_size", [1, 7, 70])
def test_statistics_are_those_of_all_images(trained, images, batch_size):
    found = posthoc.measure(trained, images, batch_size)
    (mean, std) = found["2"]
    before = trained[1](trained[0](images.x)).detach().double()
    for k in range(6):
        values = before[:, k].flatten().tolist()
        centre = sum(values) / len(values)
        spread = (sum((v - centre) ** 2 for v in values) / len(values)) ** 0.5
        assert float(mean[k]) == pytest.approx(centre, abs=1e-6)
        assert float(std[k]) == pytest.approx(spread, rel=1e-5)


def test_measuring_leaves_the_model(trained, images):
    trained.train()
    before = copy.deepcopy(trained.state_dict())
    posthoc.measure(trained, images)
    assert trained.training
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    assert not any(m._forward_pre_hooks for m in trained.modules())


@pytest.mark.usefixtures("nothing_stays_compiled")
def test_parts_that_are_compiled_are_measured(trained, images):
    expected = posthoc.measure(trained, images)
    model = nn.Sequential(copy.deepcopy(trained))
    model[0].compile(backend="eager")
    model(images.x)
    found = posthoc.measure(model, images)
    assert found.keys() == {"0.2"}
    assert torch.equal(found["0.2"][0], expected["2"][0])


@pytest.mark.usefixtures("nothing_stays_compiled")
def test_of_a_compiled_model_the_module_inside_is_measured(trained, images):
    expected = posthoc.measure(trained, images)
    compiled = torch.compile(trained, backend="eager")
    compiled(images.x)
    found = posthoc.measure(compiled, images)
    assert found.keys() == expected.keys() == {"2"}
    for name, (mean, std) in found.items():
        assert torch.equal(mean, expected[name][0])
        assert torch.equal(std, expected[name][1])
    inside = posthoc.insert(compiled, images.x[:1], 0.5)
    assert inside is trained
    assert len(layers(inside)) == 1


def sparse(model, images, threshold):
    found = posthoc.measure(model, images)
    model = posthoc.insert(copy.deepcopy(model), images.x[:1], threshold)
    set_statistics(model, found)
    return model


def test_a_threshold_of_zero_changes_nothing(trained, images):
    logits = trained(images.x)
    assert torch.equal(sparse(trained, images, 0.0)(images.x), logits)
    assert not torch.equal(sparse(trained, images, 0.5)(images.x), logits)


def test_weights_go_into_a_model_of_the_same_structure(trained, images, net):
    hard = sparse(trained, images, 0.3)
    fresh = posthoc.insert(copy.deepcopy(net).eval(), images.x[:1], 0.3)
    fresh.load_state_dict(hard.state_dict())
    assert torch.equal(fresh(images.x), hard(images.x))


def test_the_gradient_passes_dead_zones_only_straight_through(trained, images):
    hard = sparse(trained, images, 100.0)  # everything is dead
    true, logits = input_gradient(hard, images.x, images.y)
    assert float(true.abs().max()) == 0
    with straight_through(hard):
        through, same = input_gradient(hard, images.x, images.y)
    assert torch.equal(same, logits)
    # Of what follows, at the mean, passed on to what comes before.
    (mean, _) = posthoc.measure(trained, images)["2"]
    x = images.x.clone().requires_grad_()
    before = trained[:2](x)
    dead = mean.float().view(1, -1, 1, 1).expand_as(before).clone().requires_grad_()
    (grad,) = torch.autograd.grad(log_odds(trained[2:](dead), images.y).sum(), dead)
    (expected,) = torch.autograd.grad(before, x, grad)
    torch.testing.assert_close(through, expected)
    assert float(through.abs().max()) > 0
    assert not any(layer.straight_through for layer in layers(hard))


def test_masked_robustness_does_not_count(trained, images):
    """Every gradient attack runs with the true gradients, and with those straight through."""
    hard = sparse(trained, images, 0.6)
    attacks = ["pgd-20", "square-100"]
    assert list(evaluate(trained, images, Linf(0.1), attacks).robust_accuracy) == attacks
    found = evaluate(hard, images, Linf(0.1), attacks)
    assert list(found.robust_accuracy) == ["pgd-20", "pgd-20-bpda", "square-100"]
    assert found.robust_accuracy["pgd-20-bpda"] < found.robust_accuracy["pgd-20"]
    assert not any(layer.straight_through for layer in layers(hard))


def test_the_threshold_with_the_best_worst_case_is_taken(trained, images, monkeypatch):
    """Means are of the training images; the attacks' source is the model without dead zones."""
    train, validation = images.subset(torch.arange(35)), images.subset(torch.arange(35, 70))
    judged = []

    def spy(model, data, *args, **options):
        judged.append((data, *options["sources"]))
        return evaluate(model, data, *args, **options)

    monkeypatch.setattr("surestep.posthoc.hardening.evaluate", spy)
    found = posthoc.harden(
        trained,
        train,
        validation,
        Linf(0.05),
        thresholds=(0.2, 50.0),
        attacks=("pgd-10", "square-50"),
    )
    assert [row["threshold"] for row in found.search] == [0.0, 0.2, 50.0]
    best = max(row["worst_case_accuracy"] for row in found.search)
    first = next(r["threshold"] for r in found.search if r["worst_case_accuracy"] == best)
    assert found.threshold == first != 50.0
    assert all(layer.threshold == found.threshold for layer in layers(found.model))
    assert not layers(trained)
    assert all(data is validation and source is trained for data, source in judged)
    ((mean, std),) = posthoc.measure(trained, train).values()
    (layer,) = layers(found.model)
    torch.testing.assert_close(layer.mean, mean.float(), rtol=0, atol=0)
    torch.testing.assert_close(layer.std, std.float(), rtol=0, atol=0)


class Swapped(nn.Module):
    """Activations that are defined in another order than they run in, and work in place."""

    def __init__(self, net, inplace):
        super().__init__()
        self.second, self.first = nn.ReLU(inplace), nn.ReLU(inplace)
        self.conv, self.wide = net[0], nn.Conv2d(6, 4, 1)

    def forward(self, x):
        z = self.first(self.conv(x))
        return self.second(self.wide(z)).flatten(1)


def test_statistics_are_of_what_goes_in_and_find_their_layer(net, images):
    model = Swapped(net, inplace=True).eval()
    found = posthoc.measure(model, images)
    plain = copy.deepcopy(model)
    plain.first = plain.second = nn.ReLU()
    before = plain.conv(images.x).detach()
    wide = plain.wide(before.relu()).detach()
    for name, values in (("first", before), ("second", wide)):
        rows = values.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(found[name][0], rows.mean(1))
        torch.testing.assert_close(found[name][1], rows.std(1, correction=0))
    hard = sparse(model, images, 0.3)
    for name in ("first", "second"):
        torch.testing.assert_close(hard.get_submodule(name)[0].mean, found[name][0].float())


def test_an_activation_used_twice_is_refused(net, images):
    model = Swapped(net, inplace=False).eval()
    model.second = model.first
    for look in (
        lambda: posthoc.measure(model, images),
        lambda: posthoc.insert(model, images.x[:1], 0.1),
    ):
        with pytest.raises(UserError, match=r"activation (first|second) is used twice"):
            look()


def test_no_pass_takes_more_images_than_asked(trained, images):
    sizes = []
    handle = trained.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    options = {"thresholds": [], "attacks": ["fgsm"], "n": 9, "batch_size": 9}
    posthoc.harden(trained, images, images, Linf(0.1), **options)
    handle.remove()
    assert max(sizes) == 9


class Alive(TorchDispatchMode):
    """Counts how many tensors of at least ``size`` values are alive at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.most, self.known = size, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.size:
            self.known.append(weakref.ref(out))
        self.most = max(self.most, sum(one() is not None for one in self.known))
        return out


@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(1, 1, 1), lambda: nn.Linear(8, 8)])
def test_one_layer_at_a_time_is_kept(images, layer):
    def most(depth):
        layers = [m for _ in range(depth) for m in (layer(), nn.ReLU())]
        with Alive(images.x.numel()) as alive:
            posthoc.measure(nn.Sequential(*layers).eval(), images)
        return alive.most

    assert most(8) == most(2)


def test_full_memory_is_told_in_one_line(trained, images):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trained.register_forward_pre_hook(full)
    with pytest.raises(UserError, match=r"^out of memory in .* lower batch_size \(30\)$"):
        posthoc.harden(trained, images, images, Linf(0.1), batch_size=30)


def test_what_cannot_be_hardened(trained, images):
    with pytest.raises(UserError, match="no activation modules"):
        posthoc.harden(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), images, images, Linf(0.1))
    for threshold in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match=rf"thresholds \[{threshold}\]: give finite standard"):
            posthoc.harden(trained, images, images, Linf(0.1), thresholds=[threshold])


class Tokens(nn.Module):
    """Eight rows of eight pixels as tokens, their features last, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 5), nn.GELU(), nn.Linear(5, 3)

    def forward(self, x):
        return self.down(self.act(self.up(x.squeeze(1)))).mean(1)


def test_a_pair_is_taken_and_a_hardened_model_is_not(trained, images):
    pair = (images.x, images.y)
    options = {"thresholds": [0.2], "attacks": ["fgsm"], "n": 10}
    found = posthoc.harden(trained, pair, pair, Linf(0.1), **options)
    assert [row["threshold"] for row in found.search] == [0.0, 0.2]
    with pytest.raises(UserError, match="the model has MeanSparse layers already: harden the one"):
        posthoc.harden(found.model, pair, pair, Linf(0.1), **options)


def test_channels_of_tokens_are_last(images):
    model = Tokens().eval()
    (mean, std) = posthoc.measure(model, images, 11)["act"]
    features = model.up(images.x.squeeze(1)).detach().double().reshape(-1, 5)
    assert torch.allclose(mean, features.mean(0), atol=1e-7)
    assert torch.allclose(std, features.std(0, correction=0), atol=1e-7)
    sparse = posthoc.insert(copy.deepcopy(model), images.x[:1], 0.5)
    set_statistics(sparse, {"act": (mean, std)})
    near = (features - mean).abs() < 0.5 * std
    expected = torch.where(near, mean.expand_as(features), features).reshape(70, 8, 5).float()
    assert 0.2 < near.float().mean() < 0.6
    assert torch.allclose(sparse(images.x), model.down(model.act(expected)).mean(1), atol=1e-6)


class Gated(nn.Module):
    """The gate is computed before what it gates, as in a SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.act, self.down = (
            *(nn.Linear(8, 5), nn.Linear(8, 5), nn.SiLU(), nn.Linear(5, 3)),
        )

    def forward(self, x):
        x = x.squeeze(1)
        gate, up = self.gate(x), self.up(x)
        return self.down(self.act(gate) * up).mean(1)


def test_channels_of_a_gate_are_last(images):
    model = Gated().eval()
    (mean, std) = posthoc.measure(model, images)["act"]
    features = model.gate(images.x.squeeze(1)).detach().double().reshape(-1, 5)
    torch.testing.assert_close(mean, features.mean(0))
    torch.testing.assert_close(std, features.std(0, correction=0))
    (layer,) = layers(posthoc.insert(model, images.x[:1], 0.5))
    assert (layer.dim, len(layer.mean)) == (-1, 5)


class Held(nn.Module):
    """An activation that is registered in two places; the second is called."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.act, self.net = net[2], net

    def forward(self, x):
        return self.net(x)


def test_an_activation_is_replaced_wherever_it_is_held(trained, images):
    model = Held(trained).eval()
    hard = sparse(model, images, 0.5)
    assert len(layers(hard)) == 1
    assert hard.act is hard.net[2]
    assert torch.equal(hard(images.x), sparse(trained, images, 0.5)(images.x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            8, 2, 16, activation=nn.ReLU(), batch_first=True, dropout=0
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x.squeeze(1)).mean(1))


@pytest.fixture
def fused():
    """Whether torch's fused path is on, as a function that turns it on and off."""
    yield torch.backends.mha.set_fastpath_enabled
    torch.backends.mha.set_fastpath_enabled(True)


def test_a_layer_that_only_runs_with_gradients_is_refused(images, fused):
    model = Transformer().eval()
    said = r"leaves MeanSparse before encoder\.activation out of passes without .*fastpath_enabled"
    with pytest.raises(UserError, match=said):
        posthoc.insert(copy.deepcopy(model), images.x[:1], 0.5)
    fused(False)
    hard = sparse(model, images, 0.5)
    with torch.no_grad():
        judged, dense = hard(images.x), model(images.x)
    torch.testing.assert_close(hard(images.x.clone().requires_grad_()), judged)
    assert not torch.allclose(judged, dense, atol=1e-3)
