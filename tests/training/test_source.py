from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

import surestep
from surestep import data, methods, processes
from surestep.config import FitSettings
from surestep.errors import UserError
from surestep.evaluation import Evaluation
from surestep.training import (
    TrainStep,
    preparing,
    validating,
)
from surestep.training.loaders import first_item_as_batch
from surestep.training.source import make_source


class Pairs(Dataset):
    """A user's own data set: labels are plain integers."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y.tolist()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], self.y[i]


class TestData:
    @pytest.mark.parametrize(
        "kind", ["pair", "numpy", "Images", "uint8 Images", "Dataset", "DataLoader"]
    )
    def test_every_kind(self, tiny, kind):
        x, y = tiny.data()
        source: Any = {
            "pair": (x, y),
            "numpy": (x.numpy(), y.numpy()),
            "Images": data.Images(x, y),
            "uint8 Images": data.Images((x * 255).byte(), y),
            "Dataset": Pairs(x, y),
            "DataLoader": DataLoader(Pairs(x, y), 10, shuffle=True),
        }[kind]
        result = tiny.train(data=source, validation=(x, y) if kind == "DataLoader" else None)
        last = result.history[-1]
        assert last["val_n"] == (64 if kind == "DataLoader" else 6)
        assert last["step"] == (14 if kind == "DataLoader" else 10)

    def test_pixels_of_a_pair_and_of_images_are_the_same(self, tiny):
        x, y = tiny.data()
        x = (x * 255).byte()
        one = tiny.train(data=(x.float() / 255, y))
        assert tiny.same_weights(one.model, tiny.train(data=data.Images(x, y)).model)

    def test_features(self, tiny):
        x, y = tiny.data()
        net = nn.Sequential(nn.Linear(64, 3))
        assert tiny.train("fgsm", model=net, data=(x.flatten(1), y), engine="auto").history

    @pytest.mark.parametrize("kind", ["pair", "Dataset", "DataLoader"])
    def test_validation_data_of_every_kind(self, tiny, kind):
        x, y = tiny.data(20)
        held: Any = {
            "pair": (x, y),
            "Dataset": TensorDataset(x, y),
            "DataLoader": DataLoader(TensorDataset(x, y), 7),
        }[kind]
        settings = {"val_images": 15, "val_attacks": ("fgsm", "i-fgsm-2")}
        history = tiny.train(validation=held, **settings).history
        assert history[0]["val_n"] == 15
        # Of a Dataset a part is drawn from all, of the others it is the first.
        rows = data.some(20, 15) if kind == "Dataset" else slice(0, 15)
        expected = tiny.train(validation=(x[rows], y[rows]), **settings).history
        assert [r["val_worst_case"] for r in history] == [r["val_worst_case"] for r in expected]

    @pytest.mark.parametrize("kind", ["pair", "Dataset"])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_held_out_images_are_never_trained_on(self, tiny, monkeypatch, kind, seed):
        x, y = tiny.data()
        trained, judged = set(), set()
        evaluate = validating.evaluate

        def spy(model: nn.Module, held: Any, *args: Any, **kwargs: Any) -> Evaluation:
            images = held.x if kind == "pair" else [image for image, _ in held]
            judged.update(image.numpy().tobytes() for image in images)
            return evaluate(model, held, *args, **kwargs)

        class Noting(methods.Standard):
            def craft(self, model: nn.Module, x: Tensor, *rest: Any) -> Any:
                trained.update(image.numpy().tobytes() for image in x)
                return super().craft(model, x, *rest)

        monkeypatch.setattr(validating, "evaluate", spy)
        source = (x, y) if kind == "pair" else TensorDataset(x, y)
        tiny.train(Noting(tiny.threat), data=source, seed=seed, epochs=8)
        assert len(judged) == 6
        assert len(trained) == 58
        assert not judged & trained

    def test_index_finds_the_image(self, tiny):
        x, y = tiny.data()
        seen = []

        class Noting(methods.Standard):
            def craft(self, model: nn.Module, x: Tensor, y: Tensor) -> Any:
                seen.append((x, y, self.positions.index))
                return super().craft(model, x, y)

        tiny.train(Noting(tiny.threat), data=(x, y), val_images=0)
        assert len(seen) == 12
        for images, labels, index in seen:
            assert torch.equal(images, x[index])
            assert torch.equal(labels, y[index])

    def test_too_few_images_to_hold_any_out(self, tiny):
        x, y = tiny.data(9)
        result = tiny.train(data=(x, y), batch_size=3, select="best")
        assert "val_n" not in result.history[0]
        assert result.best_epoch == 2

    @pytest.mark.parametrize(
        ("source", "settings", "said"),
        [
            (DataLoader, {}, "nothing can be held out of a DataLoader: pass validation"),
            (Pairs, {"augment": "crop-flip"}, "'crop-flip' works on tensors in memory"),
        ],
    )
    def test_what_cannot_be(self, tiny, source, settings, said):
        pairs = Pairs(*tiny.data())
        with pytest.raises(UserError, match=said):
            tiny.train(data=DataLoader(pairs, 10) if source is DataLoader else pairs, **settings)

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("mnist", "is of type str: give a pair"),
            ((torch.rand(8, 1, 8, 8) * 255, torch.zeros(8).long()), "divide x by 255"),
            ((torch.rand(8, 1, 8, 8), torch.zeros(7).long()), "8 images but y has 7 labels"),
            ((torch.rand(20, 1, 8, 8), torch.arange(20)), "labels from .* but the model has 3"),
            (DataLoader([], 10), "no batch to train on"),
        ],
    )
    def test_data_that_make_no_sense(self, tiny, source, said):
        with pytest.raises(UserError, match=said) as caught:
            tiny.train(data=source, val_images=0)
        assert "\n" not in str(caught.value)

    def test_data_without_a_length(self, tiny):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self) -> Iterator[Any]:
                return zip(*tiny.data(), strict=True)

        with pytest.raises(UserError, match="length"):
            tiny.train(data=Stream(), val_images=0)

    @pytest.mark.parametrize("wrong", ["item", "collate", "validation"])
    def test_a_mistake_in_a_dataset_costs_no_run(self, tiny, tmp_path, wrong):
        class Wrong(Pairs):
            def __getitem__(self, i: int) -> Any:
                if wrong == "item":
                    raise KeyError("no such column")
                return object(), self.y[i]  # such as an image of PIL

        tiny.train(out=tmp_path / "run")
        before = tiny.snapshot(tmp_path)
        given: Any = {"data": Wrong(*tiny.data())}
        if wrong == "validation":
            given = {"validation": DataLoader(given["data"], 4)}
        error, said = UserError, r"cannot be made part of a batch \(default_collate: .*: return a"
        if wrong == "item":
            error, said = KeyError, "no such column"
        with pytest.raises(error, match=said):
            tiny.train(out=tmp_path / "run", overwrite=True, **given)
        assert tiny.snapshot(tmp_path) == before

    def test_the_first_item_is_fetched_as_a_loader_fetches_it(self, tiny):
        class Many(Dataset):
            def __len__(self) -> int:
                return 4

            def __getitems__(self, rows: list[int]) -> Any:
                return [(torch.zeros(1, 8, 8), row) for row in rows]

        class Empty(Many):
            def __len__(self) -> int:
                return 0

            def __getitems__(self, rows: list[int]) -> Any:
                raise IndexError

        batch = first_item_as_batch(Many())
        assert batch is not None
        assert batch[1].tolist() == [0]
        assert first_item_as_batch(Empty()) is None

    def test_batches_that_are_no_pairs(self, tiny):
        rows = [{"x": image, "y": label} for image, label in Pairs(*tiny.data())]
        with pytest.raises(UserError, match="pair"):
            tiny.train(data=DataLoader(rows, 10), val_images=0)


@pytest.mark.parametrize("kind", ["pair", "validation"])
def test_images_in_memory_are_pixels(tiny, kind):
    """Else the first steps would run, and the first validation would not."""
    x, y = tiny.data()
    method = methods.Standard(surestep.Linf(0.1, bounds=(-1.0, 1.0)))
    loader = DataLoader(TensorDataset(2 * x - 1, y), 8)
    given = {"data": loader, "validation": (x, y)} if kind == "validation" else {"data": (x, y)}
    with pytest.raises(UserError, match=r"pixels in \[0, 1\].*data range is \(-1\.0, 1\.0\)"):
        tiny.train(method, **given)
    result = tiny.train(method, data=loader, validation=loader)
    assert result.history[-1]["val_n"] == 64


class TestImagesWithoutALabel:
    @pytest.fixture
    def partly(self, tiny):
        x, y = tiny.data()
        y[: 2 * len(y) // 3] = -1
        return x, y

    def test_uat_takes_them_and_holds_out_others(self, tiny, partly, monkeypatch):
        method, seen = methods.get("uat")(tiny.threat, labelled=1.0, steps=1), []
        craft = type(method).craft
        monkeypatch.setattr(
            type(method),
            "craft",
            lambda self, m, x, y: seen.append((y, self.progress.labelled)) or craft(self, m, x, y),
        )
        (row,) = tiny.train(method, data=partly, epochs=1, val_images=6).history
        assert math.isfinite(row["loss"])
        labelled = int((partly[1] >= 0).sum())
        assert row["val_n"] == min(6, labelled // 10)
        held = row["val_n"]
        assert seen[0][1] == (labelled - held) / (len(partly[1]) - held)
        assert any((y == -1).any() for y, _ in seen)

    def test_accuracy_is_of_those_that_have_a_label(self, tiny, partly):
        always = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        for parameter in always.parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(always[1].bias[0], 1.0)
        (row,) = tiny.train("uat", model=always, data=partly, epochs=1, lr=1e-6).history
        share = float((partly[1] == 0).sum() / (partly[1] >= 0).sum())
        assert row["adv_accuracy"] == pytest.approx(share, abs=0.1)

    def test_others_refuse_them_before_the_first_step(self, tiny, partly):
        with pytest.raises(UserError, match="only training with uat takes -1, no label"):
            tiny.train("fgsm", data=partly, epochs=1)

    def test_validation_must_have_labels(self, tiny, partly):
        with pytest.raises(UserError, match="validation holds images without a label"):
            tiny.train("uat", data=tiny.data(), validation=partly, val_images=4)


def source_of(
    given: Any,
    *,
    device: str = "cpu",
    shard: Callable[[Any], Any] = lambda loader: loader,
    steps: int | None = None,
) -> Any:
    config = FitSettings(batch_size=4, augment="none")
    place, bounds = torch.device(device), (0.0, 1.0)
    return make_source(given, config, place, shard=shard, workers=0, bounds=bounds, steps=steps)


@pytest.fixture
def second_of_two(monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)


def test_what_a_gpu_fetches_is_pinned():
    """A Dataset's loader, which the loop makes itself."""
    pairs = TensorDataset(torch.rand(8, 1, 4, 4), torch.arange(8))
    for device, pinned in (("cuda", True), ("cpu", False)):
        source = source_of(pairs, device=device)
        assert source.loader.pin_memory is pinned


class TestLoaders:
    def test_bytes_are_made_pixels(self, tiny):
        x, y = tiny.data()
        grey = (255 * x).round().to(torch.uint8)
        found = [
            tiny.train(data=DataLoader(TensorDataset(given, y), 8), validation=(grey, y))
            for given in (grey, grey.float() / 255)
        ]
        assert tiny.same_weights(found[0].model, found[1].model)

    def test_a_loader_of_the_users_own_kind_is_used_as_it_is(self, tiny):
        class Counting(DataLoader):
            epochs = 0

            def __iter__(self):
                self.epochs += 1
                for x, y in super().__iter__():
                    yield x.flip(3), y

        class Sampler(torch.utils.data.SequentialSampler):
            told: list[int] = []  # once an epoch, though two places lead to it

            def set_epoch(self, epoch):
                self.told.append(epoch)

        x, y = tiny.data()
        pairs = TensorDataset(x.flip(3), y)
        loader = Counting(pairs, 8, sampler=Sampler(pairs))
        plain = tiny.train(data=DataLoader(TensorDataset(x, y), 8), validation=(x, y))
        own = tiny.train(data=loader, validation=(x, y))
        assert loader.epochs == 2
        assert Sampler.told == [0, 1]
        assert tiny.same_weights(own.model, plain.model)
        batches = torch.utils.data.BatchSampler(Sampler(pairs), 8, drop_last=False)
        tiny.train(data=DataLoader(pairs, batch_sampler=batches), validation=(x, y))
        assert Sampler.told == [0, 1, 0, 1]

    def test_batches_that_mix_images(self, tiny):
        """Their collate_fn wants two; the shape of one is known all the same."""

        def mix(pairs):
            x, y = torch.utils.data.default_collate(pairs)
            return torch.stack([(x[0] + x[1]) / 2, *x[1:]]), y

        loader = DataLoader(TensorDataset(*tiny.data()), 8, collate_fn=mix, drop_last=True)
        assert tiny.train(data=loader, val_images=0, max_memory=1.0).history

    def test_validation_in_doubles(self, tiny):
        x, y = tiny.data(12)
        held = DataLoader(TensorDataset(x.double(), y), 6)
        assert tiny.train(validation=held).history[0]["val_n"] == 12

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            ("subclass", "of a Own, which changes"),
            ("batch_size=None", "batch_size=None cannot be spl"),
            ("any sizes", "of a list without an attribute batch_size may differ in size"),
        ],
    )
    def test_but_not_shared_out(self, tiny, second_of_two, kind, said):
        class Own(DataLoader):
            def __iter__(self):
                return super().__iter__()

        pairs = TensorDataset(*tiny.data())
        loader = Own(pairs, 8) if kind == "subclass" else DataLoader(pairs, batch_size=None)
        if kind == "any sizes":
            loader = DataLoader(pairs, batch_sampler=[[0, 1], [2]])
        with pytest.raises(UserError, match=said):
            source_of(loader, shard=lambda _: pytest.fail("was shared out"))

    def test_full_memory_names_the_loaders_own_size(self, tiny, monkeypatch):
        def full(*_: Any) -> Any:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(TrainStep, "__call__", full)
        loader = DataLoader(TensorDataset(*tiny.data()), 8)
        with pytest.raises(UserError, match=r"lower the DataLoader's batch_size \(8\), or set max"):
            tiny.train(data=loader, val_images=0)

    def test_a_datasets_images_are_loaded_by_workers(self, tiny, monkeypatch):
        seen, made = [], DataLoader.__init__

        def noted(self, *args, num_workers=0, **kwargs):
            seen.append(num_workers)
            made(self, *args, num_workers=num_workers, **kwargs)

        monkeypatch.setattr(DataLoader, "__init__", noted)
        x, y = tiny.data(32)
        results = [
            tiny.train(data=TensorDataset(x, y), validation=tiny.data(8), epochs=1, workers=workers)
            for workers in (0, 2)
        ]
        assert {0, 2} <= set(seen)
        assert tiny.same_weights(*(result.model for result in results))
        with pytest.raises(UserError, match="workers -1: give 0 or more"):
            tiny.train(workers=-1)

    def test_validation_attacks_as_many_as_the_loader_has_at_a_time(self, tiny, sizes):
        pairs = DataLoader(TensorDataset(*tiny.data()), 4)
        tiny.train(data=pairs, validation=tiny.data(8), epochs=1)
        assert sizes == [4]

    def test_a_resume_with_other_batches_is_refused(self, tiny, stopping, tmp_path):
        def train(size: int, **place: Any) -> Any:
            loader = DataLoader(TensorDataset(*tiny.data()), size)
            return tiny.train(
                data=loader, val_images=0, steps_per_epoch=8, out=tmp_path / "run", **place
            )

        stopping(9, lambda: train(8))
        config = (tmp_path / "run" / "config.yaml").read_text("utf-8")
        assert yaml.safe_load(config)["batch_size"] == 8
        said = r"took 8 images in a step from its DataLoader, but this one gives 4: resume with the"
        with pytest.raises(UserError, match=said):
            train(4, resume=True)
        assert [row["step"] for row in train(8, resume=True).history] == [8, 16]

    def test_a_resume_with_other_generators_is_refused(self, tiny, stopping, tmp_path):
        def train(generator: torch.Generator | None, **place: Any) -> Any:
            pairs = TensorDataset(*tiny.data())
            loader = DataLoader(pairs, 8, shuffle=True, generator=generator)
            return tiny.train(data=loader, val_images=0, out=tmp_path / "run", **place)

        stopping(9, lambda: train(torch.Generator()))
        said = "drew from 1 random generators of its DataLoader and samplers, but these have 0: res"
        with pytest.raises(UserError, match=said):
            train(None, resume=True)

    @pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
    def test_each_epoch_is_judged_on_the_same_images(self, tiny, monkeypatch, workers):
        """And those that a loader of a resume, made anew, would begin with."""
        evaluate, judged = validating.evaluate, []

        def noted(*args: Any, **kwargs: Any) -> Any:
            found = evaluate(*args, **kwargs)
            judged.append([row["n"] for row in found.per_class])
            return found

        monkeypatch.setattr(validating, "evaluate", noted)
        generator = torch.Generator().manual_seed(1)
        before = generator.get_state()
        pairs = TensorDataset(*tiny.data())
        held = DataLoader(pairs, 8, shuffle=True, generator=generator, **workers)
        tiny.train(validation=held, val_images=20, epochs=3)
        assert judged[0] == judged[1] == judged[2]
        assert torch.equal(generator.get_state(), before)

    def test_a_last_batch_of_one_image(self, tiny):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        loader = DataLoader(TensorDataset(*tiny.data(21)), 10)
        with pytest.raises(
            UserError, match=r"step 3, of 1 image, leaves .*: choose another .*drop_last=True"
        ):
            tiny.train(model=net, data=loader, val_images=0)

    def test_batches_are_moved_here(self, tiny, monkeypatch):
        """Accelerate would wait for the device before it fetches the next."""
        given: list[Any] = []

        def noted(*args: Any, shard: Any, **options: Any) -> Any:
            given.append(shard)
            return make_source(*args, shard=shard, **options)

        monkeypatch.setattr(preparing, "make_source", noted)
        tiny.train(data=TensorDataset(*tiny.data()), validation=tiny.data(8), epochs=1)
        (shard,) = given
        assert shard.func.__name__ == "prepare_data_loader"
        assert shard.keywords == {"device_placement": False}

    def test_shares_are_not_shared_out_again(self, tiny, monkeypatch):
        pairs = TensorDataset(*tiny.data())
        sampler = DistributedSampler(pairs, num_replicas=2, rank=0)
        loader = DataLoader(pairs, 4, sampler=sampler)
        assert source_of(loader).steps_per_epoch == 8
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        with pytest.raises(UserError, match=r"has a DistributedSampler, .*: give one without"):
            source_of(loader)

    @pytest.mark.parametrize(
        ("kind", "lacking"),
        [
            ("own", "Own has no generator"),
            ("own with a generator", None),
            ("own of batches", "Own has no set_epoch"),  # whose generator Accelerate does not share
            ("shuffle", None),
            ("in order", None),
        ],
    )
    def test_an_order_that_each_process_would_draw_for_itself_is_said(
        self, tiny, recwarn, monkeypatch, kind, lacking
    ):
        class Own(torch.utils.data.Sampler):
            def __iter__(self) -> Any:
                return iter(torch.randperm(64).tolist())

            def __len__(self) -> int:
                return 64

        pairs, sampler = TensorDataset(*tiny.data()), Own() if "own" in kind else None
        if "generator" in kind:
            sampler.generator = None
        loader = DataLoader(pairs, 4, sampler=sampler, shuffle=kind == "shuffle" or None)
        if "batches" in kind:
            sampler.generator, sampler.batch_size = None, 4
            loader = DataLoader(pairs, batch_sampler=sampler)
        source_of(loader)
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        source_of(loader)
        said = [str(w.message) for w in recwarn if "has no" in str(w.message)]
        assert len(said) == (lacking is not None)
        assert all(f"the DataLoader's {lacking}: if it draws" in one for one in said)

    def test_an_iterable_that_knows_its_length(self, tiny):
        x, y = tiny.data(40)

        class Stream(IterableDataset):
            def __len__(self) -> int:
                return len(x)

            def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
                return iter(zip(x, y, strict=True))

        loader = DataLoader(Stream(), 10)
        result = tiny.train("sat-r2", data=loader, validation=tiny.data(8), engine="fast")
        assert [row["step"] for row in result.history] == [4, 8]
        with pytest.raises(UserError, match=r"max_memory \(1\) needs the shape of an image"):
            tiny.train(data=loader, validation=tiny.data(8), max_memory=1.0)


class TestStreams:
    """Data without a length, and without an end."""

    @pytest.fixture
    def stream(self, tiny):
        class Stream(IterableDataset):
            epoch = 0

            def set_epoch(self, epoch):
                self.epoch = epoch

            def __iter__(self):
                x, y = tiny.data()
                for i in itertools.count(7 * self.epoch):
                    yield x[i % 64] + 0.1 * torch.rand(1, 8, 8), y[i % 64]

        return lambda: DataLoader(Stream(), 10, collate_fn=Clipped())

    def train(self, tiny, stream, **settings):
        held = {"validation": tiny.data(8), "checkpoint_every": 2}
        return tiny.train("sat-r2", data=stream(), steps_per_epoch=5, **held, **settings)

    def test_epochs_are_as_long_as_is_said(self, tiny, stream, tmp_path):
        result = self.train(tiny, stream, out=tmp_path / "run")
        assert [row["step"] for row in result.history] == [5, 10]

    @pytest.mark.parametrize("after", [4, 5, 9])
    def test_resume(self, tiny, stream, stopping, tmp_path, after):
        whole, out = tmp_path / "whole", tmp_path / "run"
        self.train(tiny, stream, out=whole)
        stopping(after, lambda: self.train(tiny, stream, out=out))
        self.train(tiny, stream, out=out, resume=True)
        assert tiny.weights(out) == tiny.weights(whole)
        assert tiny.rows(out) == tiny.rows(whole)

    def test_each_process_has_its_own(self, stream, second_of_two):
        options = {"shard": lambda _: pytest.fail("was split")}
        assert len(list(source_of(stream(), steps=3, **options).epoch(0))) == 3
        with pytest.raises(UserError, match="steps_per_epoch and a stream that yields each"):
            source_of(stream(), **options)

    def test_what_is_refused(self, tiny, stream):
        with pytest.raises(UserError, match=r"has no length, .*: give steps_per_epoch with a Data"):
            tiny.train(data=stream(), validation=tiny.data(8))
        with pytest.raises(UserError, match="steps_per_epoch 0: give 1 or more"):
            tiny.train(steps_per_epoch=0)
        with pytest.raises(UserError, match=r"steps_per_epoch \(5\) applies to a DataLoader only"):
            tiny.train(steps_per_epoch=5)
        short = DataLoader(TensorDataset(*tiny.data()), 10)
        with pytest.raises(UserError, match="steps_per_epoch 9: the DataLoader has 7 batches"):
            tiny.train(data=short, validation=tiny.data(8), steps_per_epoch=9)
        fewer = tiny.train(data=short, validation=tiny.data(8), steps_per_epoch=3)
        assert [row["step"] for row in fewer.history] == [3, 6]

        class Ends(IterableDataset):
            def __iter__(self):
                return iter(zip(*tiny.data(), strict=True))

        with pytest.raises(UserError, match="ended after 7 of 9 batches of an epoch: give fewer"):
            tiny.train(data=DataLoader(Ends(), 10), validation=tiny.data(8), steps_per_epoch=9)


class Clipped:
    """Put the pairs of a batch together, and their noise back into the range."""

    def __call__(self, pairs):
        x, y = zip(*pairs, strict=True)
        return torch.stack(x).clamp(0, 1), torch.stack(y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_a_loaders_labels_are_whole_numbers_of_any_kind(tiny, dtype):
    x, y = tiny.data()
    results = []
    for labels in (y, y.to(dtype)):
        pairs = DataLoader(TensorDataset(x, labels), 10)
        results.append(tiny.train(data=pairs, validation=pairs, epochs=1))
    assert tiny.same_weights(*(result.model for result in results))
