"""Interrupt a run and resume it: it ends with the same weights as without the interruption."""

import tempfile
from pathlib import Path

import torch

import surestep
from surestep import data, models

images = data.load("mnist").first(4096)
method = surestep.methods.get("sat-r3")(surestep.Linf(eps=0.3))


class Stop(Exception):
    """Simulates a crash."""


def crash(row, model):
    """Print the row of an epoch, and crash after the first (called after each epoch)."""
    print(f"epoch {row['epoch']}: loss {row['loss']:.3f}, worst case {row['val_worst_case']:.1%}")
    if row["epoch"] == 1:
        raise Stop


def train(out, **options):
    """Train a fresh network; a resumed run takes its weights from its folder."""
    torch.manual_seed(0)
    net = models.create("cnn-small")
    settings = {"epochs": 2, "lr": 0.05, "val_images": 100, "quiet": True, **options}
    return surestep.fit(net, images, method, out=out, **settings)


with tempfile.TemporaryDirectory() as folder:
    whole, stopped = Path(folder) / "whole", Path(folder) / "stopped"
    train(whole)
    try:
        train(stopped, on_epoch=crash)
    except Stop:
        train(stopped, resume=True)
    same = [(out / "model.safetensors").read_bytes() for out in (whole, stopped)]
    print("bit for bit the same:", same[0] == same[1])
