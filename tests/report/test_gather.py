from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surestep
from surestep.attacks.gradients import input_gradient
from surestep.report import _gather, _png, gather

LINF = surestep.Linf(0.3)


def decode(uri: str):
    from PIL import Image

    start = "data:image/png;base64,"
    assert uri.startswith(start)
    return Image.open(io.BytesIO(base64.b64decode(uri[len(start) :])))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels):
    picture = torch.arange(channels * 5 * 7).view(channels, 5, 7) / 200
    array = np.asarray(decode(_png.data_uri(picture))).reshape(5, 7, channels)
    expected = (picture * 255).round().permute(1, 2, 0).byte().numpy()
    assert (array == expected).all()


def test_png_clips():
    assert list(decode(_png.data_uri(torch.tensor([[[-1.0, 2.0]]]))).tobytes()) == [0, 255]


def test_surface(net, images):
    x, y = images
    found = gather(net, x, y, LINF, samples=3, points=5, steps=2, batch_size=7)
    surface = found["surfaces"]["this model"]
    assert surface["shares"] == [-1, -0.5, 0, 0.5, 1]
    assert (surface["n"], surface["eps"], surface["norm"]) == (3, 0.3, "linf")
    # Those that are right clean: every third is not.
    chosen = [1, 2, 4]
    assert [s["label"] for s in surface["samples"]] == y[chosen].tolist()
    net.eval()
    x, y = x[chosen], y[chosen]
    grad, _ = input_gradient(net, x, y)
    grids = torch.tensor([s["loss"] for s in surface["samples"]])
    for column, share in enumerate(surface["shares"]):
        at = (x + share * 0.3 * grad.sign()).clamp(0, 1)
        expected = F.cross_entropy(net(at), y, reduction="none")
        # The middle row: no random step.
        torch.testing.assert_close(grids[:, 2, column], expected, rtol=1e-3, atol=1e-4)
    mean = torch.tensor(surface["mean"])
    torch.testing.assert_close(grids.mean(0), mean, rtol=1e-3, atol=1e-4)
    # Off the middle row something else is measured.
    assert (grids[:, 0] - grids[:, 2]).abs().max() > 1e-3


def test_examples(net, images):
    x, y = images
    examples = gather(net, x, y, LINF, samples=3, points=3, steps=20)["examples"]
    net.eval()
    for example, i in zip(examples, (1, 2, 4), strict=True):
        assert example["clean_prediction"] == example["label"] == y[i]
        assert 0 < example["linf"] <= 0.3 + 1e-6
        assert example["attack"] == "pgd-20"
        clean, adversarial = (
            torch.tensor(list(decode(example[k]).tobytes())).view(8, 8) / 255
            for k in ("clean", "adversarial")
        )
        assert (clean - x[i, 0]).abs().max() <= 0.5 / 255 + 1e-6
        assert (clean - adversarial).abs().max() <= 0.3 + 1 / 255
        magnified = torch.tensor(list(decode(example["perturbation"]).tobytes())).view(8, 8) / 255
        expected = (adversarial - clean) * example["factor"] + 0.5
        assert (magnified - expected).abs().max() < 0.02
        predicted = net(adversarial[None, None]).softmax(1)[0]
        assert predicted.argmax() == example["adversarial_prediction"]


def test_the_model_and_the_random_state_are_left_as_they_were(net, images):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    gather(net, *images, LINF, samples=2, points=3, steps=2)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides(net, images):
    def found(seed):
        return gather(net, *images, LINF, samples=2, points=3, steps=2, seed=seed)

    torch.manual_seed(5)
    first = found(0)
    torch.manual_seed(6)
    assert found(0) == first
    assert found(1)["surfaces"] != first["surfaces"]


def test_l2_and_autocast(net, images):
    with torch.autocast("cpu", torch.bfloat16):
        low = gather(net, *images, surestep.L2(0.5), samples=2, points=3, steps=2)
    high = gather(net, *images, surestep.L2(0.5), samples=2, points=3, steps=2)
    assert low == high
    assert high["surfaces"]["this model"]["norm"] == "l2"
    assert all(0 < e["l2"] <= 0.5 + 1e-4 for e in high["examples"])


def test_wrong_images_fill_up(net, images):
    x, y = images
    found = gather(net, x[::3], y[::3], LINF, samples=8, points=3, steps=2)
    assert len(found["examples"]) == 4


def test_features_are_no_pictures():
    x, y = torch.rand(4, 6), torch.tensor([0, 1, 0, 1])
    found = gather(nn.Linear(6, 2), x, y, LINF, points=3, steps=2)
    assert found["examples"] == []
    assert found["surfaces"]["this model"]["n"] == 4


def test_large_pictures_are_embedded_small():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 120 * 240, 2))
    x, y = torch.full((1, 3, 120, 240), 0.5), torch.tensor([0])
    (example,) = gather(net, x, y, LINF, points=3, steps=2)["examples"]
    assert decode(example["clean"]).size == (96, 48)
    # Picked, not averaged: the perturbation is not blurred to grey.
    shown = decode(example["perturbation"]).tobytes()
    assert sum(abs(v - 128) for v in shown) / len(shown) > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples 0: give 1 or more"),
        ({"points": 2}, "points 2: give an odd number >= 3"),
        ({"points": 4}, "points 4: give an odd number"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_bad_settings(net, images, changes, message):
    with pytest.raises(surestep.UserError, match=message):
        gather(net, *images, LINF, **changes)


def test_bad_images(net, images):
    x, y = images
    with pytest.raises(surestep.UserError, match="x has values"):
        gather(net, x * 255, y, LINF)
    with pytest.raises(surestep.UserError, match=r"uint8.*/ 255"):
        gather(net, (x * 255).byte(), y, LINF)
    with pytest.raises(surestep.UserError, match="no image"):
        gather(net, x[:0], y[:0], LINF)


def test_too_little_memory(net, images, monkeypatch):
    x, y = images

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_gather, "_surface", full)
    with pytest.raises(
        surestep.UserError, match=r"memory in the report's pictures: lower batch_size \(8\)"
    ):
        gather(net, x, y, LINF, batch_size=8)


def test_models_that_draw_from_numpy_get_the_same_pictures_again(net, images):
    class Noisy(nn.Module):
        def forward(self, x):
            return net(x * float(np.random.rand()))  # noqa: NPY002 (as models do)

    found = []
    for state in (1, 2):
        np.random.seed(state)  # noqa: NPY002
        found.append(gather(Noisy(), *images, LINF, samples=2, points=3, steps=2))
    assert found[0] == found[1]
