"""What engine="auto" picks, and that looking for it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml
from torch import nn

from surestep import UserError, data, methods
from surestep.config import FitSettings
from surestep.training import picking, preparing
from surestep.training.picking import Pick, pick_engine

SHAPE = torch.Size([1, 8, 8])
CANDIDATES = {("fast", "bf16"), ("reference", "bf16"), ("fast", "fp32"), ("reference", "fp32")}


@pytest.fixture
def clock(monkeypatch):
    """Let each engine take the seconds that a test says, and note on how many images."""
    seen = []

    def use(seconds):
        def timed(model, method, x, y, engine, give_up=float("inf")):
            seen.append((engine, len(x), give_up))
            given = seconds[engine]
            return given(len(x)) if callable(given) else given

        monkeypatch.setattr(picking, "_time", timed)
        # The expected engine is the machine's; here all machines multiply bf16.
        monkeypatch.setattr("surestep.training.engine.has_bf16", lambda _: True)
        return seen

    return use


def pick(tiny, batch=16, precision="auto"):
    return pick_engine(tiny.net().train(), tiny.method("sat-r2"), SHAPE, batch, precision)


def times(**others):
    known = dict.fromkeys(CANDIDATES, 0.04)
    return {**known, **{tuple(k.split("_")): v for k, v in others.items()}}


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ({}, ("fast", "bf16")),
        ({"reference_fp32": 0.035}, ("fast", "bf16")),  # within the margin
        ({"reference_fp32": 0.02}, ("reference", "fp32")),
        ({"fast_fp32": 0.03, "reference_bf16": 0.02}, ("reference", "bf16")),
    ],
)
def test_the_fastest_counts_where_it_is_clearly_so(tiny, clock, others, chosen):
    seen = clock(times(**others))
    picked = pick(tiny)
    assert (picked.engine, picked.precision) == chosen
    assert set(picked.seconds) == {engine for engine, _, _ in seen} == CANDIDATES


def test_a_precision_asked_for_is_kept(tiny, clock):
    clock(times(reference_fp32=0.02, fast_fp32=0.03))
    picked = pick(tiny, precision="fp32")
    assert (picked.engine, picked.precision) == ("reference", "fp32")
    assert set(picked.seconds) == {("fast", "fp32"), ("reference", "fp32")}


@pytest.mark.parametrize("expected", [False, True])
def test_an_engine_that_does_not_fit_is_not_taken(tiny, clock, expected):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    wide = {"fast_fp32": full, "reference_fp32": full}
    clock(times(**wide, **({"fast_bf16": full} if expected else {})))
    if expected:
        with pytest.raises(torch.OutOfMemoryError):
            pick(tiny)
        return
    picked = pick(tiny)
    assert (picked.engine, picked.precision) == ("fast", "bf16")
    assert set(picked.seconds) == {("fast", "bf16"), ("reference", "bf16")}


def test_slow_models_are_timed_on_fewer_images(tiny, clock):
    slow = {engine: lambda n: n / 100 for engine in CANDIDATES}
    seen = clock(slow)
    picked = pick(tiny, batch=100)
    assert [n for _, n, _ in seen] == [4, 16, 16, 16, 16]
    assert picked.images == 16
    seen = clock(times())
    assert pick(tiny, batch=100).images == 100


def test_slow_engines_are_given_up_early(tiny, monkeypatch):
    moments = iter([0.0, 5.0, 5.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr(picking.time, "perf_counter", lambda: next(moments))
    x, y = (t[:4] for t in tiny.data())
    model, method = tiny.net().train(), tiny.method("fgsm")
    # One step to warm up, one of a second, which is too long.
    assert picking._time(model, method, x, y, ("reference", "fp32"), give_up=0.5) == 1.0
    assert next(moments) == 6.0


@pytest.mark.parametrize(("least", "cycles"), [(0.0, 2), (0.03, 2), (0.2, 9)])
def test_short_steps_are_timed_more_often_on_a_gpu(tiny, monkeypatch, least, cycles):
    """Steps of 25 ms, but for the first, which is twice as long, and one, which takes 20 ms."""
    moments, made = [], [0.05, 0.02, *[0.025] * 20]

    def clock():
        moments.append(len(moments) % 2 * made[len(moments) // 2])
        return moments[-1]

    monkeypatch.setattr(picking.time, "perf_counter", clock)
    monkeypatch.setitem(picking._TIMED, "cpu", least)
    x, y = (t[:4] for t in tiny.data())
    model, method = tiny.net().train(), tiny.method("fgsm")
    assert picking._time(model, method, x, y, ("reference", "fp32")) == 0.02
    assert len(moments) == 2 * (1 + cycles)


def test_nothing_is_left_behind(tiny):
    model, method = tiny.net().train(), tiny.method("sat-r3")
    before, state = copy.deepcopy(model), torch.get_rng_state()
    picked = pick_engine(model, method, SHAPE, 8)
    assert tiny.same_weights(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert method.params() == tiny.method("sat-r3").params()
    assert all(seconds > 0 for seconds in picked.seconds.values())


def test_it_is_said_in_one_line():
    seconds = {("fast", "bf16"): 0.01, ("fast", "fp32"): 0.03, ("reference", "fp32"): 0.045}
    assert str(Pick("fast", "bf16", seconds, 128)) == (
        "engine: fast in bf16, 10 ms a step of 128 images "
        "(others: fast fp32 3.0x, reference fp32 4.5x)"
    )


class TestTraining:
    @pytest.fixture(autouse=True)
    def _picked(self, monkeypatch):
        """Pick what no rule would, also for training as short as here."""
        self.picks = []

        def choose(model, method, shape, batch_size, precision):
            self.picks.append((tuple(shape), batch_size, precision))
            return Pick("reference", "bf16", {("reference", "bf16"): 0.01}, batch_size)

        monkeypatch.setattr(preparing, "MIN_STEPS", 1)
        monkeypatch.setattr(preparing, "pick_engine", choose)

    def test_batch_norm_over_all_processes_is_not_tried(self, tiny):
        """Its passes would wait for processes that are waiting for the pick."""
        net = nn.SyncBatchNorm.convert_sync_batchnorm(tiny.net())
        assert isinstance(net[1], nn.SyncBatchNorm)
        config, images = FitSettings(engine="auto"), data.as_images(tiny.data())
        assert preparing._worth_timing(config, tiny.net(), images, total=1)
        assert not preparing._worth_timing(config, net, images, total=1)

    def test_the_pick_is_used_said_and_written_down(self, tiny, tmp_path, capsys):
        tiny.train("sat-r2", engine="auto", out=tmp_path / "run", quiet=False)
        assert self.picks == [((1, 8, 8), 10, "auto")]
        assert "engine: reference in bf16" in capsys.readouterr().err
        config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
        assert (config["engine"], config["precision"]) == ("reference", "bf16")
        tiny.train("sat-r2", engine="reference", precision="bf16", out=tmp_path / "same")
        assert tiny.weights(tmp_path / "run") == tiny.weights(tmp_path / "same")

    def test_a_resumed_run_keeps_it(self, tiny, stopping, tmp_path):
        def train(**place):
            return tiny.train("sat-r2", engine="auto", checkpoint_every=2, **place)

        train(out=tmp_path / "whole")
        stopping(7, lambda: train(out=tmp_path / "run"))
        train(out=tmp_path / "run", resume=True)
        assert len(self.picks) == 2
        assert tiny.weights(tmp_path / "run") == tiny.weights(tmp_path / "whole")

    def test_another_precision_than_begun_is_refused(self, tiny, tmp_path):
        tiny.train("sat-r2", engine="auto", out=tmp_path / "run")
        with pytest.raises(UserError, match=r"precision 'fp32': it was begun with 'bf16'"):
            tiny.train("sat-r2", engine="auto", precision="fp32", out=tmp_path / "run", resume=True)

    def test_short_training_and_named_engines_do_not_pick(self, tiny, monkeypatch):
        assert picking.MIN_STEPS == 100
        tiny.train("fgsm", engine="fast")
        monkeypatch.setattr(preparing, "MIN_STEPS", 11)
        tiny.train("fgsm", engine="auto")
        assert self.picks == []


def test_every_method_can_be_timed(tiny):
    for slug in methods.names():
        picked = pick_engine(tiny.net().train(), tiny.method(slug), SHAPE, 4, "fp32")
        assert picked.precision == "fp32"


def test_a_step_that_regularises_is_timed_with_the_others(tiny, monkeypatch):
    """A cycle of each, and the second is the mean over one: the clock ticks once a reading."""
    method = methods.SATR2(tiny.threat, alpha=0.03, every=4)
    taken = []
    make = picking.make_step

    def noted(*args):
        step = make(*args)

        def call(x, y, index):
            result = step(x, y, index)
            taken.append(len(result.terms))
            return result

        return call

    monkeypatch.setattr(picking, "make_step", noted)
    ticks = iter(range(100))
    monkeypatch.setattr(picking.time, "perf_counter", lambda: float(next(ticks)))
    x, y = (part[:8] for part in tiny.data())
    seconds = picking._time(tiny.net().train(), method, x, y, ("reference", "fp32"))
    assert taken == 3 * [1, 1, 1, 2]
    assert seconds == 1 / 4
