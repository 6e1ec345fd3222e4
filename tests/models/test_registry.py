import pytest
import torch
from torch import nn

from surestep.errors import UserError
from surestep.models import Normalize, _registry, create, names, register

GREY = {"lenet+", "cnn-small"}


def statistics(model: nn.Module) -> list[list[float]] | None:
    first = next(model.children())
    if not isinstance(first, Normalize):
        return None
    return [pytest.approx(t.flatten().tolist(), abs=1e-7) for t in (first.mean, first.std)]


def test_names():
    assert set(names()) == GREY | {
        "preactresnet10-slim",
        "preactresnet18",
        "resnet18",
        "resnet34",
        "wrn-28-10",
    }


@pytest.mark.parametrize("name", names())
def test_every_model_with_its_defaults(name):
    shape = (1, 28, 28) if name in GREY else (3, 32, 32)
    with torch.device("meta"):
        model = create(name, num_classes=7)
        assert model(torch.rand(2, *shape)).shape == (2, 7)
        assert isinstance(next(model.children()), Normalize) == (name not in GREY)


@pytest.mark.parametrize("name", names())
def test_every_model_for_other_images(name):
    with torch.device("meta"):
        model = create(name, in_channels=2, image_size=16, mean=(0.5, 0.4), std=(0.2, 0.3))
        assert model(torch.rand(2, 2, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("name", names())
def test_errors_carry_the_registered_name(name):
    with torch.device("meta"), pytest.raises(UserError) as error:
        create(name)(torch.rand(2, 5, 28, 28))
    assert str(error.value).startswith(f"{name} takes images")


def test_default_statistics():
    assert statistics(create("lenet+")) is None
    assert statistics(create("preactresnet10-slim")) == [
        [0.4914, 0.4822, 0.4465],
        [0.2471, 0.2435, 0.2616],
    ]


def test_statistics_for_colour_do_not_reach_grey_images():
    assert statistics(create("preactresnet10-slim", in_channels=1)) is None


def test_explicit_statistics_win():
    own = create("preactresnet10-slim", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert statistics(own) == [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    assert statistics(create("lenet+", mean=[0.13], std=[0.31])) == [[0.13], [0.31]]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mean": (0.5,)}, "mean and std go together"),
        ({"std": (0.5,)}, "mean and std go together"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, "mean has 3 values and std 3"),
        ({"mean": (0.5,), "std": (0.5,) * 2}, "mean has 1 values and std 2"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"image_size": -4}, "image_size is -4"),
        ({"image_size": 30}, "lenet\\+ .* image_size 30"),
    ],
)
def test_create_refuses(options, line):
    with pytest.raises(UserError, match=line) as error:
        create("lenet+", **options)
    assert "\n" not in str(error.value)


def test_unknown_name():
    with pytest.raises(UserError, match=r"unknown model 'resnet81': did you mean 'resnet18'\?"):
        create("resnet81")


def test_register_adds_once(monkeypatch):
    monkeypatch.setattr(_registry, "_ENTRIES", dict(_registry._ENTRIES))

    @register("linear", in_channels=1, image_size=8)
    def linear(num_classes, in_channels, image_size, normalize):
        assert normalize is None
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, num_classes))

    assert "linear" in names()
    assert create("linear", 3)(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    with pytest.raises(UserError, match="'linear' is already registered"):
        register("linear", in_channels=1, image_size=8)(linear)
