"""Parts that every method takes: dropout that falls, a margin on the true class."""

import copy
import warnings

import pytest
import torch
from families import merged
from torch import nn

from surestep import Linf, UserError, methods

SMALL = merged("SMALL")


def test_dropout_acts_in_the_update_and_falls(make_task):
    """Half-way through training a dropout of 0.6 drops 0.3, of the update's activations only."""
    task, dropped = make_task("conv"), []

    def look(module, args, output):
        dropped.append((module.training, float((output == 0).double().mean())))

    method = methods.FGSM(Linf(0.1), dropout=0.6)
    method.progress = methods.Progress(step=5, steps_per_epoch=5, epochs=2)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(50, 4000), nn.SiLU(), nn.Linear(4000, 4)).double()
    wide[3].register_forward_pre_hook(lambda m, args: look(m, args, args[0]))
    method(wide, task.x, task.y, task.index)
    method(wide, task.x, task.y, task.index)
    (eval_one, none), (train_one, some) = dropped[-2:]
    assert (eval_one, train_one) == (False, True)
    assert none == 0
    assert some == pytest.approx(0.3, abs=0.02)
    assert not wide[2]._forward_hooks


def test_dropout_is_gone_at_the_end_and_everywhere_alike(build, slug, make_task):
    task = make_task("conv")
    losses = []
    # A loop of one's own may go on beyond the length that it told.
    for dropout, step in ((0.0, 9), (0.5, 9), (0.5, 10), (0.0, 10), (0.5, 12), (0.0, 12)):
        torch.manual_seed(0)
        method = build(slug)
        method.dropout = dropout
        method.progress = methods.Progress(step, 10, 1, images=64)
        net = copy.deepcopy(task.net)
        losses.append(method(net, task.x, task.y, task.index).loss.detach())
    if slug != "sads":  # whose own is not 0
        assert not torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[3])
    torch.testing.assert_close(losses[4], losses[5])


def test_a_margin_lowers_the_true_logit_in_the_update_only(make_task):
    task = make_task("mlp")
    method = methods.FGSM(Linf(0.1), margin=1.5, label_smoothing=0.1)
    plain = methods.FGSM(Linf(0.1))(copy.deepcopy(task.net), task.x, task.y)
    result = method(copy.deepcopy(task.net), task.x, task.y)
    assert torch.equal(result.x_adv, plain.x_adv)
    assert torch.equal(result.logits, plain.logits)
    expected = []
    for row, k in zip(plain.logits, task.y, strict=True):
        row = row.clone()
        row[k] -= 1.5
        log_p = row.log_softmax(0)
        expected.append(-0.9 * log_p[k] - 0.1 * log_p.mean())
    torch.testing.assert_close(result.loss.detach(), torch.stack(expected).mean())


@pytest.mark.parametrize(("part", "value"), [("margin", -0.1), ("dropout", 1.0), ("dropout", -1)])
def test_parts_have_a_range(part, value):
    with pytest.raises(UserError, match=f"fgsm: {part} {value}"):
        methods.FGSM(Linf(0.1), **{part: value})


def test_a_perturbation_takes_whole_numbers():
    method = methods.get("sat-r2")(Linf(0.1), perturbation="multigrad starts=2")
    assert method.base.starts == 2
    with pytest.raises(UserError, match="starts 0 is not"):
        methods.get("sat-r2")(Linf(0.1), perturbation="multigrad starts=0")


def test_the_method_inside_takes_words():
    method = methods.get("converge-smooth")(Linf(0.1), perturbation="sat-r2 project=true lam=3")
    assert method.base.project is True
    assert method.base.lam == 3


def test_the_dropout_of_a_perturbation_is_that_of_what_builds_on_it(make_task):
    task = make_task("conv")
    of_sads, own = (
        methods.get("sat-r3")(Linf(0.1), perturbation=perturbation, **parts)
        for perturbation, parts in (("sads", {}), ("fgsm", {"dropout": 0.4}))
    )
    losses = []
    for method in (of_sads, own):
        method.progress = methods.Progress(3, 10, 1, images=64)
        torch.manual_seed(0)
        losses.append(method(copy.deepcopy(task.net), task.x, task.y).loss)
    assert torch.equal(*losses)
    assert of_sads.dropout == 0.4


def test_dropout_wants_activations_that_are_modules():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return torch.relu(self.layer(x.flatten(1)))

    with pytest.raises(UserError, match="acts after activation modules, but the model has none"):
        methods.get("sads")(Linf(0.1))(Functional(), torch.rand(2, 4), torch.tensor([0, 1]))


def test_dropout_is_refused_where_a_part_is_compiled(make_task):
    task = make_task("conv")
    next(m for m in task.net.modules() if isinstance(m, nn.Conv2d)).compile(backend="eager")
    with pytest.raises(UserError, match=r"dropout 0\.4 changes at each step.*torch\.compile"):
        methods.get("sads")(Linf(0.1))(task.net, task.x, task.y)


FOLLOW = ("eat", "gat", "nuat", "liet", "fgsm-mep", "tdat", "converge-smooth", "sads", "iaat")


def test_a_course_that_nobody_tells(slug, make_task):
    """The second step tells what an own loop forgot; of methods that follow no course nothing."""
    task, method = make_task("conv"), methods.get(slug)(Linf(0.1), **SMALL.get(slug, {}))

    def step():
        method(task.net, task.x, task.y, task.index)

    step()
    if slug in FOLLOW:
        with pytest.warns(UserWarning, match=f"{slug} follows a schedule, but its progress is not"):
            step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


def test_a_method_that_is_told_its_progress_asks_for_nothing(make_task):
    task = make_task("mlp")
    method = methods.get("nuat")(Linf(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            method.progress = methods.Progress(step, steps_per_epoch=4, epochs=2)
            copy.deepcopy(method)(task.net, task.x, task.y)
            method(task.net, task.x, task.y)


def test_a_length_that_is_set_after_construction_counts():
    method = methods.get("sat-r2")(Linf(0.3))
    method.alpha = 0.1
    method.set_strength(0.5)
    assert (method.alpha, method.threat.eps) == (0.05, 0.15)
    method.set_strength(1.0)
    assert (method.alpha, method.threat.eps) == (0.1, 0.3)
    assert copy.deepcopy(method).alpha == 0.1
