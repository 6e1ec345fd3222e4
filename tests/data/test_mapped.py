"""Memory-mapped images: the same batches as from memory, and no more of the file read."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from surestep import UserError
from surestep.data import Batches, Images, as_images, augment
from surestep.evaluation.batches import batches_of


@pytest.fixture
def stored(tmp_path):
    """Write images to a .npy file; return the mapped array, the same in memory, and labels."""
    x = np.random.default_rng(0).integers(0, 256, (50, 1, 6, 6), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    y = np.arange(50) % 3
    return np.load(tmp_path / "x.npy", mmap_mode="r"), x, y


def test_batches_are_those_from_memory(stored):
    mapped, x, y = stored
    chosen = torch.tensor([7, 3, 40, 41, 2, 9, 8])
    for subset in (None, chosen, slice(3, 30), y == 1):
        both = [as_images((images, y)) for images in (mapped, x)]
        if subset is not None:
            both = [as_images(images.subset(subset)) for images in both]
        assert both[0].rows is not None
        assert both[1].rows is None
        assert len(both[0]) == len(both[1])
        assert torch.equal(both[0].pixels(), both[1].pixels())
        assert torch.equal(both[0].first(3).pixels(), both[1].first(3).pixels())
        options = {"seed": 4, "augment": augment.get("crop-flip")}
        for one, other in zip(*(Batches(i, 4, **options).epoch(1) for i in both), strict=True):
            assert all(torch.equal(s, t) for s, t in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_strided_files_are_not_copied(tmp_path, dtype):
    """Such as images with channels last; what PyTorch cannot take as it is, is copied."""
    x = np.random.default_rng(0).random((600, 4, 5, 3)).astype(np.float32)
    x = (255 * x).astype(dtype) if dtype is np.uint8 else x
    np.save(tmp_path / "x.npy", x)
    mapped, y = np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(600) % 3
    for view, copied in (
        (mapped.transpose(0, 3, 1, 2), False),
        (mapped.transpose(0, 3, 1, 2)[::2], False),
        (mapped[:, :, ::-1], True),
    ):
        images = as_images((view, y[: len(view)]))
        assert (images.x.data_ptr() == view.ctypes.data) is not copied
        assert np.array_equal(images.stored().numpy(), view)
        batch, _, index = next(Batches(images, 7).epoch(0))
        assert torch.equal(batch, images.pixels(index))


@pytest.mark.parametrize(("value", "said"), [(-1, "normalises inside"), (np.nan, "holds NaN")])
def test_all_of_a_strided_file_is_checked(tmp_path, value, said):
    x = np.zeros((600, 4, 5, 3), np.float32)
    x[300, 1, 1, 1] = value
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r").transpose(0, 3, 1, 2)
    with pytest.raises(UserError, match=said):
        as_images((mapped, np.arange(600) % 3))


def test_batches_move_to_the_device_one_by_one(stored):
    mapped, _, y = stored
    batches = Batches(as_images((mapped, y)), 10, device="meta")
    assert batches.images.x.device.type == "cpu"
    for batch in batches.epoch(0):
        assert all(t.device.type == "meta" for t in batch)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_large_file_is_not_read_whole(tmp_path):
    path = tmp_path / "x.npy"
    # A sparse file of a GiB.
    large = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(2**20, 1, 32, 32))
    del large
    # In a process of its own: the peak of this one may lie far above what reads the whole file.
    script = (
        "import sys, numpy as np, torch\n"
        "from surestep.data import Batches, as_images\n"
        "status = lambda: open('/proc/self/status').read().split()\n"
        "peak = lambda: int(status()[status().index('VmHWM:') + 1])\n"
        "before = peak()\n"
        "images = as_images((np.load(sys.argv[1], mmap_mode='r'), np.arange(2**20) % 10))\n"
        "batches = Batches(images.subset(torch.arange(2**20 - 1000)), 128).epoch(0)\n"
        "shapes = {tuple(next(batches)[0].shape) for _ in range(20)}\n"
        "print(shapes, peak() - before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    shapes, grown = ran.stdout.rsplit(maxsplit=1)
    assert shapes == "{(128, 1, 32, 32)}"
    assert int(grown) < 400 * 1024


def test_training(stored):
    """The same run as from memory."""
    import surestep
    from surestep import methods

    mapped, x, y = stored

    def trained(images):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
        method = methods.build("sat-r2", surestep.Linf(0.1), {})
        settings = {"epochs": 1, "batch_size": 5, "lr": 0.1, "quiet": True}
        return surestep.fit(net, (images, y), method, val_attacks=("fgsm",), **settings)

    one, other = trained(mapped), trained(x)
    assert torch.equal(one.model[1].weight, other.model[1].weight)
    drop = {"images_per_second", "train_seconds", "val_seconds"}
    rows = [[v for k, v in r.history[-1].items() if k not in drop] for r in (one, other)]
    assert rows[0] == rows[1]
    assert isinstance(as_images((mapped, y)), Images)


def test_judging_a_mapped_part_does_not_read_the_rest(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.full((40, 1, 4, 4), 0.5, np.float32))
    mapped = as_images((np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(40) % 2))
    monkeypatch.setattr("surestep.data._images._check_pixels", lambda *_: pytest.fail("it reads"))
    batches, n = batches_of(mapped.subset(torch.arange(6)), 4, None, torch.device("cpu"))
    assert n == 6
    assert [len(x) for x, _ in batches] == [4, 2]


def test_mapped_images_are_pixels_in_0_to_1(tmp_path):
    np.save(tmp_path / "x.npy", np.full((4, 1, 4, 4), 0.5, np.float32))
    mapped = as_images((np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(4) % 2))
    with pytest.raises(UserError, match="give float32 tensors"):
        batches_of(mapped, 4, None, torch.device("cpu"), (0.0, 255.0))
