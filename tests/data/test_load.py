from __future__ import annotations

import pytest

from surestep import data


def test_names():
    assert data.names() == ["mnist", "cifar10", "cifar100", "folder", "npz", "hf"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: data.load("minst"), ["did you mean 'mnist'"]),
        (lambda: data.load("mnist", "val"), ["'val'", "train, validation, test"]),
        (lambda: data.load("folder"), ["folder:PATH"]),
        (lambda: data.load("folder:"), ["ends at the colon"]),
        (lambda: data.load("npz"), ["npz:FILE"]),
        (lambda: data.load("hf"), ["hf:NAME"]),
        (lambda: data.load("folder:a", root="b"), ["both"]),
        (lambda: data.load("mnist", image_size=32), ["image_size 32", "leave it out"]),
        (lambda: data.load("folder:a", image_size=0), ["image_size 0"]),
    ],
)
def test_mistakes(refused, call, words):
    refused(call, *words)


def test_the_place_may_follow_a_colon_or_be_the_root(tmp_path, refused):
    for call in (
        lambda: data.load(f"cifar10:{tmp_path}", download=False),
        lambda: data.load("cifar10", root=tmp_path, download=False),
    ):
        refused(call, str(tmp_path), "data_batch_1.bin")
