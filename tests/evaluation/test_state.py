"""Killed and given again, an evaluation ends with the numbers of one that was never stopped."""

from __future__ import annotations

import copy
import json
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import surestep
from surestep.errors import UserError
from surestep.evaluation import _evaluate as room
from surestep.evaluation import evaluate
from surestep.evaluation._state import State, model_digest
from surestep.evaluation.suite import Attack
from surestep.models import Normalize
from surestep.posthoc import insert
from surestep.posthoc.mean_sparse import layers

THREAT = surestep.Linf(0.05)
ATTACKS = ("pgd-4x2", "noise-3", "fgsm", "square-20")


def without_times(found: Any) -> str:
    values = found.to_dict()
    values.pop("seconds")
    values.pop("attack_seconds")
    for attack in values["attacks"]:
        attack.pop("seconds")
    return json.dumps(values)


def run(net, data, state=None, **changes: Any) -> str:
    given = {"attacks": ATTACKS, "batch_size": 20, "eps": [0.02], **changes}
    return without_times(evaluate(net, data, THREAT, state=state, **given))


def test_cut_at_any_byte(net, images, tmp_path):
    whole = run(net, images)
    path = tmp_path / "state.jsonl"
    assert run(net, images, path) == whole
    written = path.read_bytes()
    assert written.count(b"\n") == 1 + 5 * (1 + len(ATTACKS))
    for size in [0, 1, *range(7, len(written), len(written) // 9), len(written) - 1]:
        path.write_bytes(written[:size])
        assert run(net, images, path) == whole
    assert len(path.read_bytes().splitlines()) == len(written.splitlines())


def test_what_is_done_is_not_done_again(net, images, tmp_path):
    path = tmp_path / "new" / "state.jsonl"
    whole = run(net, images, path, doubt=False)
    net.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    calls: list[int] = []
    assert run(net, images, path, doubt=False) == whole
    # Of both radii a look at one image of each batch, and two passes over the first; no attack.
    # And one look whether the model seeds what is random.
    assert sorted(calls) == [1] * 10 + [1] + [20] * 4


def test_a_state_that_lists_no_parts_is_read(net, images, tmp_path):
    path = tmp_path / "state.jsonl"
    whole = run(net, images, path, attacks=["fgsm"], eps=[])
    written = path.read_bytes()
    path.write_bytes(written.replace(b', "parts": {}', b""))
    assert path.read_bytes() != written
    assert run(net, images, path, attacks=["fgsm"], eps=[]) == whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "other seed"),
        ({"batch_size": 19}, "other batch_size"),
        ({"attacks": ATTACKS[:2]}, "other attacks"),
        ({"n": 7}, "other n"),
        ({"precision": torch.bfloat16}, "other precision"),
        ({"preprocess": Normalize((0.4,), (0.2,))}, "other preprocess"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(net, images, tmp_path, changes, said):
    path = tmp_path / "state.jsonl"
    run(net, images, path)
    written = path.read_bytes()
    with pytest.raises(UserError, match=said):
        run(net, images, path, **changes)
    assert path.read_bytes() == written


def test_data_that_are_drawn_at_random_are_drawn_alike(net, images, tmp_path):
    """Between the attacks, whether these run or are known: they have numbers of their own."""
    x, y = images

    class Noisy(Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, i):
            noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
            return (x[i] + 0.01 * noise).clamp(0, 1), y[i]

    def judged(state):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        return run(net, DataLoader(Noisy(), 20), state, eps=[], doubt=False)

    path = tmp_path / "state.jsonl"
    whole = judged(path)
    written = path.read_bytes()
    for size in (len(written) // 3, len(written)):
        path.write_bytes(written[:size])
        assert judged(path) == whole


def test_a_state_of_an_older_version_says_so(net, images, tmp_path):
    path = tmp_path / "state.jsonl"
    run(net, images, path)
    head, *rest = path.read_text().splitlines(keepends=True)
    old = {k: v for k, v in json.loads(head).items() if k != "version"}
    path.write_text("".join([json.dumps(old, sort_keys=True) + "\n", *rest]))
    with pytest.raises(UserError, match="another version of surestep: delete it"):
        run(net, images, path)


def test_another_model_or_other_data_are_refused(net, images, tmp_path):
    path = tmp_path / "state.jsonl"
    run(net, images, path)
    written = path.read_bytes()
    x, y = images
    with pytest.raises(UserError, match="batch 0 differs"):
        run(net, (x.flip(0), y.flip(0)), path)
    with torch.no_grad():
        net[0].weight.mul_(1.01)
    with pytest.raises(UserError, match="other model"):
        run(net, images, path)
    assert path.read_bytes() == written


def test_code_that_answers_otherwise_is_refused(net, images, tmp_path):
    """The weights are the same, and so is what the layers tell."""

    class Scaled(nn.Module):
        factor, turned = 1.0, images[0][:0]

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            z = self.factor * self.net(x)
            there = torch.isin(x[:, :, 0, 0], self.turned[:, :, 0, 0])
            return torch.where(there, -z, z)

    path = tmp_path / "state.jsonl"
    whole = run(Scaled(), images, path)
    written = path.read_bytes()
    Scaled.turned = images[0][16:20]  # none of those whose logits the state keeps
    with pytest.raises(UserError, match=r"changed since .* \(it classifies [34] of 20 images diff"):
        run(Scaled(), images, path)
    Scaled.turned, Scaled.factor = images[0][:0], 1.05  # changes no class
    with pytest.raises(UserError, match=r"\(its logits differ on 16 of 16 images\): restore its"):
        run(Scaled(), images, path)
    Scaled.factor = 1 + 1e-5  # as another machine may round
    assert run(Scaled(), images, path) == whole
    with pytest.raises(UserError, match="other model"):
        run(net, images, path)
    assert path.read_bytes() == written


@pytest.mark.parametrize("draws", ["numpy", "python", "its own"])
def test_a_random_model_is_no_other_code(net, images, tmp_path, draws):
    """Whatever it draws from: what can be seeded is, and the rest is not held against it."""
    own = torch.Generator()

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net.eval()

        def forward(self, x):
            noise = {
                "numpy": lambda: torch.from_numpy(np.random.randn(*x.shape)),  # noqa: NPY002
                "python": lambda: torch.tensor([random.gauss(0, 1) for _ in range(x.numel())]),
                "its own": lambda: torch.randn(x.shape, generator=own),
            }[draws]()
            return self.net(x + noise.view_as(x).to(x.dtype))

    path = tmp_path / "state.jsonl"
    given = {"attacks": ["noise-3", "fgsm"], "eps": [], "doubt": False}
    whole = run(Noisy(), images, path, **given)
    assert run(Noisy(), images, path, **given) == whole
    path.write_bytes(path.read_bytes()[:700])
    again = run(Noisy(), images, path, **given)
    assert (again == whole) is (draws != "its own")


def test_other_attributes_are_refused(net, images, tmp_path):
    """Neither the weights nor what layers tell has them, and hardly an image changes its class."""

    class Tempered(nn.Module):
        def __init__(self, temperature):
            super().__init__()
            self.net, self.temperature = net, temperature

        def forward(self, x):
            return (self.net(x) / self.temperature).softmax(1)

    path = tmp_path / "state.jsonl"
    given = {"doubt": False, "eps": []}
    run(Tempered(1.0), images, path, **given)
    with pytest.raises(UserError, match=r"its logits differ on 1\d of 16 images"):
        run(Tempered(2.0), images, path, **given)
    # Another number of classes is no error of torch's.
    more = nn.Sequential(Tempered(1.0))
    more.forward = lambda x: torch.nn.functional.pad(more[0](x), (0, 1))
    run(nn.Sequential(Tempered(1.0)), images, tmp_path / "other", **given)
    with pytest.raises(UserError, match="its logits differ on 16 of 16 images"):
        run(more, images, tmp_path / "other", **given)


def test_two_evaluations_do_not_share_a_file(net, images, tmp_path):
    """Each would overwrite the other's lines."""
    path, said = tmp_path / "state.jsonl", []

    def attack(model, x, y):
        with pytest.raises(UserError, match="is in use by another evaluation: wait for it") as e:
            evaluate(net, images, THREAT, own, state=path)
        said.append(e)
        return x

    own = {"own": Attack(attack)}
    whole = without_times(evaluate(net, images, THREAT, own, state=path))
    assert said
    # Also where a forked worker still has the file open.
    state = State(tmp_path / "other.jsonl", {"version": 1})
    copy_of_it = os.dup(state._file.fileno())
    state.close()
    State(tmp_path / "other.jsonl", {"version": 1}).close()
    os.close(copy_of_it)
    # A refused one lets go of the file.
    with pytest.raises(UserError, match="other seed"):
        evaluate(net, images, THREAT, own, state=path, seed=1)
    assert without_times(evaluate(net, images, THREAT, own, state=path)) == whole


def test_buffers_that_are_not_saved_tell_models_apart():
    def made(value):
        layer = nn.Linear(2, 2)
        nn.init.ones_(layer.weight)
        nn.init.ones_(layer.bias)
        layer.register_buffer("hidden", torch.tensor(value), persistent=False)
        return model_digest(layer)

    assert made(1.0) == made(1.0) != made(2.0)


def test_other_layers_are_another_model(net):
    assert model_digest(nn.Sequential(nn.ReLU())) != model_digest(nn.Sequential(nn.Sigmoid()))
    assert model_digest(net) == model_digest(copy.deepcopy(net))


def test_other_sources_and_thresholds_are_refused(net, images, tmp_path):
    path, sources = tmp_path / "state.jsonl", [copy.deepcopy(net)]
    run(net, images, path, attacks=["transfer"], sources=sources)
    with torch.no_grad():
        sources[0][0].weight.mul_(1.01)
    with pytest.raises(UserError, match="other sources"):
        run(net, images, path, attacks=["transfer"], sources=sources)
    sparse, path = insert(net.eval(), images[0][:1], 0.2), tmp_path / "sparse.jsonl"
    run(sparse, images, path)
    layers(sparse)[0].threshold = 0.4  # which no buffer holds
    with pytest.raises(UserError, match="other model"):
        run(sparse, images, path)


def test_a_substitute_is_no_other_source(net, images, tmp_path, monkeypatch):
    """On another number of threads, or a GPU, it ends in other last digits."""
    path, given = tmp_path / "state.jsonl", {"attacks": ["transfer"], "eps": [0.02]}
    whole = run(net, images, path, **given)
    made = room.substitute

    def nearly(*args):
        found = made(*args)
        with torch.no_grad():
            next(found.parameters()).mul_(1 + 1e-6)
        return found

    monkeypatch.setattr(room, "substitute", nearly)
    assert run(net, images, path, **given) == whole


def test_a_random_model_is_resumed_to_the_same_numbers(net, images, tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net.eval()

        def forward(self, x):
            return self.net(x + 0.2 * torch.randn_like(x))

    path = tmp_path / "state.jsonl"
    whole = run(Noisy(), images, doubt=False)
    assert run(Noisy(), images, path, doubt=False) == whole
    written = path.read_bytes()
    for size in (300, len(written) // 2):
        path.write_bytes(written[:size])
        assert run(Noisy(), images, path, doubt=False) == whole


@pytest.mark.parametrize(
    "text", ['{"clean": 0.9}', "hello", "hello\n", '{"a": 1}\nhello\n', "[1]\n[2]\n", "\n\n"]
)
def test_what_is_no_state(net, images, tmp_path, text):
    path = tmp_path / "state.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="state of an evaluation"):
        run(net, images, path)
    assert path.read_text() == text


def test_a_place_that_cannot_be_written(net, images, tmp_path):
    with pytest.raises(UserError, match="cannot use the state file"):
        run(net, images, tmp_path)


def test_a_loader_can_be_continued(net, images, tmp_path):
    path = tmp_path / "state.jsonl"
    loader = DataLoader(TensorDataset(*images), 13)
    whole = run(net, loader)
    assert run(net, loader, path) == whole
    path.write_bytes(path.read_bytes()[:900])
    assert run(net, loader, path) == whole


def test_the_curve_keeps_its_own_state(net, images, tmp_path):
    path = tmp_path / "state.jsonl"
    run(net, images, path, eps=[0.01, 0.02])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "state.jsonl",
        "state.jsonl.eps-0.01",
        "state.jsonl.eps-0.02",
    ]
