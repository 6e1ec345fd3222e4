from __future__ import annotations

import io
import sys
import threading
from types import SimpleNamespace

import pytest
from PIL import Image as Pillow
from PIL import ImageOps

from surestep import data


class Image:
    """Stands for datasets.Image: it opens files, by path or by content, and turns them upright."""

    def __init__(self, mode=None, decode=True):
        self.mode, self.decode = mode, decode

    def decode_example(self, value):
        assert self.decode
        picture = Pillow.open(value["path"] or io.BytesIO(value["bytes"]))
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        return picture.convert(self.mode) if self.mode else picture


class Value:
    """Stands for datasets.Value."""

    def __init__(self, picture=True):
        self.picture = picture


class ClassLabel:
    """Stands for datasets.ClassLabel."""

    def __init__(self, *names: str):
        self.names = list(names)


class Rows:
    """What surestep uses of a datasets.Dataset."""

    def __init__(self, features, rows):
        self.features, self.rows = features, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    def select(self, index):
        return Rows(self.features, [self.rows[i] for i in index])

    def cast_column(self, column, feature):
        """Return rows whose pictures are files."""
        assert not feature.decode
        if not getattr(self.features[column], "picture", True):
            raise TypeError("Couldn't cast array of type int64")
        cast = [{**row, column: as_file(row[column])} for row in self.rows]
        return Rows({**self.features, column: feature}, cast)


def as_file(picture):
    """Return how datasets stores a picture."""
    if not isinstance(picture, Pillow.Image):
        return picture
    content = io.BytesIO()
    picture.save(content, "PNG", exif=picture.getexif())
    return {"bytes": content.getvalue(), "path": None}


TYPED = {"picture": Image(), "kind": ClassLabel("cat", "dog"), "id": Value()}


def rows(n: int, features=TYPED, size=(4, 4), label=None) -> Rows:
    image, kind = list(features)[:2]
    made = [
        {image: Pillow.new("L", size, i), kind: i % 2 if label is None else label} for i in range(n)
    ]
    return Rows(features, made)


@pytest.fixture
def hub(monkeypatch):
    """A Hub with one data set; the test says what its splits are. Loaded ones are noted."""
    splits: dict[str, Rows] = {}
    loaded: list[str] = []

    def load_dataset(name, split):
        loaded.append(split)
        return splits[split]

    def get_dataset_split_names(name):
        if name != "me/set":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")
        return list(splits)

    fake = SimpleNamespace(
        load_dataset=load_dataset, get_dataset_split_names=get_dataset_split_names, Image=Image
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return SimpleNamespace(splits=splits, loaded=loaded)


def test_columns_are_found_by_type(hub):
    hub.splits |= {"train": rows(6), "valid": rows(4), "test": rows(2)}
    for split, n in (("train", 6), ("validation", 4), ("test", 2)):
        images = data.load("hf:me/set", split)
        assert len(images) == n
        assert images.classes == ("cat", "dog")
        assert images.image_shape == (1, 4, 4)
        values = images.x[:, 0, 0, 0]
        assert sorted(values.tolist()) == list(range(n))
        assert images.y.tolist() == (values % 2).tolist()
        assert images.name == "me/set"
    assert hub.loaded == ["train", "valid", "test"]


def test_the_first_images_are_of_all_classes(hub):
    whole = rows(20)
    whole.rows.sort(key=lambda row: row["kind"])
    hub.splits |= {"train": rows(20), "test": whole}
    assert set(data.load("hf:me/set", "test").first(8).y.tolist()) == {0, 1}


def test_validation_is_held_out_of_training(hub):
    hub.splits |= {"train": rows(20), "test": rows(2)}
    parts = [data.load("hf:me/set", s) for s in ("train", "validation")]
    assert [len(p) for p in parts] == [18, 2]
    assert sorted(v for p in parts for v in p.x[:, 0, 0, 0].tolist()) == list(range(20))
    assert hub.loaded == ["train", "train"]


def test_untyped_labels_are_found_by_name(hub):
    hub.splits["test"] = rows(4, {"img": Image(), "label": Value()})
    images = data.load("hf:me/set", "test")
    assert images.classes == ("0", "1")


def test_of_several_class_labels_the_fine_one(hub):
    fine, coarse = ClassLabel("a", "b"), ClassLabel("c")
    hub.splits["test"] = rows(2, {"img": Image(), "fine_label": fine, "coarse_label": coarse})
    assert data.load("hf:me/set", "test").classes == ("a", "b")


def test_images_are_resized(hub):
    hub.splits["test"] = rows(2, size=(9, 5))
    assert data.load("hf:me/set", "test", image_size=3).image_shape == (1, 3, 3)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (rows(2, label=-1), ["row 0", "label -1", "unlabelled"]),
        (rows(2, label=None).select([]), ["empty"]),
        (rows(2, {"a": Value(), "label": Value()}), ["image columns", "a, label"]),
        (rows(2, {"image": Image(), "b": Value()}), ["label columns"]),
        (rows(2, {"image": Value(), "label": Value()}), None),
        (rows(2, {"image": Value(picture=False), "label": Value()}), ["holds no pictures"]),
        (Rows(TYPED, [{"picture": None, "kind": 0}]), ["row 0", "no picture"]),
        (
            Rows(TYPED, [{"picture": {"bytes": b"torn", "path": None}, "kind": 0}] * 2),
            ["2 of 2", "row 0", "row 1"],
        ),
    ],
)
def test_mistakes(refused, hub, split, words):
    hub.splits["test"] = split
    if words is None:  # an image column found by its name alone is fine
        assert len(data.load("hf:me/set", "test")) == 2
    else:
        refused(lambda: data.load("hf:me/set", "test"), "me/set", *words)


def test_files_are_opened_by_path_and_by_content_outside_the_main_thread(
    hub, tmp_path, monkeypatch
):
    threads = set()
    decode = Image.decode_example

    def noted(self, value):
        threads.add(threading.current_thread())
        return decode(self, value)

    monkeypatch.setattr(Image, "decode_example", noted)
    tall = Pillow.new("L", (4, 6), 0)
    tall.paste(200, (0, 0, 4, 3))  # the upper half
    tall.getexif()[0x0112] = 3  # upside down
    tall.save(tmp_path / "x.png", exif=tall.getexif())
    files = [as_file(tall), {"bytes": None, "path": str(tmp_path / "x.png")}]
    for mode in (None, "RGB"):
        features = TYPED | {"picture": Image(mode)}
        hub.splits["test"] = Rows(features, [{"picture": f, "kind": 0} for f in files])
        x = data.load("hf:me/set", "test").x
        assert x.shape == (2, 3 if mode else 1, 6, 4)
        assert (x[:, :, :3] == 0).all()
        assert (x[:, :, 3:] == 200).all()
    assert threading.main_thread() not in threads


def test_more_mistakes(refused, hub, monkeypatch):
    hub.splits["train"] = rows(2)
    refused(lambda: data.load("hf:me/set", "test"), "no test split", "it has train")
    refused(lambda: data.load("hf:me/other"), "me/other", "doesn't exist", "check the name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: data.load("hf:me/set"), "pip install 'surestep[hf]'")


@pytest.mark.parametrize("colour", [False, True])
def test_the_channels_are_those_of_all_however_few_are_read(hub, colour):
    some = rows(30)
    if colour:
        for row in some.rows[:3]:
            row["picture"] = row["picture"].convert("RGB")
    hub.splits |= {"train": rows(2), "test": some}
    whole = data.load("hf:me/set", "test")
    for n in (1, 5, 29):
        few = data.load("hf:me/set", "test", n=n)
        assert few.x.tolist() == whole.x[:n].tolist()
    assert whole.x.shape[1] == (3 if colour else 1)


@pytest.mark.parametrize("features", [TYPED, {"img": Image(), "label": Value()}])
def test_only_n(hub, features):
    hub.splits |= {"train": rows(2, features), "test": rows(30, features)}
    whole, some = data.load("hf:me/set", "test"), data.load("hf:me/set", "test", n=4)
    assert some.x.tolist() == whole.x[:4].tolist()
    assert some.y.tolist() == whole.y[:4].tolist()
    assert some.classes == whole.classes


def test_of_colour_images_no_others_are_decoded(hub, monkeypatch):
    some = rows(30)
    for row in some.rows:
        row["picture"] = row["picture"].convert("RGB")
    hub.splits |= {"train": rows(2), "test": some}
    whole, read = data.load("hf:me/set", "test"), []
    monkeypatch.setattr(Rows, "__getitem__", lambda self, i: read.append(i) or self.rows[i])
    few = data.load("hf:me/set", "test", n=4)
    assert len(read) == 4
    assert few.x.tolist() == whole.x[:4].tolist()
    assert few.y.tolist() == whole.y[:4].tolist()


def test_whatever_fails_in_fetching_is_told(hub, refused, monkeypatch):
    """Such as a full disk, which the package wraps in an error of its own."""

    def full(*_, **__):
        raise Exception("An error occurred") from OSError("No space left on device")

    hub.splits |= {"train": rows(4)}
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", full)
    refused(lambda: data.load("hf:me/set"), "cannot be fetched", "No space left on device")
