"""Adversarial weight perturbation, step by step against its definition."""

from __future__ import annotations

import copy

import pytest
import torch

from surestep import UserError, methods, runs
from surestep.training import engine as room
from surestep.training import make_step
from surestep.training.awp import perturbed_weights
from surestep.training.engine import make_optimizer


def step_of(tiny, model, method, **settings):
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1, momentum=0.0)
    return make_step(model, method, optimizer, "reference", **settings)


def test_the_gradient_is_that_of_the_moved_weights(tiny):
    gamma, (x, y) = 0.03, tiny.data(8)
    x = x.double()
    model = tiny.net(dtype=torch.float64).train()
    method = tiny.method("fgsm")
    start = copy.deepcopy(model)

    # By hand: the images are crafted on the model, the loss is taken where weights are worse.
    x_adv = method(copy.deepcopy(model), x, y).x_adv
    ahead = copy.deepcopy(start)
    torch.nn.functional.cross_entropy(ahead(x_adv), y).backward()
    with torch.no_grad():
        for weight in ahead.parameters():
            if weight.dim() > 1:
                size = float((weight**2).sum() ** 0.5 / (weight.grad**2).sum() ** 0.5)
                weight += gamma * size * weight.grad
    for weight in ahead.parameters():
        weight.grad = None
    for own, buffer in zip(ahead.buffers(), start.buffers(), strict=True):
        own.copy_(buffer)
    torch.nn.functional.cross_entropy(ahead(x_adv), y).backward()

    result = step_of(tiny, model, method, awp=gamma)(x, y)
    assert torch.equal(result.x_adv, x_adv)
    exact = {"rtol": 0, "atol": 1e-10}
    for own, before, moved in zip(
        model.parameters(), start.parameters(), ahead.parameters(), strict=True
    ):
        torch.testing.assert_close(own, before - 0.1 * moved.grad, **exact)
    # Batch norm has counted one pass: that of the moved weights.
    for own, expected in zip(model.buffers(), ahead.buffers(), strict=True):
        torch.testing.assert_close(own, expected, **exact)
    assert int(model[1].num_batches_tracked) == int(start[1].num_batches_tracked) + 1


def test_a_perturbation_of_zero_changes_nothing(tiny):
    x, y = tiny.data(8)
    models = []
    for settings in ({}, {"awp": 1e-30}):
        model = tiny.net().train()
        step = step_of(tiny, model, tiny.method("sat-r1"), **settings)
        step(x, y)
        step(x, y)
        models.append(model)
    assert tiny.same_weights(*models)


@pytest.mark.parametrize("slug", methods.names())
def test_every_method_takes_it(tiny, slug):
    model = tiny.net().train()
    step = step_of(tiny, model, tiny.method(slug), awp=0.01)
    for _ in range(2):
        step(*tiny.data(), torch.arange(64))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("slug", ["fgsm", "sat-r2", "trades"])
def test_its_passes_are_counted(tiny, slug):
    """A pass backward computes gradients of activations and of weights: two passes' work."""
    x, y = tiny.data(8)
    forward, backward, declared = [], [], []
    for awp in (None, 0.05):
        model, method, passes = tiny.net().train(), tiny.method(slug), [0, 0]

        def count(which, n, passes=passes):
            passes[which] += n

        model.register_forward_pre_hook(lambda _, args, count=count: count(0, len(args[0])))
        model[-1].register_full_backward_hook(lambda m, _, grad, c=count: c(1, len(grad[0])))
        step_of(tiny, model, method, awp=awp)(x, y)
        forward.append(passes[0] / 8)
        backward.append(passes[1] / 8)
        settings = {"method": slug, "params": method.params(), "awp": awp, "batch_size": 8}
        declared.append(runs.passes_of(runs.resolve(settings, "none")))
    more = [after - before for before, after in (forward, backward, declared)]
    assert more[2] == pytest.approx(more[0] + 2 * more[1])
    assert more[0] == more[1] == method.cost(8).weight_grad


def test_a_gradient_that_overflows_leaves_no_trace(tiny):
    """fp16's scale grows until a gradient is infinite; the step is dropped, its pass counts."""
    model = tiny.net().train()
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("inf"))
    with perturbed_weights(model, 0.1):
        assert tiny.same_weights(model, before)
    assert tiny.same_weights(model, before)


def test_a_second_pass_is_no_second_step(tiny):
    """What a loss keeps from step to step is taken in once, at the weights as they were."""
    x, y = tiny.data(8)
    found = []
    for awp in (None, 0.05):
        method = tiny.method("elle-a")
        torch.manual_seed(0)
        step_of(tiny, tiny.net().train(), method, awp=awp)(x, y)
        found.append(method.state_dict()["history"])
    assert float(found[1][0]) == 1.0
    torch.testing.assert_close(found[0], found[1])


def test_smooth_convergence_compares_with_the_batch_before(tiny):
    x, y = tiny.data(8)
    found = []
    for awp in (None, 0.05):
        torch.manual_seed(0)
        method = tiny.method("converge-smooth", perturbation="fgsm", compare="batch")
        step_of(tiny, tiny.net().train(), method, awp=awp)(x, y)
        found.append(method.state_dict()["sums"])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("inside", [False, True])
def test_free_steps_along_the_last_pass(tiny, inside):
    x, y = tiny.data(8)
    method = tiny.method("converge-smooth", perturbation="free") if inside else tiny.method("free")
    model = tiny.net().train()
    ahead, leaf = copy.deepcopy(model), x.clone().requires_grad_()

    def loss(points):
        logits = ahead(torch.cat([points, x]) if inside else points)
        return torch.nn.functional.cross_entropy(logits[: len(x)], y)

    step_of(tiny, model, method, awp=0.05)(x, y)
    loss(x).backward()
    with perturbed_weights(ahead, 0.05):
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
    free = method.base if inside else method
    torch.testing.assert_close(free._pending[2].grad, expected)


def test_it_begins_after_so_many_epochs(tiny, monkeypatch):
    seen = []
    ahead = room.perturbed_weights
    monkeypatch.setattr(
        room, "perturbed_weights", lambda model, size: seen.append(size) or ahead(model, size)
    )
    plain = tiny.train("fgsm", epochs=1)
    late = tiny.train("fgsm", epochs=1, awp=0.02, awp_from=1.0)
    assert tiny.same_weights(plain.model, late.model)
    assert not seen
    tiny.train("fgsm", epochs=2, awp=0.02, awp_from=1.4)
    assert seen == 3 * [0.02]  # of ten steps, five an epoch
    with pytest.raises(UserError, match=r"awp_from \(1\) sets when awp begins: give awp, too"):
        tiny.train("fgsm", awp_from=1.0)
