from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from surestep import UserError, data
from surestep.data import _pillow, _room


def paint(path: Path, value: int, size=(4, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "P") else (value,) * len(mode)).save(path)


@pytest.fixture
def flat(tmp_path) -> Path:
    for k in range(20):
        paint(tmp_path / "cat" / f"{k:02}.png", k)
        paint(tmp_path / "dog" / f"{k:02}.png", 100 + k)
    return tmp_path


def values(images) -> list[int]:
    return images.x[:, 0, 0, 0].tolist()


def test_a_flat_folder_is_divided_within_each_class(flat):
    splits = {s: data.load(f"folder:{flat}", s) for s in ("train", "validation", "test")}
    assert [len(s) for s in splits.values()] == [32, 4, 4]
    together = [v for s in splits.values() for v in values(s)]
    assert sorted(together) == [*range(20), *range(100, 120)]
    for split in splits.values():
        assert split.classes == ("cat", "dog")
        assert split.image_shape == (3, 4, 4)
        assert split.y.tolist() == [int(v >= 100) for v in values(split)]
    assert values(data.load("folder", "test", root=flat)) == values(splits["test"])


def test_a_few_images_more_leave_nearly_all_where_they_were(tmp_path):
    """Else a run that is judged after the folder has grown would be judged on its training."""
    for k in range(60):
        paint(tmp_path / "a" / f"{k:02}.png", k)
    before = {
        v for s in ("train", "validation") for v in values(data.load(f"folder:{tmp_path}", s))
    }
    for k in range(60, 64):
        paint(tmp_path / "a" / f"new-{k}.png", k)
    test = set(values(data.load(f"folder:{tmp_path}", "test")))
    assert len(test) == 6
    assert len(test & before) <= 1


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders(tmp_path, val):
    for k, split in enumerate(("train", val, "test")):
        paint(tmp_path / split / "b" / "0.png", 10 + k)
        paint(tmp_path / split / "a" / "0.JPG", 50 + k)
    (tmp_path / "test" / "a" / "0.JPG").write_bytes(b"damaged")
    assert sorted(data.load(f"folder:{tmp_path}").y.tolist()) == [0, 1]
    validation = data.load(f"folder:{tmp_path}", "validation")
    assert dict(zip(validation.y.tolist(), values(validation), strict=True)) == {0: 51, 1: 11}


def test_without_a_validation_folder_a_tenth_is_held_out(tmp_path):
    for k in range(10):
        paint(tmp_path / "train" / "a" / f"{k}.png", k)
    paint(tmp_path / "test" / "a" / "0.png", 99)
    train = values(data.load(f"folder:{tmp_path}"))
    validation = values(data.load(f"folder:{tmp_path}", "validation"))
    assert sorted(train + validation) == list(range(10))
    assert len(validation) == 1
    assert values(data.load(f"folder:{tmp_path}", "test")) == [99]


def test_a_test_split_follows_the_classes_of_training(tmp_path, refused):
    for name in "abc":
        paint(tmp_path / "train" / name / "0.png", 0)
    paint(tmp_path / "test" / "c" / "0.png", 0)
    assert data.load(f"folder:{tmp_path}", "test").y.tolist() == [2]
    assert data.load(f"folder:{tmp_path}", "test").num_classes == 3
    paint(tmp_path / "test" / "d" / "0.png", 0)
    refused(lambda: data.load(f"folder:{tmp_path}", "test"), "d is a class that")


def test_a_class_may_be_called_train(tmp_path):
    for k in range(3):
        paint(tmp_path / "train" / f"{k}.png", k)
        paint(tmp_path / "bus" / f"{k}.png", k)
    assert data.load(f"folder:{tmp_path}").classes == ("bus", "train")


def test_grey_images_have_one_channel_unless_some_are_coloured(tmp_path):
    for k in range(3):
        paint(tmp_path / "test" / "a" / f"{k}.png", 10 * k, mode="L")
    grey = data.load(f"folder:{tmp_path}", "test")
    assert grey.image_shape == (1, 4, 4)
    assert sorted(values(grey)) == [0, 10, 20]
    paint(tmp_path / "test" / "a" / "9.png", 90, mode="RGBA")
    mixed = data.load(f"folder:{tmp_path}", "test")
    assert mixed.image_shape == (3, 4, 4)
    assert torch.equal(mixed.x[values(mixed).index(10)], torch.full((3, 4, 4), 10))


def test_a_palette_with_transparency(tmp_path):
    path = tmp_path / "test" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    picture = Image.new("P", (4, 4))
    picture.putpalette([7, 8, 9] * 256)
    picture.save(path, transparency=bytes(256))
    assert data.load(f"folder:{tmp_path}", "test").x[0, :, 0, 0].tolist() == [7, 8, 9]


def test_image_size(tmp_path, refused):
    paint(tmp_path / "test" / "a" / "0.png", 1)
    paint(tmp_path / "test" / "a" / "odd.png", 7, size=(8, 6))
    place = f"folder:{tmp_path}"
    refused(lambda: data.load(place, "test"), "odd.png is 8 x 6", "0.png is 4 x 4", "image_size")
    assert data.load(place, "test", image_size=5).image_shape == (3, 5, 5)


def test_of_a_wide_picture_the_middle_is_taken(tmp_path):
    """Red quarters at both ends of it, which squeezing would leave in."""
    picture = Image.new("RGB", (8, 4), (0, 0, 255))
    for left in (0, 6):
        picture.paste((255, 0, 0), (left, 0, left + 2, 4))
    (tmp_path / "test" / "a").mkdir(parents=True)
    picture.save(tmp_path / "test" / "a" / "0.png")
    red, _, blue = data.load(f"folder:{tmp_path}", "test", image_size=4).x[0]
    assert (int(red.max()), int(blue.min())) == (0, 255)


def test_mistakes(tmp_path, refused):
    def load(split="test"):
        return data.load(f"folder:{tmp_path}/set", split)

    refused(load, "not a folder")
    (tmp_path / "set").mkdir()
    refused(load, "no class folders")
    (tmp_path / "set" / "test" / "a").mkdir(parents=True)
    refused(load, "no images")
    refused(lambda: load("train"), "no train split")
    bad = tmp_path / "set" / "test" / "a" / "x.png"
    bad.write_bytes(b"nonsense")
    refused(load, "x.png", "not a readable image")
    paint(bad, 1, size=(50, 50))
    bad.write_bytes(bad.read_bytes()[:-40])
    refused(load, "x.png", "not a readable image")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(bad)
    refused(load, "x.png", "8 bits")


def test_too_few_images_to_divide(tmp_path, refused):
    paint(tmp_path / "a" / "0.png", 0)
    refused(lambda: data.load(f"folder:{tmp_path}"), "1 example,", "at least 3")


def test_without_pillow(monkeypatch, flat, refused):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    refused(lambda: data.load(f"folder:{flat}"), "pip install 'surestep[folder]'")


def test_the_first_images_are_of_all_classes(flat):
    test = data.load(f"folder:{flat}")
    assert set(test.first(8).y.tolist()) == {0, 1}
    assert values(data.load(f"folder:{flat}")) == values(test)  # in the same order


def test_all_splits_have_the_channels_of_the_whole(tmp_path):
    paint(tmp_path / "train" / "a" / "0.png", 1, mode="RGB")
    for k, split in enumerate(("train", "valid", "test")):
        paint(tmp_path / split / "a" / "1.png", 10 * k, mode="L")
    for split in ("train", "validation", "test"):
        assert data.load(f"folder:{tmp_path}", split).image_shape == (3, 4, 4)


@pytest.mark.parametrize("colour", ["train", "test"])
def test_the_test_split_follows_training(tmp_path, colour):
    for split in ("train", "validation", "test"):
        for k in range(2):
            mode = "RGB" if k and split == colour else "L"
            paint(tmp_path / split / "a" / f"{k}.png", 10 * k, mode=mode)
    test = data.load(f"folder:{tmp_path}", "test")
    assert test.image_shape == ((3 if colour == "train" else 1), 4, 4)
    assert sorted(values(test)) == [0, 10]


def test_training_looks_at_no_test_file(tmp_path):
    for split in ("train", "validation"):
        paint(tmp_path / split / "a" / "0.png", 1, mode="L")
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a" / "0.png").write_bytes(b"damaged")
    (tmp_path / "train" / ".cache" / "b").mkdir(parents=True)
    paint(tmp_path / "train" / ".cache" / "b" / "0.png", 1)
    paint(tmp_path / "preview.png", 1)
    for split in ("train", "validation"):
        assert data.load(f"folder:{tmp_path}", split).image_shape == (1, 4, 4)


def test_classes_with_the_same_folders_inside(tmp_path):
    for name in ("benign", "malignant"):
        for zoom in ("40X", "100X"):
            for k in range(2):
                paint(tmp_path / name / zoom / f"{k}.png", k)
    assert data.load(f"folder:{tmp_path}").classes == ("benign", "malignant")


def test_classes_are_numbered_alike_everywhere(tmp_path):
    for name in ("apple", "Zebra"):
        paint(tmp_path / "test" / name / "0.png", 0)
    assert data.load(f"folder:{tmp_path}", "test").classes == ("Zebra", "apple")


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train_set", "dev", "test_set")])
def test_splits_under_other_names_are_no_classes(tmp_path, refused, names):
    for split in names:
        for name in ("cat", "dog"):
            paint(tmp_path / split / name / "0.png", 1)
    refused(lambda: data.load(f"folder:{tmp_path}"), names[0], "cat, dog", "train, validation")


def test_classes_may_have_folders_inside(tmp_path):
    for name in ("cat", "dog"):
        for k in range(3):
            paint(tmp_path / name / "images" / f"{k}.png", k)
    assert data.load(f"folder:{tmp_path}").classes == ("cat", "dog")


def test_threads_that_decode_keep_the_order(monkeypatch):
    """More pictures than are open at a time, the first of each block the slowest."""
    monkeypatch.setattr(_pillow, "_BLOCK", 6)

    def opener(k):
        if k % 6 == 0:
            time.sleep(0.02)
        return Image.new("L", (2, 2), k)

    x = _pillow.stack(((str(k), partial(opener, k)) for k in range(20)), 20, None)
    assert x[:, 0, 0, 0].tolist() == list(range(20))


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ([5], "5 is not a readable image (torn): replace or remove it"),
        ([0, 7, 12], "3 of 20 images are not readable: replace or remove 0 (torn), 7, 12"),
        (
            range(20),
            "20 of 20 images are not readable: replace or remove 0 (torn), 1, 2 and 17 more",
        ),
    ],
)
def test_all_that_are_damaged_are_counted(monkeypatch, damaged, message):
    monkeypatch.setattr(_pillow, "_BLOCK", 6)

    def opener(k):
        if k in damaged:
            raise OSError("torn")
        return Image.new("L", (2, 2), k)

    with pytest.raises(UserError) as caught:
        _pillow.stack(((str(k), partial(opener, k)) for k in range(20)), 20, None)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("modes", "room", "processes", "words"),
    [
        # 20 images of 1 x 4 x 4 bytes, or of 3 x 4 x 4.
        (["L"], 320, "1", None),
        (["L"], 319, "1", ["20 images of 1 x 4 x 4 take", "--image-size", "surestep.fit"]),
        (["L"], 320, "2", ["in each of 2 processes"]),
        (["RGB"], 959, "", ["20 images of 3 x 4 x 4"]),
        # Where 8 grey ones are held already, they need not find room again.
        (["L"] * 8 + ["RGB"], 960 - 8 * 16, "1", None),
        (["L"] * 8 + ["RGB"], 959 - 8 * 16, "1", ["20 images of 3 x 4 x 4"]),
    ],
)
def test_images_that_do_not_fit_into_memory(monkeypatch, refused, modes, room, processes, words):
    """Else the system would kill the process without a word."""
    monkeypatch.setattr(_room, "available", lambda: room)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    modes = modes + modes[-1:] * (20 - len(modes))
    pictures = [(str(k), partial(Image.new, mode, (4, 4))) for k, mode in enumerate(modes)]
    if words:
        refused(lambda: _pillow.stack(pictures, 20, None), "is available", *words)
    else:
        assert len(_pillow.stack(pictures, 20, None)) == 20


def test_where_memory_ends_all_the_same(flat, refused, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(_pillow.np, "empty", full)
    refused(lambda: data.load(f"folder:{flat}"), "out of memory", "32 images", "--image-size")


def test_the_memory_that_is_left(tmp_path):
    """The least of what the machine and its container's limit leave, cached files not counted."""

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert _room.available(tmp_path) == float("inf")
    write("proc/meminfo", "MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:     5 kB\n")
    assert _room.available(tmp_path) == 5 * 1024
    group = "sys/fs/cgroup"
    write(f"{group}/memory.stat", "anon 7\nactive_file 20\ninactive_file 300\n")
    write(f"{group}/memory.current", "1000\n")
    write(f"{group}/memory.max", "max\n")
    assert _room.available(tmp_path) == 5 * 1024
    write(f"{group}/memory.max", "4000\n")
    assert _room.available(tmp_path) == 3320
    stat = "inactive_file 9\ntotal_active_file 1\ntotal_inactive_file 2\n"
    write(f"{group}/memory/memory.stat", stat)
    write(f"{group}/memory/memory.usage_in_bytes", "1000\n")
    write(f"{group}/memory/memory.limit_in_bytes", "2000\n")
    assert _room.available(tmp_path) == 1003


def test_splits_without_classes_are_no_classes(tmp_path):
    for name in ("train", "test"):
        paint(tmp_path / name / "one.png", 5)
    with pytest.raises(UserError, match="holds test, train, which hold no class folders: arrange"):
        data.load("folder:" + str(tmp_path), "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_only_the_first_n_are_decoded(flat, split, monkeypatch):
    whole, opened = data.load(f"folder:{flat}", split), []
    decode = _pillow._decode
    monkeypatch.setattr(_pillow, "_decode", lambda *a: opened.append(a[0]) or decode(*a))
    some = data.load(f"folder:{flat}", split, n=3)
    assert len(opened) == 3
    assert (some.x.tolist(), some.y.tolist()) == (whole.x[:3].tolist(), whole.y[:3].tolist())
    assert (some.classes, some.note) == (whole.classes, whole.note)
    assert len(data.load(f"folder:{flat}", split, n=99)) == len(whole)


def test_the_channels_are_those_of_all_however_few_are_read(tmp_path):
    for k in range(20):
        paint(tmp_path / "train" / "a" / f"{k}.png", k, mode="RGB" if k == 7 else "L")
    whole = data.load(f"folder:{tmp_path}", "train")
    assert {data.load(f"folder:{tmp_path}", "train", n=n).x.shape[1] for n in (1, 2, 5)} == {3}
    assert whole.x.shape[1] == 3


def test_no_images_at_all(flat, refused):
    refused(lambda: data.load(f"folder:{flat}", "test", n=0), "cannot load 0 images", "1 or more")


def test_names_that_are_no_text_and_folders_that_are_hidden(flat):
    """As old archives and notebooks leave them."""
    odd = os.fsdecode(b"caf\xe9.png")
    paint(flat / "cat" / "00.png", 7)
    try:
        (flat / "cat" / "00.png").rename(flat / "cat" / odd)
    except OSError:
        pytest.skip("file names are Unicode here")
    paint(flat / "cat" / ".ipynb_checkpoints" / "x.png", 222)
    found = [
        v
        for s in ("train", "validation", "test")
        for v in values(data.load("folder", s, root=flat))
    ]
    assert len(found) == 40
    assert 222 not in found


def linked(link: Path, to: Path) -> None:
    try:
        link.symlink_to(to, target_is_directory=True)
    except OSError:
        pytest.skip("no links here")


def test_folders_behind_links(flat, tmp_path_factory):
    """Each once, and none that is around the class; a folder called as an image is none."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for k in range(3):
        paint(elsewhere / "more" / f"{k}.png", 200 + k)
    (flat / "cat" / "none.tif").mkdir()
    linked(flat / "cat" / "a link", elsewhere / "more")
    linked(elsewhere / "more" / "loop", elsewhere / "more")
    linked(flat / "dog" / "all", flat)
    linked(flat / "dog" / "again", elsewhere / "more")
    linked(elsewhere / "twice", elsewhere / "more")
    linked(flat / "dog" / "twice", elsewhere / "twice")
    splits = [data.load(f"folder:{flat}", s) for s in ("train", "validation", "test")]
    found = sorted(v for split in splits for v in values(split))
    assert found == sorted([*range(20), *range(100, 120), *range(200, 203), *range(200, 203)])


def test_validation_and_test_may_lack_a_class_whose_folder_is_there(tmp_path, refused):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
        paint(tmp_path / split / "b" / "0.png", 0)
    for split in ("validation", "test"):
        images = data.load(f"folder:{tmp_path}", split)
        assert (images.y.tolist(), images.num_classes) == ([1], 2)
    refused(lambda: data.load(f"folder:{tmp_path}"), f"{tmp_path / 'train' / 'a'} holds no images")


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_pictures_are_turned_as_their_exif_data_say(tmp_path, mode):
    """As viewers, and the loader of the Hub, show them."""
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    upright = Image.fromarray(pixels)
    upright.putpalette([v for k in range(256) for v in (k, k, k)]) if mode == "P" else None
    (tmp_path / "test" / "a").mkdir(parents=True)
    sideways = upright.convert(mode).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    sideways.save(tmp_path / "test" / "a" / "0.png", exif=exif)
    upright.convert(mode).save(tmp_path / "test" / "a" / "1.png")
    x = data.load(f"folder:{tmp_path}", "test").x
    assert x.shape[2:] == (3, 4)
    assert all(np.array_equal(image[0], pixels) for image in x)


def test_damaged_exif_data_are_no_damaged_picture(tmp_path):
    path = tmp_path / "test" / "a" / "0.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (4, 3), (7, 8, 9)).save(path, exif=b"Exif\0\0nonsense")
    assert data.load(f"folder:{tmp_path}", "test").x[0, :, 0, 0].tolist() == [7, 8, 9]
