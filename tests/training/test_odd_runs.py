"""Runs that are set up, begin or end in unusual ways."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import surestep
from surestep import UserError, methods, processes
from surestep.config import FitSettings
from surestep.training import _fit, make_optimizer, make_step, stopping
from surestep.training.display import Display
from surestep.training.engine import Engine
from surestep.training.preparing import Guard, _batch_of


class Promises(BatchSampler):
    """Says that it has more batches than it yields."""

    def __len__(self):
        return super().__len__() + 2


def test_a_loader_that_yields_less_than_its_length(tiny):
    """Otherwise the schedule would never reach its end, and a resume would miscount."""
    data = TensorDataset(*tiny.data())
    loader = DataLoader(data, batch_sampler=Promises(RandomSampler(data), 16, drop_last=True))
    with pytest.raises(UserError, match="ended after 4 of 6 batches of an epoch: give fewer step"):
        tiny.train(data=loader, validation=tiny.data(8))
    fitted = tiny.train(data=loader, validation=tiny.data(8), steps_per_epoch=4, epochs=1)
    assert fitted.history[-1]["step"] == 4


def test_the_batch_of_a_batch_sampler_is_known(tiny):
    data = TensorDataset(*tiny.data())
    loader = DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 24, drop_last=True))
    assert loader.batch_size is None
    size, said = _batch_of(loader, FitSettings())
    assert (size, said) == (24, "the DataLoader's batch_size (24)")


def test_a_state_that_is_more_than_tensors_is_refused(tiny, tmp_path):
    class Counts(nn.Identity):
        def get_extra_state(self):
            return {"seen": 0}

    net = nn.Sequential(tiny.net(), Counts())
    with pytest.raises(UserError, match=r"state has 1\._extra_state, a dict, but only tensors"):
        tiny.train(model=net, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_that_would_be_left_out_is_refused(tiny):
    with pytest.raises(UserError, match="val_images 0 means no validation: leave validation or"):
        tiny.train(validation=tiny.data(8), val_images=0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_sgds_learning_rate_is_not_for_others(tiny, name):
    with pytest.raises(UserError, match=f"optimizer '{name}' needs a learning rate of its own"):
        surestep.fit(tiny.net(), tiny.data(), tiny.method("fgsm"), optimizer=name)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda: methods.FGSM(surestep.Linf(0.1), margin=2.0), r"with margin 2\.0"),
        (lambda: methods.FGSM(surestep.Linf(0.1, bounds=(-1.0, 1.0))), r"with bounds \[-1\.0, 1"),
    ],
)
def test_a_run_goes_on_with_margin_and_data_range_as_begun(tiny, stopping, tmp_path, changed, said):
    def train(method, **place):
        data = DataLoader(TensorDataset(*tiny.data()), 10)
        return tiny.train(method, data=data, val_images=0, out=tmp_path / "run", **place)

    stopping(8, lambda: train(methods.FGSM(surestep.Linf(0.1))))
    with pytest.raises(UserError, match=said):
        train(changed(), resume=True)
    train(methods.FGSM(surestep.Linf(0.1)), resume=True)


def test_an_optimizer_with_state_follows_the_weights_into_another_layout(tiny):
    """Fused kernels walk weights and momenta side by side in memory."""
    x, y = tiny.data(16)

    def trained(fused):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))
        optimizer = make_optimizer("sgd", net.parameters(), lr=0.1)
        optimizer.param_groups[0]["fused"] = fused
        for engine in (Engine(), Engine(channels_last=True)):
            step = make_step(net, methods.Standard(tiny.threat), optimizer, engine)
            for _ in range(3):
                step(x, y)
        return [p.detach() for p in net.parameters()]

    for one, other in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(one, other)


def test_of_processes_that_validate_one_that_fails_is_heard(monkeypatch):
    """It tells the others where they would wait for it, and raises its own error there."""
    stop, told = stopping.StopRequest(), []

    def largest(value, device):
        told.append(value)
        return max(value, *others)

    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "all_max", largest)
    device = torch.device("cpu")
    others = [stopping._DONE, stopping._DONE]
    assert stop.exchange(device)  # this one works
    assert not stop.exchange(device, done=True)
    stop.exchange(device, failed=True)  # nothing is raised: its own error is on its way
    others = [stopping._WORKING, stopping._DONE]
    assert stop.exchange(device, done=True)
    others = [stopping._FAILED, 0]
    with pytest.raises(stopping.FailedElsewhere):
        stop.exchange(device)
    stop.exchange(device, failed=True)
    others = [signal.SIGINT, 0]
    with pytest.raises(stopping.StopRequested):
        stop.exchange(device)
    others = [0, 0]
    stop.number = signal.SIGTERM
    with pytest.raises(stopping.StopRequested):
        stop.exchange(device, done=True)
    failed = stopping._FAILED
    assert told == [1, 0, failed, 0, 1, failed, 1, signal.SIGTERM]


def test_images_that_another_process_cannot_judge_are_said(tiny, monkeypatch):
    def elsewhere(*_, **__):
        raise stopping.FailedElsewhere

    monkeypatch.setattr(stopping.StopRequest, "exchange", elsewhere)
    with pytest.raises(UserError, match="held-out images of another process cannot be judged"):
        tiny.train("fgsm", epochs=1)


def test_a_radius_that_was_set_stays_through_a_warm_up(tiny, monkeypatch):
    seen, craft = [], methods.SATR2.craft
    method = methods.get("sat-r2")(tiny.threat)
    method.set_strength(0.5)

    def watched(self, *args):
        seen.append(self.threat.eps)
        return craft(self, *args)

    monkeypatch.setattr(methods.SATR2, "craft", watched)
    tiny.train(method, epochs=1, eps_warmup=0.4)  # 2 of 5 steps
    assert seen[-3:] == [0.5 * tiny.threat.eps] * 3
    assert seen[0] < seen[-1]


def test_weights_of_three_dimensional_convolutions():
    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv3d(1, 2, (1, 3, 3)), nn.Linear(2 * 16, 3)
            self.flat = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.head(self.conv(x[:, None, :1]).flatten(1))

    model = Engine.choose("fast").place(Video())
    assert model.flat.weight.is_contiguous(memory_format=torch.channels_last)
    x, y = torch.rand(16, 1, 6, 6), torch.arange(16) % 3
    fitted = surestep.fit(
        model, (x, y), methods.get("fgsm")(surestep.Linf(0.1)), epochs=1, batch_size=8,
        val_images=0, engine="fast", quiet=True,
    )  # fmt: skip
    assert fitted.history[-1]["loss"] > 0


def test_a_run_folder_wants_a_registered_method(tiny, tmp_path):
    class Mine(methods.SATR2):
        pass

    method = Mine(tiny.threat)
    assert method.slug == "Mine"  # and not its parent's
    with pytest.raises(UserError, match="but Mine has no name: put @surestep"):
        tiny.train(method, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fitted = tiny.train(method, epochs=1)
    assert isinstance(fitted.method, Mine)
    assert fitted.method is not method


def test_a_description_must_tell_the_method(tiny, tmp_path):
    with pytest.raises(UserError, match="describe needs the entries method and params"):
        tiny.train(out=tmp_path / "run", describe={"note": "x"})


@pytest.mark.parametrize(("together", "wrong"), [(1, 16), (1, 5), (1, 20), (2, 10), (2, 40)])
def test_a_loader_has_its_own_batch_size(tiny, monkeypatch, together, wrong):
    def stop(*args, **kwargs):
        raise tiny.Stopped

    monkeypatch.setattr(processes, "world_size", lambda: together)
    monkeypatch.setattr(_fit, "prepare", stop)
    loader = DataLoader(TensorDataset(*tiny.data(20)), 10)
    with pytest.raises(UserError, match=f"batch_size {wrong} has no effect: .* its own, 10"):
        tiny.train(data=loader, batch_size=wrong)
    with pytest.raises(tiny.Stopped):
        tiny.train(data=loader, batch_size=10 * together)


def test_numbers_that_nobody_sees_are_read_rarely():
    assert Display(10, quiet=True)._numbers.seconds == 10


def test_an_assertion_on_the_gpu_is_explained(tiny):
    """Whatever comes after it in that process fails, too, and says nothing of labels."""
    guard = Guard(tiny.net(), "batch_size (8)", None)
    said = "a step, of 8 images, stopped on the GPU: a label is probably outside 0 to K - 1"
    with pytest.raises(UserError, match=said), guard("a step", 8):
        raise RuntimeError("CUDA error: device-side assert triggered")
