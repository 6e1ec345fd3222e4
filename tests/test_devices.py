"""Devices that are not here: one without float64, as Apple's are, played by the CPU."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.data import DataLoader, TensorDataset

import surestep
from surestep import L2, Linf, UserError, devices, methods, posthoc
from surestep.auditing import stand_ins
from surestep.data import as_images, augment
from surestep.data._splits import divide, mixed
from surestep.training.holding_out import hold_out


class NoFloat64(TorchDispatchMode):
    """Fail where an operation returns float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func} returned float64, which the device lacks")
        return out


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", {"cpu"})
    return NoFloat64


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 1, 8, 8, generator=generator), torch.arange(12) % 3


def test_the_guard_sees_float64(without_float64):
    with without_float64(), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()


def test_perturbations(without_float64, images):
    x, _ = images
    with without_float64():
        in_box = Linf(0.1).project(x + Linf(0.1).random_delta(x, 3.0), x)
        in_ball = L2(0.5).project(x + L2(0.5).random_delta(x, 3.0), x)
    assert (in_box - x).abs().max() <= 0.1
    assert (in_ball - x).flatten(1).norm(dim=1).max() <= 0.5


@pytest.mark.parametrize("slug", methods.names())
def test_a_step_of_every_method(slug, without_float64, net, images):
    method = methods.build(slug, Linf(0.1), {})
    x, y = images
    with without_float64():
        for _ in range(2):
            method.progress = methods.Progress(images=len(x))
            method(net, x, y, torch.arange(len(x))).loss.backward()


@pytest.mark.usefixtures("small_budget")
def test_evaluation_and_audit(without_float64, net, images):
    task = (net, images, Linf(0.1))
    before = surestep.evaluate(*task, budget="quick"), surestep.audit(*task, budget="quick")
    with without_float64():
        judged, audited = (
            surestep.evaluate(*task, budget="quick"),
            surestep.audit(*task, budget="quick"),
        )
    assert judged.robust_accuracy == before[0].robust_accuracy
    assert judged.per_class == before[0].per_class
    assert [c.status for c in audited.checks] == [c.status for c in before[1].checks]
    assert audited.verdict == before[1].verdict


def test_probabilities_are_undone(without_float64, net, images):
    model = nn.Sequential(net.eval(), nn.Softmax(dim=1))
    with without_float64():
        undone = stand_ins.LogProbabilities(model)(images[0])
    torch.testing.assert_close(undone.softmax(1), model(images[0]))


def test_training(without_float64, net, images):
    with without_float64():
        fitted = surestep.fit(
            net, images, methods.SATR2(Linf(0.1)), epochs=2, batch_size=4, validation=images
        )
    assert len(fitted.history) == 2


def test_training_on_a_loader_of_doubles(without_float64, net, images):
    """They become what the device has before they are moved to it, where torch would raise."""
    pairs = DataLoader(TensorDataset(images[0].double(), images[1]), 4)
    fitted = surestep.fit(net, pairs, methods.SATR2(Linf(0.1)), epochs=1, validation=pairs)
    assert len(fitted.history) == 1


@pytest.mark.parametrize("type", [torch.float16, torch.float64, torch.int64, torch.uint8])
def test_a_tensor_is_moved_in_a_type_that_the_device_has(without_float64, type):
    moved = devices.move(torch.ones(2, dtype=type), torch.device("cpu"))
    assert moved.dtype == (torch.float32 if type == torch.float64 else type)


def test_channel_statistics(without_float64, net, images):
    data = as_images(images)
    exact = posthoc.measure(net, data)
    with without_float64():
        rough = posthoc.measure(net, data)
    for name, (mean, std) in exact.items():
        assert rough[name][0].dtype == torch.float32
        torch.testing.assert_close(rough[name][0], mean.float())
        torch.testing.assert_close(rough[name][1], std.float())


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.max": ""}, math.inf),
    ],
)
def test_the_limit_of_a_container(tmp_path, files, share):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices._quota(tmp_path) == share


@pytest.mark.parametrize(
    ("limit", "own", "threads"), [(1.2, None, 2), (0.1, None, 1), (2, "9", 9), (math.inf, None, 7)]
)
def test_no_more_threads_than_cores(monkeypatch, limit, own, threads):
    set_to = [9]
    monkeypatch.setattr(devices, "_quota", lambda _: limit)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setenv("OMP_NUM_THREADS", own or "")
    if own is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    for _ in range(2):
        devices.pick_device("cpu")
    assert set_to[-1] == threads
    assert len(set_to) <= 2


@pytest.mark.parametrize(
    ("said", "full"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("FIND was unable to find an engine to execute this computation", True),
        ("Unable to find a valid cuDNN algorithm to run convolution", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False),
    ],
)
def test_words_of_full_memory(said, full):
    assert devices.out_of_memory(RuntimeError(said)) == full


def test_float64_where_there_is_any():
    assert devices.finest(torch.device("cpu")) == devices.finest(torch.device("cuda"))
    assert devices.finest(torch.device("cpu")) == torch.float64
    assert devices.finest(torch.device("mps")) == torch.float32


@pytest.mark.parametrize(
    ("name", "rank", "count", "own"),
    [
        ("cuda", "3", 8, "cuda:3"),
        ("cuda", "3", 2, "cuda:1"),
        ("cuda:0", "3", 8, "cuda:0"),
        ("cuda", "", 8, "cuda"),
        ("cuda", "3", 0, "cuda"),
    ],
)
def test_each_process_begins_on_its_own_device(monkeypatch, name, rank, count, own):
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert devices._own_device(name) == own


def test_images_that_would_fill_the_device_stay_on_the_host(monkeypatch):
    from surestep.data import _batches, as_images

    images = as_images((torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)))
    for free, room in ((1e9, True), (2 * 4 * 64 * 4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2e9))
        assert _batches._has_room(torch.device("cuda"), images) is room
    assert _batches._has_room(torch.device("cpu"), images)
    assert _batches._has_room(torch.device("mps"), images)
    large = SimpleNamespace(x=SimpleNamespace(nbytes=2**31))
    assert not _batches._has_room(torch.device("mps"), large)


class TestExact:
    """What decides over an image has all of float32's digits; on a GPU two switches take some."""

    @pytest.fixture
    def switches(self):
        places = [(place, name) for place, name, _ in devices._tf32_places()]
        before = [getattr(*place) for place in places]
        for place in places:
            setattr(*place, "tf32" if place[1] == "fp32_precision" else True)
        yield lambda: {getattr(*place) for place in places}
        for place, value in zip(places, before, strict=True):
            setattr(*place, value)

    def test_on_a_gpu(self, switches):
        (on,) = switches()
        with devices.exact(torch.device("cuda")):
            (off,) = switches()
        assert (on, off) in (("tf32", "ieee"), (True, False))
        assert switches() == {on}

    def test_the_older_switches_can_be_read_meanwhile(self):
        """A model may set cudnn.flags in its forward, which reads them."""
        before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            with devices.exact(torch.device("cuda")):
                assert torch.backends.cudnn.allow_tf32 is False
                assert torch.get_float32_matmul_precision() == "highest"
                with torch.backends.cudnn.flags(enabled=True):
                    pass
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.backends.cudnn.allow_tf32 = before[0]
            torch.set_float32_matmul_precision(before[1])

    def test_where_products_are_rounded_an_image_must_be_clearly_wrong(self, switches, monkeypatch):
        gpu = torch.device("cuda")
        for capability, off in (((8, 0), 0.01), ((7, 5), 0.0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            assert devices.rounding(gpu) == off
            with devices.exact(gpu):
                assert devices.rounding(gpu) == 0
        assert devices.rounding(torch.device("cpu")) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert devices.rounding(torch.device("cpu")) == 0.05

    def test_elsewhere_they_are_left_alone(self, switches):
        on = switches()
        with torch.autocast("cpu", torch.bfloat16), devices.exact(torch.device("cpu")):
            assert switches() == on
            assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("said", ["CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"])
def test_memory_that_is_full_in_a_librarys_words(said):
    full = pytest.raises(UserError, match="out of memory in a step: do less")
    with full, devices.memory_for("a step", "do less"):
        raise RuntimeError(f"CUDA error: {said} when calling `create(handle)`")


def test_a_gpu_that_all_processes_would_share(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="'cuda:1' would be shared by all processes on this"):
        devices.pick_device("cuda:1")


def test_a_default_device_of_the_users_is_not_for_random_orders():
    """Torch refuses a generator of one device for values of another."""
    torch.set_default_device("meta")
    try:
        drawn = [
            *hold_out(20, 2, seed=0),
            mixed(5),
            *divide(20, "train", what="data", test=True)[None],
            augment.CropFlip().draw(5, torch.Generator("cpu").manual_seed(0)).dy,
        ]
    finally:
        torch.set_default_device(None)
    assert {value.device.type for value in drawn} == {"cpu"}


def test_a_device_may_be_one_of_torchs():
    assert devices.pick_device(torch.device("cpu")) == devices.pick_device("cpu")
    with pytest.raises(UserError, match="device 'meta' cannot be used here"):
        devices.pick_device(torch.device("meta"))


def test_a_kind_of_device_whose_random_state_is_not_kept_is_refused(monkeypatch):
    class There:
        device = torch.device("xpu", 0)

    monkeypatch.setattr(devices.torch, "ones", lambda *_, **__: There())
    with pytest.raises(UserError, match=r"'xpu' cannot be used here \(xpu is not supported\)"):
        devices.pick_device("xpu")


@pytest.mark.parametrize(
    ("takes", "asked"),
    [
        (lambda size: True, [(-3, 1 << 30), (-1, (1 << 31) - 1)]),
        (lambda size: size <= 32 << 20, [(-3, 1 << 30), (-3, 32 << 20), (-1, (1 << 31) - 1)]),
        (lambda size: False, [(-3, 1 << 30), (-3, 32 << 20)]),
    ],
)
def test_freed_memory_is_kept_as_far_as_the_c_library_lets_it(monkeypatch, takes, asked):
    """An older glibc refuses more than 32 MiB."""
    calls = []

    class Libc:
        gnu_get_libc_version = None

        def mallopt(self, option, value):
            calls.append((option, value))
            return int(option == -1 or takes(value))

    monkeypatch.setattr(devices.sys, "platform", "linux")
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda _: Libc())
    devices.keep_freed_memory.__wrapped__()
    assert calls == asked
