from __future__ import annotations

import pytest
import torch
from torch import nn

from surestep import UserError
from surestep.training import WeightAverage, validating


def wander(model: nn.Module) -> None:
    """Change the model's weights and its batch statistics, as a training step does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.train()(torch.rand(4, 1, 8, 8))


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999, 0.99999])
def test_it_is_the_weighted_mean_of_the_weights_seen(tiny, decay):
    torch.manual_seed(0)
    model = tiny.net(dtype=torch.float64).float()
    average = WeightAverage(model, decay)
    seen: list[list[torch.Tensor]] = []
    for t in range(1, 31):
        wander(model)
        average.update(model)
        seen.append([p.detach().double().clone() for p in model.parameters()])
        share = [decay ** (t - i) for i in range(1, t + 1)]
        for k, own in enumerate(average.model.parameters()):
            total = sum(s * w[k] for s, w in zip(share, seen, strict=True))
            torch.testing.assert_close(own.double(), total / sum(share), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("decay", [0.5, 0.9998])
def test_the_first_update_takes_the_weights_themselves(tiny, decay):
    # An average that starts at the initial weights is at chance for 1 / (1 - decay) steps.
    average = WeightAverage(tiny.net(seed=0), decay)
    model = tiny.net(seed=1)
    average.update(model)
    assert tiny.same_weights(average.model, model)


def test_batch_statistics_are_averaged_as_the_weights_are(tiny):
    """As published (FastAT, NuAT-WA): the average is over the whole state."""
    torch.manual_seed(0)
    model = tiny.net()
    average = WeightAverage(model, 0.9)
    seen = []
    for _ in range(5):
        wander(model)
        average.update(model)
        seen.append(model[1].running_var.double())
    share = [0.9 ** (4 - k) for k in range(5)]
    mean = sum(s * var for s, var in zip(share, seen, strict=True)) / sum(share)
    torch.testing.assert_close(average.model[1].running_var.double(), mean, rtol=1e-4, atol=1e-6)
    assert average.model[1].num_batches_tracked == model[1].num_batches_tracked == 5


def test_the_model_is_left_alone_and_the_average_needs_no_gradient(tiny):
    model = tiny.net()
    before = [p.detach().clone() for p in model.parameters()]
    average = WeightAverage(model, 0.9)
    average.update(model)
    wander(average.model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in average.model.parameters())


def test_state_round_trip(tiny):
    torch.manual_seed(0)
    model = tiny.net()
    average, other = WeightAverage(model, 0.9), WeightAverage(tiny.net(seed=5), 0.9)
    for _ in range(3):
        wander(model)
        average.update(model)
    other.load_state_dict(average.state_dict())
    assert tiny.same_weights(average.model, other.model)
    # The number of updates must survive too: it decides the next one's share.
    wander(model)
    for both in (average, other):
        both.update(model)
    assert other.updates == 4
    assert tiny.same_weights(average.model, other.model)


def test_without_decay_it_is_the_plain_mean_of_weights_and_statistics(tiny):
    torch.manual_seed(0)
    model = tiny.net()
    average = WeightAverage(model, None)
    seen: list[dict[str, torch.Tensor]] = []
    for _ in range(7):
        wander(model)
        average.update(model)
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
    for name, own in average.model.state_dict().items():
        if own.is_floating_point():
            expected = sum(state[name].double() for state in seen) / 7
            torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(own, seen[-1][name])


def test_swa_averages_from_its_share_on(tiny, monkeypatch):
    """Of two epochs of 5 steps with swa .6 the weights after steps 7 to 10 are averaged."""
    model, seen = tiny.net(), []
    update = WeightAverage.update

    def noting(self, model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        update(self, model)

    monkeypatch.setattr(WeightAverage, "update", noting)
    result = tiny.train("fgsm", model=model, swa=0.6)
    assert len(seen) == 4
    for name, own in result.model.state_dict().items():
        if own.is_floating_point():
            torch.testing.assert_close(own, sum(state[name] for state in seen) / 4)
    # Before that the weights themselves are judged, not an average of none.
    plain = tiny.train("fgsm", model=tiny.net())
    judged = {k: v for k, v in plain.history[0].items() if k.startswith("val_") and k[-1] != "s"}
    assert {k: result.history[0][k] for k in judged} == judged


def test_two_averages_are_one_too_many(tiny):
    with pytest.raises(UserError, match=r"ema \(0.9\) and swa \(0.5\)"):
        tiny.train("fgsm", ema=0.9, swa=0.5)


def test_until_the_average_begins_the_weights_themselves_are_judged(tiny, monkeypatch):
    """Not the weights that the average was made of, which are those of the beginning."""
    judged, trained = [], []
    evaluate = validating.evaluate

    def judge(model, *args, **kwargs):
        judged.append({k: v.clone() for k, v in model.state_dict().items()})
        return evaluate(model, *args, **kwargs)

    def keep(row, model):
        trained.append({k: v.clone() for k, v in model.state_dict().items()})

    monkeypatch.setattr(validating, "evaluate", judge)
    net = tiny.net()
    first = {k: v.clone() for k, v in net.state_dict().items()}
    tiny.train("fgsm", model=net, swa=0.75, epochs=4, on_epoch=keep)
    assert all(torch.equal(judged[0][k], trained[0][k]) for k in first)
    assert not all(torch.equal(judged[0][k], first[k]) for k in first)


def test_a_plain_mean_leaves_other_buffers_alone(tiny):
    net = tiny.net()
    net.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    net.norm = nn.InstanceNorm2d(2, track_running_stats=True)
    average = WeightAverage(net, None)
    for mean in (1.0, 2.0, 6.0):
        net.norm.running_mean.fill_(mean)
        average.update(net)
    assert torch.equal(average.model.mask, net.mask)
    assert average.model.norm.running_mean.tolist() == pytest.approx([3, 3])
