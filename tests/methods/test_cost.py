"""Passes per image, counted where they happen, against what each method declares."""

from collections import Counter

import pytest
import torch
from families import joined, merged
from torch import nn

from surestep import Linf, methods

KINDS = ("forward", "input_grad", "weight_grad")
BY_HAND = joined("BY_HAND")


class Tally(torch.autograd.Function):
    """The identity; counts n images under a name whenever a gradient comes back through it."""

    @staticmethod
    def forward(ctx, value, counts, name, n):
        ctx.note = counts, name, n
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        counts, name, n = ctx.note
        counts[name] += n
        return grad, None, None, None


class Counting(nn.Module):
    """A network that counts the images of its passes, and in ``calls`` the passes themselves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(6, 5))
        self.last = nn.Parameter(torch.randn(3, 6))
        self.middle = nn.Tanh()
        self.counts, self.calls = Counter(), Counter()

    def forward(self, x):
        self.counts["forward"] += len(x)
        self.calls["train" if self.training else "eval"] += 1
        first = Tally.apply(self.first, self.counts, "weight_grad", len(x))
        logits = nn.functional.linear(self.middle(nn.functional.linear(x, first)), self.last)
        return Tally.apply(logits, self.counts, "input_grad", len(x))


def counted(slug, params, n):
    torch.manual_seed(0)
    method, net = methods.get(slug)(Linf(0.1), **params), Counting()
    x, y = torch.rand(n, 5), torch.randint(3, (n,))
    # The first call checks its batch on one image more. Of the next two one is odd, one even.
    for number in range(3):
        method.progress = methods.Progress(number, steps_per_epoch=4)
        method(net, x, y, torch.arange(n)).loss.backward()
        if not number:
            net.counts.clear()
            net.calls.clear()
    for seen in (net.counts, net.calls):
        for kind in seen:
            seen[kind] /= 2
    return method, net


def test_what_builds_on_a_single_step_counts_its_gradients():
    for slug in methods.names():
        method = methods.get(slug)(Linf(0.1))
        if isinstance(method, methods.SingleStep):
            cost = method.cost(1)
            assert cost.input_grad - cost.weight_grad == method.gradients, slug


@pytest.mark.parametrize(("slug", "params", "forward", "input_grad", "weight_grad"), BY_HAND)
def test_passes(slug, params, forward, input_grad, weight_grad):
    method, net = counted(slug, params, 8)
    images = {"forward": forward, "input_grad": input_grad, "weight_grad": weight_grad}
    assert {kind: net.counts[kind] / 8 for kind in KINDS} == images
    declared = method.cost(8)
    for kind in KINDS:
        assert getattr(declared, kind) == pytest.approx(images[kind])
    assert declared.total == pytest.approx(forward + input_grad + weight_grad)


@pytest.mark.parametrize("slug", ["sat-r1", "sat-r2", "sat-r3"])
@pytest.mark.parametrize("params", [{}, {"fraction": 0.125}])
def test_declared_cost_is_the_mean_over_the_steps(slug, params):
    method, net = counted(slug, {**params, "every": 4}, 8)
    found = Counter()
    for _ in range(4):
        net.counts.clear()
        method(net, torch.rand(8, 5), torch.zeros(8, dtype=torch.int64)).loss.backward()
        found.update(net.counts)
    for kind in KINDS:
        assert found[kind] / 32 == pytest.approx(getattr(method.cost(8), kind))


@pytest.mark.parametrize(
    ("slug", "params"),
    [
        *(
            (slug, params)
            for slug in ("sat-r1", "sat-r2", "sat-r3")
            for params in ({}, {"every": 4}, {"every": 2, "fraction": 0.25})
        ),
        ("pgd", {}),
        ("trades", {}),
    ],
)
def test_the_largest_update(slug, params):
    """Of four steps, so that those which are not alike all show."""
    method, net = counted(slug, params, 8)
    sizes = []
    net.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0]) * m.training))
    for _ in range(4):
        method(net, torch.rand(8, 5), torch.zeros(8, dtype=torch.int64), torch.arange(8))
    assert method.peak_images(8) == max(sizes)


@pytest.mark.parametrize("n", [2, 5, 32])
def test_declared_cost_at_other_batch_sizes(slug, n):
    for params in ({}, {"fraction": 0.3}) if slug.startswith("sat-") else ({},):
        method, net = counted(slug, params, n)
        for kind in KINDS:
            assert net.counts[kind] == pytest.approx(n * getattr(method.cost(n), kind))


def test_the_update_is_one_forward_pass(slug):
    _, net = counted(slug, {}, 4)
    assert net.calls["train"] == merged("TRAIN_PASSES").get(slug, 1)


def test_trades_computes_its_clean_output_once():
    _, net = counted("trades", {"steps": 10}, 4)
    assert net.calls["eval"] == 1 + 10


def test_only_the_updates_loss_has_a_graph(slug):
    method, net = counted(slug, {}, 4)
    result = method(net, torch.rand(4, 5), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    net.counts.clear()
    result.loss.backward()
    once = 4 * method.cost(4).weight_grad
    assert net.counts["weight_grad"] == net.counts["input_grad"] == pytest.approx(once)


def test_the_largest_pass_of_pap_is_its_attack(make_task):
    task, sizes = make_task("conv"), []
    method = methods.get("pap")(Linf(0.1), fraction=0.5, steps=4)
    task.net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for _ in range(2):
        method(task.net, task.x, task.y)
    assert max(sizes) == method.peak_images(6) == 21
