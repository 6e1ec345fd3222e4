"""Models of the timm library, which is imported only when one is requested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from surestep.errors import UserError, need
from surestep.models._base import Classifier, choose_normalize

PREFIX = "timm:"


def create_timm(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    normalize: bool,
    pretrained: bool = False,
) -> Classifier:
    """Create ``timm:NAME``, with the normalisation that its pretrained weights expect.

    Where the number of channels differs, timm makes the weights from those for colour, which
    expect the colours' mean statistics in each channel.

    timm's own classifier stays inside ``body``; ``head`` is the identity.

    Raises:
        UserError: timm is not installed or cannot create the model, or mean and std do not match
            in_channels.
    """
    timm = need("timm", name, "surestep[timm]")

    def build(**options: int) -> Any:
        options |= {"num_classes": num_classes, "in_chans": in_channels}
        try:
            return timm.create_model(name.removeprefix(PREFIX), pretrained=pretrained, **options)
        except OSError as error:  # the Hub raises it, too
            raise UserError(f"timm cannot load the weights of {name!r}: {error}") from error
        # timm raises these for an unknown name or tag, and for a size that a model cannot take.
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"timm cannot create {name!r} ({error}): timm.list_models() lists its models"
            ) from error

    model = build()
    config = model.pretrained_cfg
    own = [config["mean"], config["std"]]
    if len(config["mean"]) != in_channels:
        own = [[sum(values) / len(values)] * in_channels for values in own]
    # Only models of a fixed size, such as vision transformers, take the option img_size.
    fixed_size = config["input_size"][-1] if config.get("fixed_input_size") else None
    if fixed_size and image_size not in (None, fixed_size):
        model, fixed_size = build(img_size=image_size), image_size
    return Classifier(
        name,
        body=model,
        head=nn.Identity(),
        in_channels=in_channels,
        image_size=fixed_size,
        normalize=choose_normalize(in_channels, mean, std, (own[0], own[1])) if normalize else None,
    )
