from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families.reading import NoReading
from torch import Tensor, nn

import surestep
from surestep import devices, methods
from surestep.attacks import fgsm
from surestep.data import Batches, as_images
from surestep.devices import has_bf16
from surestep.errors import UserError
from surestep.training import Engine, WeightAverage, loop, make_optimizer, make_step
from surestep.training import engine as engine_room
from surestep.training.memory import Frugal
from surestep.training.schedules import learning_rate

WEIGHTS = [nn.Parameter(torch.ones(2))]
FAST32 = Engine(torch.float32, channels_last=True, tuned=True)
FAST16 = Engine(torch.bfloat16, channels_last=True, tuned=True)


def gradients(tiny: Any, method: str, engine: str | Engine, **kwargs: Any) -> Tensor:
    """Take one step and return the weight gradient it used."""
    torch.manual_seed(0)
    model = tiny.net().train()
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    make_step(model, tiny.method(method), optimizer, engine, **kwargs)(*tiny.data())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", ["standard", "fgsm", "sat-r2", "sat-r3"])
def test_fast_and_reference_agree_in_float32(tiny, method):
    reference = gradients(tiny, method, "reference")
    fast = gradients(tiny, method, FAST32)
    torch.testing.assert_close(fast, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        *(("standard", 0.02), ("fgsm", 0.1), ("sat-r1", 0.1), ("sat-r2", 0.1), ("sat-r3", 0.1)),
        ("pgd", 0.2),
    ],
)
def test_bf16_agrees_within_its_precision(tiny, method, tolerance):
    # bf16 has 8 bits; under an attack, signs of the smallest input gradients turn as well.
    reference = gradients(tiny, method, "reference")
    error = (gradients(tiny, method, FAST16) - reference).norm() / reference.norm()
    assert 0 < error < tolerance


def moved(tiny: Any, precision: torch.dtype, **kwargs: Any) -> Tensor:
    """Take one step of learning rate 1 and return by how much the weights moved."""
    model = tiny.net(norm=False).train()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = make_optimizer("sgd", model.parameters(), lr=1.0, momentum=0.0)
    make_step(model, tiny.method("standard"), optimizer, Engine(precision), **kwargs)(*tiny.data())
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


@pytest.mark.parametrize("kwargs", [{}, {"clip_grad": 0.01}, {"awp": 0.01}])
def test_fp16_scales_the_loss_and_takes_the_scale_out_again(tiny, kwargs):
    exact = moved(tiny, torch.float32, **kwargs)
    assert (moved(tiny, torch.float16, **kwargs) - exact).norm() < 0.02 * exact.norm()
    if "clip_grad" in kwargs:
        assert exact.norm() == pytest.approx(0.01, rel=1e-3)


def test_fp16_skips_a_step_that_overflows(tiny):
    model = tiny.net(norm=False).train()
    optimizer = make_optimizer("sgd", model.parameters(), lr=1.0)
    step = make_step(model, tiny.method("standard"), optimizer, Engine(torch.float16))
    before, scale = tiny.net(norm=False), step.scaler.get_scale()
    model[-1].weight.register_hook(lambda grad: grad * float("inf"))
    step(*tiny.data())
    assert tiny.same_weights(model, before)
    assert step.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("overflows", [0, 2])
def test_momentum_of_a_dropped_step_is_none(tiny, overflows):
    """Fused SGD makes room for it in the first step, and fills it by taking that step."""
    results = []
    for bad in (overflows, 0):
        model = tiny.net(norm=False).train()
        optimizer = make_optimizer("sgd", model.parameters(), lr=0.1, momentum=0.9)
        step = make_step(model, tiny.method("standard"), optimizer, Engine(torch.float16))
        hook = model[-1].weight.register_hook(lambda grad: grad * float("inf"))
        for _ in range(bad):
            # What lay in the memory that the momentum gets.
            garbage = [torch.full_like(p, 1e6) for p in model.parameters()]
            del garbage
            step(*tiny.data())
        hook.remove()
        for _ in range(2):
            step(*tiny.data())
        results.append(model)
    for ours, plain in zip(*(m.parameters() for m in results), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)


def test_channels_last(tiny):
    model = tiny.net()
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    step = make_step(model, tiny.method("fgsm"), optimizer, FAST32)
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    placed = step.engine.place_images(torch.rand(2, 3, 8, 8))
    assert placed.is_contiguous(memory_format=torch.channels_last)
    features = torch.rand(2, 8)
    assert step.engine.place_images(features) is features
    plain = tiny.net()
    make_step(plain, tiny.method("fgsm"), optimizer, "reference")
    assert plain[3].weight.is_contiguous()


@pytest.mark.parametrize("method", methods.names())
def test_the_loss_is_float32_under_autocast(tiny, method):
    model = tiny.net().train()
    dtypes = []
    model[0].register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype))
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    result = make_step(model, tiny.method(method), optimizer, FAST16)(
        *tiny.data(), torch.arange(64)
    )
    assert set(dtypes) == {torch.bfloat16}
    assert result.loss.dtype == result.logits.dtype == result.x_adv.dtype == torch.float32
    assert not result.loss.requires_grad
    assert {v.dtype for v in result.terms.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("reference", "auto", Engine()),
        ("reference", "bf16", Engine(torch.bfloat16)),
        ("fast", "fp32", FAST32),
        ("fast", "bf16", FAST16),
        ("auto", "fp16", Engine(torch.float16, channels_last=True, tuned=True)),
        ("auto", "auto", FAST16 if has_bf16(torch.device("cpu")) else FAST32),
    ],
)
def test_choose(name, precision, expected):
    assert Engine.choose(name, precision) == expected


def test_choose_on_mps():
    """There batch norm's backward in channels_last is wrong."""
    assert Engine.choose("fast", device="mps") == Engine(torch.float32, tuned=True)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Engine.choose("fats"), "unknown engine 'fats': did you mean 'fast'"),
        (lambda: Engine.choose("fast", "bf61"), "unknown precision 'bf61': did you mean 'bf16'"),
        (
            lambda: make_optimizer("sdg", WEIGHTS, lr=1),
            "unknown optimizer 'sdg': did you mean 'sgd'",
        ),
    ],
)
def test_unknown_names(call, said):
    with pytest.raises(UserError, match=said):
        call()


def test_a_model_without_parameters_is_refused(tiny):
    with pytest.raises(UserError, match="no parameters"):
        make_optimizer("sgd", nn.Flatten().parameters(), lr=0.1)
    some = make_optimizer("sgd", tiny.net().parameters(), lr=0.1)
    with pytest.raises(UserError, match="no parameters"):
        make_step(nn.Flatten(), tiny.method("fgsm"), some)


def test_clip_grad(tiny):
    whole = gradients(tiny, "fgsm", "reference")
    small = gradients(tiny, "fgsm", "reference", clip_grad=0.01)
    torch.testing.assert_close(small, whole * 0.01 / whole.norm(), rtol=1e-3, atol=1e-7)
    loose = gradients(tiny, "fgsm", "reference", clip_grad=1e6)
    torch.testing.assert_close(loose, whole, rtol=0, atol=0)


def test_the_average_is_updated_after_the_step(tiny):
    model = tiny.net().train()
    average = WeightAverage(model, 0.9)
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    make_step(model, tiny.method("fgsm"), optimizer, average=average)(*tiny.data())
    assert average.updates == 1
    assert tiny.same_weights(average.model, model)


def perturb_by_hand(model: nn.Module, x: Tensor, y: Tensor, threat: surestep.Linf) -> Tensor:
    model.eval()
    start = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(start), y), start)
    model.train()
    return threat.project(x + threat.eps * grad.sign(), x)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("standard", {}),
        ("fgsm", {}),
        ("standard", {"momentum": 0.5, "weight_decay": 0.1, "clip_grad": 0.01}),
        *(("standard", {"optimizer": name, "weight_decay": 0.1}) for name in ("adam", "adamw")),
    ],
)
def test_fit_is_a_plain_loop_bit_for_bit(tiny, tmp_path, method, settings):
    x, y = tiny.data()
    model = tiny.net().train()
    # Fused as in fit: the other kernels round differently.
    options = {"lr": 0.05, "weight_decay": settings.get("weight_decay", 5e-4), "fused": True}
    optimizer = {
        "sgd": functools.partial(torch.optim.SGD, momentum=settings.get("momentum", 0.9)),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }[settings.get("optimizer", "sgd")](model.parameters(), **options)
    losses = []
    for xb, yb, _ in Batches(as_images((x, y)), 12, seed=3).epoch(0):
        xb = perturb_by_hand(model, xb, yb, tiny.threat) if method == "fgsm" else xb
        loss = F.cross_entropy(model(xb), yb)
        optimizer.zero_grad()
        loss.backward()
        if most := settings.get("clip_grad"):
            nn.utils.clip_grad_norm_(model.parameters(), most)
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 5
    fitted = tiny.train(
        method,
        out=tmp_path / "run" if method == "fgsm" else None,
        epochs=1,
        batch_size=12,
        seed=3,
        schedule="constant",
        val_images=0,
        **settings,
    )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(fitted.model.state_dict()[name], value, rtol=0, atol=0)
    assert fitted.history[0]["loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_the_optimizer_steps_once_and_gradients_do_not_add_up(tiny):
    model = tiny.net().train()
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.0)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step = make_step(model, tiny.method("sat-r3", alpha=0.0), optimizer, "reference")
    model[1].momentum = 0.0  # so that nothing changes between the steps
    seen = []
    for _ in range(3):
        step(*tiny.data())
        seen.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 3
    for one, other in itertools.pairwise(seen):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


PARTS = ("awp", "fp16", "in parts")
"""What a step may have beside the clipping and the average, which all of these have."""


@pytest.mark.parametrize(
    ("method", "optimizer", "part"),
    [
        *((method, "sgd", "") for method in methods.names()),
        ("sat-r1", "adamw", ""),
        *((method, "sgd", part) for method in ("sat-r1", "free", "pgd") for part in PARTS),
    ],
)
def test_a_step_waits_for_the_device_nowhere(tiny, monkeypatch, method, optimizer, part):
    model = tiny.net().train()
    step = make_step(
        Frugal(model, 2) if part == "in parts" else model,
        tiny.method(method),
        make_optimizer(optimizer, model.parameters(), lr=0.1),
        Engine(torch.float16) if part == "fp16" else FAST16,
        clip_grad=1.0,
        average=WeightAverage(model, 0.9),
        awp=0.01 if part == "awp" else None,
    )
    batch = (*tiny.data(), torch.arange(64))
    step(*batch)  # the first batch is checked

    def waits(*_: Any, **__: Any) -> Any:
        pytest.fail("the step reads a tensor on the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "nonzero"):
            patch.setattr(Tensor, name, waits)
        for name in ("bool", "float", "int", "index", "contains"):
            patch.setattr(Tensor, f"__{name}__", waits)
        with NoReading():
            result = step(*batch)
    assert torch.isfinite(result.loss)


@pytest.mark.parametrize("method", ["sat-r2", "fgsm-mep"])
def test_nor_does_the_loop_around_it(tiny, monkeypatch, method):
    """What is summed up and what is looked for after each step; but for the lines that it shows."""
    steps, inside = [], False
    read = {name: getattr(Tensor, name) for name in ("item", "tolist", "numpy", "__bool__")}
    read |= {name: getattr(Tensor, name) for name in ("__float__", "__int__", "__index__")}

    def begin(job, step):
        nonlocal inside
        steps.append(step)
        inside = step > 0  # the first batch is checked
        return apply_schedules(job, step)

    def end(self, *args, **kwargs):
        nonlocal inside
        inside = False
        return check(self, *args, **kwargs)

    def guarded(name):
        def call(self, *args):
            if inside:
                pytest.fail(f"the loop reads a tensor on the host ({name})")
            return read[name](self, *args)

        return call

    apply_schedules, check = loop.apply_schedules, loop.Trainer._check_finite
    monkeypatch.setattr(loop, "apply_schedules", begin)
    monkeypatch.setattr(loop.Trainer, "_check_finite", end)
    monkeypatch.setattr(loop.Display, "due", lambda _: False)
    for name in read:
        monkeypatch.setattr(Tensor, name, guarded(name))
    tiny.train(method, epochs=1, val_images=0, clip_grad=1.0, ema=0.9)
    assert len(steps) > 5


@pytest.mark.parametrize("views", [False, True])
def test_make_step_takes_the_steps_of_fit(tiny, views):
    """In a loop of one's own, over the same batches, the weights come out the same."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        if views:
            return Viewing()
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))

    x, y = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3
    options = {"epochs": 2, "batch_size": 10, "lr": 0.05, "schedule": "step", "engine": "fast"}
    fitted = tiny.train("fgsm", model=make(), data=(x, y), val_images=0, **options).model
    net = make().train()
    optimizer = make_optimizer("sgd", net.parameters(), lr=0.05, weight_decay=5e-4)
    step = make_step(net, tiny.method("fgsm"), optimizer, "fast")
    source = Batches(as_images((x, y)), 10, seed=0)
    for number, batch in enumerate(b for epoch in range(2) for b in source.epoch(epoch)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate("step", 0.05, number / 4)
        step(*batch)
    for name, value in fitted.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value)
    assert step.engine.channels_last is not views


def test_awp_moves_the_weights_once_a_step(tiny):
    model = tiny.net().train()
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1)
    moved = []
    optimizer.register_step_post_hook(lambda *_: moved.append(1))
    step = make_step(model, tiny.method("sat-r2"), optimizer, "reference", awp=0.01)
    for number in (1, 2):
        step(*tiny.data(), torch.arange(64))
        assert len(moved) == number


def test_casts_that_lost_their_gradients_are_made_again(tiny, monkeypatch):
    """Releases of torch up to 2025 keep casts of a pass without gradients."""
    x, y = tiny.data(8)
    with Engine.choose("fast", "bf16", torch.device("cpu")).autocast(torch.device("cpu")):
        kept = not devices.casts_lose_gradients(torch.device("cpu"))
    assert kept or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
    cleared, found = [], []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(1))
    for lost in (False, True):
        monkeypatch.setattr(devices, "casts_lose_gradients", lambda _, lost=lost: lost)
        for precision in ("fp32", "bf16"):
            net, method = tiny.net().train(), tiny.method("trades")
            optimizer = make_optimizer("sgd", net.parameters(), lr=0.1)
            engine = Engine.choose("fast", precision, torch.device("cpu"))
            assert bool(torch.isfinite(make_step(net, method, optimizer, engine)(x, y).loss))
            found.append(len(cleared))
            cleared.clear()
            # In a loop of one's own, too.
            with engine.autocast(torch.device("cpu")):
                method(net, x, y)
                found.append(len(cleared))
                # And after an attack by itself.
                fgsm(net, x, y, tiny.threat)
                found.append(len(cleared) - found[-1])
            cleared.clear()
    usual, more = found[:6], found[6:]  # autocast clears by itself when it ends
    again = [b - a for a, b in zip(usual, more, strict=True)]
    assert again[:3] == [0, 0, 0]
    assert min(again[3:]) >= 1


@pytest.mark.parametrize("method", methods.names())
def test_colour_images_in_the_fast_engine(tiny, method):
    """Of several channels channels_last is not a mere name; two steps, for methods with memory."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(16, 3, 8, 8, generator=generator, dtype=torch.float64)
    y, found = torch.arange(16) % 3, []
    for chosen in ("reference", FAST32):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Tanh()]
        net = nn.Sequential(*layers, nn.Conv2d(6, 6, 3, 1, 1), nn.Flatten(), nn.Linear(96, 3))
        net = net.double().train()
        optimizer = make_optimizer("sgd", net.parameters(), lr=0.1)
        step = make_step(net, tiny.method(method), optimizer, chosen)
        with tiny.nothing_random():
            for _ in range(2):
                step(x, y, torch.arange(16))
        found.append([p.grad for p in net.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


class Viewing(nn.Module):
    """Flattens with ``view``, which channels_last does not allow."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.head(x.view(x.size(0), -1))


@pytest.mark.parametrize("engine", ["auto", "fast"])
@pytest.mark.parametrize("kind", ["pair", "dataset", "loader"])
def test_a_model_that_views_is_trained_contiguous(engine, kind, monkeypatch):
    x, y = torch.rand(48, 3, 8, 8), torch.arange(48) % 3
    data = {
        "pair": (x, y),
        "dataset": torch.utils.data.TensorDataset(x, y),
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8),
    }[kind]
    monkeypatch.setattr("surestep.training.preparing.MIN_STEPS", 1)  # the engines are timed, too
    model = Viewing()
    fitted = surestep.fit(
        model, data, surestep.methods.SATR2(surestep.Linf(0.1)), epochs=2, batch_size=8,
        validation=(x[:8], y[:8]), engine=engine, quiet=True,
    )  # fmt: skip
    assert fitted.history[-1]["loss"] > 0
    assert model.conv.weight.is_contiguous()
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    placed = Engine.choose("fast")
    assert placed.suited(placed.place(other), torch.Size([3, 8, 8])) == placed


def test_a_model_that_views_in_train_mode_alone():
    class Auxiliary(Viewing):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.head(x.view(x.size(0), -1) if self.training else x.flatten(1))

    fast, shape = Engine.choose("fast"), torch.Size([3, 8, 8])
    model = fast.place(Auxiliary())
    assert fast.suited(model.eval(), shape).channels_last
    assert not fast.suited(model.train(), shape).channels_last
    assert model.conv.weight.is_contiguous()
    assert int(model.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_weights_that_are_complex(name):
    """The fused kernels take none."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = make_optimizer(name, [weight, nn.Parameter(torch.ones(2))], lr=0.1)
    weight.abs().sum().backward()
    optimizer.step()
    assert (weight.abs() < 1).all()


def test_only_a_tuned_engine_keeps_freed_memory(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(engine_room, "keep_freed_memory", lambda: asked.append(1))
    Engine().place(tiny.net())
    assert not asked
    FAST32.place(tiny.net())
    assert asked
