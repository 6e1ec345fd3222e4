"""A step of any method, on any network: what it returns and what it leaves behind."""

import copy

import pytest
import torch
from families import joined, merged, remembering
from families.reading import NoReading
from families.trees import same
from torch import nn

from surestep import L2, Linf, UserError, methods
from surestep.methods._registry import METHODS

EPS = 0.1


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("task", ["conv", "flat"], indirect=True)
@pytest.mark.parametrize("train", [True, False])
def test_modes_flags_and_inputs_stay(method, task, train):
    net = task.net.train(train)
    net[0].train(not train)
    net[-1].bias.requires_grad_(False)
    modes = [m.training for m in net.modules()]
    before, x, y = state(net), task.x.clone(), task.y.clone()
    result = method(net, task.x, task.y, task.index)
    assert all(p.grad is None for p in net.parameters())
    result.loss.backward()
    assert [m.training for m in net.modules()] == modes
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == [
        f"{len(net) - 1}.bias"
    ]
    assert net[-1].bias.grad is None
    assert torch.equal(task.x, x)
    assert torch.equal(task.y, y)
    assert not task.x.requires_grad
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name])


def test_modes_come_back_when_the_model_raises(method, make_task):
    task = make_task("conv")
    method(task.net, task.x, task.y, task.index)
    before = state(task.net)

    def fail(module, args):
        raise KeyError("the model broke")

    handle = task.net[3].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="the model broke"):
        method(task.net, task.x, task.y, task.index)
    handle.remove()
    assert all(m.training for m in task.net.modules())
    if method.cost(6).forward > method.cost(6).weight_grad:  # it broke in the attack
        assert all(torch.equal(v, before[name]) for name, v in state(task.net).items())


def test_batch_norm_sees_the_update_once(method, make_task):
    task = make_task("conv")
    method.dropout = 0.0  # what it draws would be drawn anew below
    method(task.net, task.x, task.y, task.index)
    reference, seen = copy.deepcopy(task.net), []
    task.net.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    method(task.net, task.x, task.y, task.index).loss.backward()
    assert len(seen[-1]) == pytest.approx(6 * method.cost(6).weight_grad)
    counted = [net[1].num_batches_tracked.item() for net in (reference, task.net)]
    assert counted[1] == counted[0] + 1
    reference(seen[-1])
    for ours, expected in zip(task.net.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, expected)


def test_eval_mode_steps_leave_the_buffers(method, make_task):
    task = make_task("conv")
    task.net.eval()
    before = dict(task.net.named_buffers())
    before = {name: b.clone() for name, b in before.items()}
    method(task.net, task.x, task.y, task.index).loss.backward()
    assert all(torch.equal(b, before[name]) for name, b in task.net.named_buffers())


def test_result(method, task):
    result = method(task.net, task.x, task.y, task.index)
    assert result.loss.shape == ()
    assert result.loss.requires_grad
    for value in (*result.terms.values(), result.x_adv, result.logits):
        assert not value.requires_grad
    assert all(term.shape == () for term in result.terms.values())
    assert "ce" in result.terms
    assert result.x_adv.shape == task.x.shape
    assert result.logits.shape == (len(task.x), task.classes)
    slack = merged("REACH").get(method.slug, 0.0)
    assert float((result.x_adv - task.x).abs().max()) <= method.threat.eps + slack
    assert float(result.x_adv.min()) >= 0
    assert float(result.x_adv.max()) <= 1


@pytest.mark.parametrize("slug", ["sat-r1", "sat-r2", "sat-r3"])
@pytest.mark.parametrize("base", ["fgsm", "r-fgsm", "rs-fgsm", "zerograd", "multigrad", "sads"])
def test_what_is_compared_lies_where_the_perturbation_does(slug, base, make_task):
    """FGSM's second point leaves the ball by the random step, as published; no other does."""
    task = make_task("conv")
    task.x.fill_(0.5)  # no bound of the data is in the way
    method = methods.get(slug)(Linf(0.1), perturbation=base, fraction=1.0)
    far = float((method.prepare(task.net, task.x, task.y).points - 0.5).abs().max())
    free = slug != "sat-r1" and base in ("fgsm", "sads")
    assert far == pytest.approx(0.1 + (method.alpha if free else 0), abs=1e-6)


@pytest.mark.parametrize("slug", ["sat-r2", "sat-r3"])
def test_a_longer_fgsm_ends_as_it_does_by_itself(slug, make_task, monkeypatch):
    class Long(methods.FGSM):
        size = 0.2

    monkeypatch.setitem(METHODS, "long", Long)
    task = make_task("conv")
    task.x.fill_(0.5)
    method = methods.get(slug)(Linf(0.1), perturbation="long")
    points = method.prepare(task.net, task.x, task.y).points
    assert float((points - 0.5).abs().max()) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("slug", ["gradalign", "elle", "elle-a", "eat"])
@pytest.mark.parametrize(
    "base", ["fgsm", "r-fgsm", "rs-fgsm", "n-fgsm", "zerograd", "multigrad", "sads"]
)
def test_what_builds_on_any_single_step_takes_it(slug, base, make_task):
    """Their image is the base's own; EAT's has the label that is predicted, not the true one."""
    task, points = make_task("conv"), []
    method = methods.get(slug)(Linf(0.1), perturbation=base)
    for each in (method, methods.get(base)(Linf(0.1))):
        each.progress = methods.Progress(step=3, steps_per_epoch=10, epochs=2, images=64)
        torch.manual_seed(0)
        points.append(each(copy.deepcopy(task.net), task.x, task.y).x_adv)
    assert slug == "eat" or torch.equal(*points)
    result = method(task.net, task.x, task.y)
    result.loss.backward()
    assert bool(result.loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in task.net.parameters())
    assert bool(task.net[0].weight.grad.any())


def test_images_that_ask_for_a_gradient_leave_no_graph(method, make_task):
    task = make_task("conv")
    task.x.requires_grad_()
    result = method(task.net, task.x, task.y, task.index)
    assert not result.x_adv.requires_grad
    result.loss.backward()
    assert task.x.grad is None


def test_same_seed_same_step(build, slug, make_task):
    task, losses = make_task("mlp"), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(
            build(slug)(copy.deepcopy(task.net), task.x, task.y, task.index).loss.detach()
        )
    assert torch.equal(losses[0], losses[1])
    if slug == "elle-a":  # whose random points have no weight yet
        return
    assert torch.equal(losses[0], losses[2]) == (slug in joined("DETERMINISTIC"))


@pytest.mark.parametrize("read", [torch.Tensor.item, lambda v: v.view(1).nonzero(), bool])
def test_the_guard_against_waiting_works(read):
    with NoReading(), pytest.raises(AssertionError, match="reads a value"):
        read(torch.ones(()))


def test_dropout_and_other_threats(build, slug, make_task):
    for name, threat in (("mlp", Linf(0.1)), ("flat", L2(0.5)), ("conv", L2(0.5))):
        task = make_task(name, dtype=torch.float32)
        net = nn.Sequential(*list(task.net)[:-1], nn.Dropout(0.5), task.net[-1])
        method = type(build(slug))(threat, **build(slug).params())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses, moves = [], []
        for _ in range(2):
            optimizer.zero_grad()
            result = method(net, task.x, task.y, task.index)
            losses.append(result.loss)
            losses[-1].backward()
            optimizer.step()
            move = (result.x_adv - task.x).flatten(1)
            moves.append(move.norm(dim=1) if isinstance(threat, L2) else move.abs().amax(1))
        assert bool(torch.stack(losses).isfinite().all())
        assert len({float(value.detach()) for value in losses}) == 2
        slack = merged("REACH").get(slug, 0.0) * threat.eps / 0.1
        far = float(torch.cat(moves).max())
        assert far <= threat.eps + slack + 1e-6
        assert (far > 0.1 * threat.eps) == (slug != "standard")


def test_in_a_round_ball_every_move_is_a_step_of_its_norm(build, slug, make_task, monkeypatch):
    """Once L2's steps have length 0, random ones with them, no image moves anywhere."""
    task, params = make_task("mlp"), build(slug).params()
    still = {"sigma": 0.0} if "sigma" in params else {}
    method = methods.get(slug)(L2(0.5), **{**params, **still})
    monkeypatch.setattr(L2, "steepest_step", lambda self, grad, size: torch.zeros_like(grad))
    seen = []
    task.net.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for step in range(3):  # of methods that remember the first has nothing to start from
        method.progress = methods.Progress(step, steps_per_epoch=4)
        result = method(task.net, task.x, task.y, task.index)
        torch.testing.assert_close(result.x_adv, task.x, rtol=0, atol=1e-12)
    known = torch.cat([task.x, torch.full_like(task.x[:1], 0.5)])  # LIET asks about grey
    apart = (torch.cat(seen)[:, None] - known).abs().flatten(2).amax(2)
    assert float(apart.amin(1).max()) < 1e-12


def test_another_data_range(build, slug, make_task):
    """The same batch in [-1, 1], with the radius and the weights to match, gives the same loss."""
    task = make_task("mlp")
    scaled = copy.deepcopy(task.net)
    with torch.no_grad():  # f(2x - 1) of the new network is f(x) of the old
        scaled[1].bias.add_(scaled[1].weight.sum(1) / 2)
        scaled[1].weight.div_(2)
    params = build(slug).params()
    scaling = {*methods.length_names(methods.get(slug)), "sigma"}
    lengths = {k: 2 * v for k, v in params.items() if k in scaling and v}
    losses = []
    for net, x, threat, settings in (
        (task.net, task.x, Linf(0.1), params),
        (scaled, 2 * task.x - 1, Linf(0.2, (-1.0, 1.0)), {**params, **lengths}),
    ):
        torch.manual_seed(0)
        losses.append(methods.get(slug)(threat, **settings)(net, x, task.y, task.index).loss)
    torch.testing.assert_close(losses[0], losses[1])


SPOILT = {
    "bytes": (lambda x, y: (255 * x, y), "x has values"),
    "nan": (lambda x, y: (x * float("nan"), y), "nan"),
    "uint8": (lambda x, y: ((255 * x).to(torch.uint8), y), "torch.uint8"),
    "high labels": (lambda x, y: (x, y + 4), "4 classes"),
    "low labels": (lambda x, y: (x, y - 4), "labels from -"),
    "labels that are no integers": (lambda x, y: (x, y.float()), "torch.float32"),
    "shape": (lambda x, y: (x[..., :3], y), r"\(1, 4, 3\)"),
}


@pytest.mark.parametrize(
    ("slug", "kind"),
    [
        # All have the same look at it, but that UAT takes images without a label.
        *((slug, kind) for slug in ("sat-r2", "uat") for kind in SPOILT),
        *((slug, "high labels") for slug in methods.names() if slug not in ("sat-r2", "uat")),
    ],
    indirect=["slug"],
)
def test_the_first_batch_is_checked(method, make_task, kind):
    task, (spoil, words) = make_task("mlp"), SPOILT[kind]
    before = state(task.net)
    for _ in range(2):  # a refused batch does not count as checked
        with pytest.raises(UserError, match=rf"\A.*{words}.*\Z"):
            method(task.net, *spoil(task.x, task.y))
    assert all(m.training for m in task.net.modules())
    assert all(torch.equal(v, before[name]) for name, v in state(task.net).items())
    assert method(task.net, task.x, task.y, task.index).loss.isfinite()


def test_state_survives_a_resume(build, slug, make_task):
    task = make_task("conv")
    method, resumed = build(slug), build(slug)
    for _ in range(2):
        method(task.net, task.x, task.y, task.index)
    resumed.load_state_dict(copy.deepcopy(method.state_dict()))
    assert same(resumed.state_dict(), method.state_dict())
    losses = []
    for each in (method, resumed):
        # In the first epoch what is remembered of an image is not read yet.
        each.progress = methods.Progress(step=13, steps_per_epoch=10, epochs=2, images=64)
        torch.manual_seed(0)
        losses.append(each(copy.deepcopy(task.net), task.x, task.y, task.index).loss)
    assert torch.equal(*losses)
    assert same(resumed.state_dict(), method.state_dict())


@pytest.mark.parametrize("slug", remembering())
def test_a_state_that_lacks_something_leaves_it_as_it_is(build, slug, make_task):
    task, method = make_task("conv"), build(slug)
    begun = copy.deepcopy(method.state_dict())
    for step in (3, 13):  # of two epochs
        method.progress = methods.Progress(step, steps_per_epoch=10, epochs=2, images=64)
        method(task.net, task.x, task.y, task.index)
    before = copy.deepcopy(method.state_dict())
    assert not same(before, begun)
    method.load_state_dict({})
    assert same(method.state_dict(), before)


def test_half_strength_is_the_method_of_half_the_lengths(slug, build, make_task):
    """And full strength afterwards is exactly what it was."""
    given = {"alpha": 0.04, "eps_low": 0.06}
    lengths = {k: v for k, v in given.items() if k in set(build(slug).params())}
    rest = {k: v for k, v in build(slug, **lengths).params().items() if k not in lengths}
    half = methods.build(slug, Linf(EPS / 2), {**rest, **{k: v / 2 for k, v in lengths.items()}})
    half.progress = build(slug).progress

    def step(method, *shares):
        task = make_task("conv")
        for share in shares:
            method.set_strength(share)
        torch.manual_seed(3)
        return method(task.net, task.x, task.y, task.index)

    weak, expected = step(build(slug, **lengths), 0.5), step(half)
    assert torch.equal(weak.x_adv, expected.x_adv)
    assert torch.equal(weak.loss, expected.loss)
    whole = step(build(slug, **lengths))
    assert torch.equal(step(build(slug, **lengths), 0.5, 1.0).x_adv, whole.x_adv)
