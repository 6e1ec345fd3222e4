import pytest
import torch
from torch import nn

from surestep.errors import UserError
from surestep.models import Normalize, create

SMALL = ["lenet+", "cnn-small", "preactresnet10-slim"]


def images(name: str, n: int = 2) -> torch.Tensor:
    shape = (3, 32, 32) if "resnet" in name else (1, 28, 28)
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


def test_normalize_values():
    x = torch.rand(2, 3, 4, 4)
    out = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(x)
    torch.testing.assert_close(out[:, 0], (x[:, 0] - 0.1) / 0.5)
    torch.testing.assert_close(out[:, 2], (x[:, 2] - 0.3) / 2.0)


def test_normalisation_is_saved_with_the_weights():
    model = create("lenet+", mean=(0.13,), std=(0.31,))
    state = model.state_dict()
    assert list(state)[:2] == ["normalize.mean", "normalize.std"]
    other = create("lenet+", mean=(0.5,), std=(0.5,))
    other.load_state_dict(state)
    x = images("lenet+")
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5, 0.5), (1.0,)), ((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((float("nan"),), (1.0,))],
)
def test_normalize_refuses(mean, std):
    with pytest.raises(UserError, match="give"):
        Normalize(mean, std)


def test_normalisation_is_the_first_child_and_acts_on_pixels():
    model = create("preactresnet10-slim").eval()
    plain = create("preactresnet10-slim", normalize=False).eval()
    first = next(model.children())
    assert isinstance(first, Normalize)
    assert not any(isinstance(m, Normalize) for m in plain.modules())
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("normalize.")}
    )
    x = images("preactresnet10-slim")
    torch.testing.assert_close(model(x), plain(first(x)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "line"),
    [
        (
            "lenet+",
            (2, 3, 32, 32),
            "lenet+ takes images of shape (N, 1, 28, 28); got (N, 3, 32, 32): "
            "create it with in_channels=3, image_size=32",
        ),
        (
            "cnn-small",
            (28, 28),
            "cnn-small takes images of shape (N, 1, 28, 28); got (28, 28): "
            "give a batch, channels before height and width",
        ),
        (
            "lenet+",
            (2, 28, 28, 1),
            "lenet+ takes images of shape (N, 1, 28, 28); got (N, 28, 28, 1): "
            "put the channels first, x.permute(0, 3, 1, 2)",
        ),
        (
            "lenet+",
            (2, 1, 28, 24),
            "lenet+ takes images of shape (N, 1, 28, 28); got (N, 1, 28, 24): "
            "crop or resize the images to a square",
        ),
        (
            "preactresnet10-slim",
            (2, 1, 28, 28),
            "preactresnet10-slim takes images of shape (N, 3, H, W); got (N, 1, 28, 28): "
            "create it with in_channels=1",
        ),
    ],
)
def test_wrong_images_get_one_clear_line(name, shape, line):
    with pytest.raises(UserError) as error:
        create(name)(torch.rand(shape))
    assert str(error.value) == line


@pytest.mark.parametrize("name", SMALL)
def test_head_can_be_replaced_and_features_feed_it(name):
    model = create(name)
    x = images(name)
    model.eval()
    torch.testing.assert_close(model(x), model.head(model.features(x)))
    model.head = nn.Linear(model.head.in_features, 7)
    assert model(x).shape == (2, 7)


@pytest.mark.parametrize("name", [*SMALL, "resnet18"])
def test_every_relu_is_called_once(name):
    """What MeanSparse and SADS rely on when they wrap activations."""
    with torch.device("meta"):
        model = create(name)
    calls = []
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    for relu in relus:
        relu.register_forward_hook(lambda module, *_: calls.append(module))
    model(images(name).to("meta"))
    assert len(calls) == len(set(calls)) == len(relus) > 0


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_gives_the_same_logits_and_keeps_the_layout(name):
    model = create(name).eval()
    x = images(name)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), expected, rtol=1e-4, atol=1e-5)
    normalize = Normalize([0.5] * x.shape[1], [0.5] * x.shape[1])
    assert normalize(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SMALL)
def test_bf16_autocast_trains(name):
    model = create(name)
    x = images(name).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
