"""What a processor of the Hugging Face Hub does to the pixels is done inside, or refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from surestep import UserError, targets

PLAIN = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
STATISTICS = {"image_mean": [0.5], "image_std": [0.25]}
TIMM = {"input_size": (1, 2, 2), "mean": (0.5,), "std": (0.25,), "crop_pct": 0.9}


def load(monkeypatch, **processor):
    def auto(made):
        return SimpleNamespace(from_pretrained=lambda _: made)

    package = SimpleNamespace(
        AutoModelForImageClassification=auto(nn.Identity()),
        AutoImageProcessor=auto(SimpleNamespace(**processor)),
    )
    monkeypatch.setattr(targets, "need", lambda *_: package)
    return targets._hugging_face("someone/net")(torch.ones(1, 1, 2, 2)).unique().tolist()


@pytest.mark.parametrize(
    ("processor", "white"),
    [
        ({**PLAIN, **STATISTICS}, 2.0),
        ({"rescale_factor": 1 / 255, "data_config": TIMM}, 2.0),  # transformers' wrapper of timm
        (STATISTICS, 2.0),
        ({**PLAIN, **STATISTICS, "do_normalize": False}, 1.0),
        ({}, 1.0),
    ],
)
def test_normalised_as_the_processor_does(monkeypatch, processor, white):
    assert load(monkeypatch, **processor) == [white]


@pytest.mark.parametrize(
    "other",
    [
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"rescale_offset": True},
        {"include_top": True},
        {"do_color_quantize": True},
        {"do_flip_channel_order": True},
    ],
)
def test_another_scale_is_refused(monkeypatch, other):
    with pytest.raises(UserError, match="hf:someone/net expects pixels in another order or scale"):
        load(monkeypatch, **{**PLAIN, **STATISTICS, **other})
