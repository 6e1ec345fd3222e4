"""A run's model, and the class order of its outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from surestep import models
from surestep.config import RunConfig
from surestep.data import Images, are_numbers
from surestep.errors import UserError
from surestep.posthoc import insert
from surestep.randomness import forked_rng
from surestep.runs._parts import absolute
from surestep.weights import load_any_weights


def build_model(config: RunConfig, images: Images, *, begin: bool = False) -> nn.Module:
    """Build a run's model for its data, with the random weights of its seed.

    Args:
        config: the run's settings.
        images: images of its data set.
        begin: load the initial weights that the settings name, if any.

    Raises:
        UserError: the data are not images, there is no such model or it does not take them, or its
            initial weights are missing, damaged or of another model.
    """
    pretrained = begin and config.weights == "pretrained"
    shape = images.image_shape
    if len(shape) != 3:
        raise UserError(
            f"{images.name} has samples of shape {shape}, but the command line's models take "
            "images (C, H, W): use surestep.fit with your own model"
        )
    with forked_rng(torch.device("cpu")):  # the caller's random state stays as it was
        torch.manual_seed(config.seed)
        model = models.create(
            config.model,
            images.num_classes,
            in_channels=shape[0],
            image_size=shape[-1],
            pretrained=pretrained,
            normalize=config.normalize,
        )
        named = config.weights if begin and not pretrained else None
        weights = None if named is None else Path(absolute(named))
        model = _with_head(model, config, images.pixels(slice(0, 1)), weights)
    if config.mean_sparse is not None:
        model = insert(model, images.pixels(slice(0, 1)), config.mean_sparse)
    return model


def _with_head(model: nn.Module, config: RunConfig, x: Tensor, weights: Path | None) -> nn.Module:
    """Return the model with the run's head, and with weights from a model with either head.

    The model is run on the image ``x`` (1, C, H, W) to find the layer that the head replaces.
    """
    if config.head == "hypersphere":
        plain = copy.deepcopy(model) if weights else model
        model = models.on_hypersphere(model, x, scale=config.head_scale)
        if weights is not None:
            try:
                load_any_weights(weights, model)
            except UserError:
                load_any_weights(weights, plain)
                return models.on_hypersphere(plain, x, scale=config.head_scale)
    elif weights is not None:
        load_any_weights(weights, model)
    return model


def in_class_order_of(name: str, theirs: Sequence[str], images: Images) -> Images:
    """Return the images with labels in a model's class order, if the class names tell it.

    Args:
        name: the model, as errors name it.
        theirs: the class names of its outputs; empty if unknown.
        images: labelled in the data's class order; returned as they are if that is the same.

    Raises:
        UserError: the model knows only some of the data's classes.
    """
    ours = images.classes
    known = set(theirs) & set(ours)
    ambiguous = len(set(theirs)) < len(theirs) or len(set(ours)) < len(ours)
    if tuple(ours) == tuple(theirs) or not known or ambiguous:
        return images
    unknown = [one for one in ours if one not in known]
    numbers = are_numbers(ours) or are_numbers(theirs)
    # Some names may differ, if all shared names have the same positions in both.
    alike = len(ours) == len(theirs) and all(ours.index(k) == theirs.index(k) for k in known)
    if unknown and (numbers or alike):
        return images
    if unknown:
        raise UserError(
            f"{name} does not know the class {unknown[0]!r} of the data, but it knows "
            f"{len(known)} of {len(ours)}: rename the data's classes as the model names them, or "
            "leave out those that it was not trained on"
        )
    number = torch.tensor([theirs.index(one) for one in ours])
    labels = torch.where(images.y < 0, images.y, number[images.y])
    return replace(images, y=labels, classes=tuple(theirs))
