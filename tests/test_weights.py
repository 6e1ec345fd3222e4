"""Weights in files: surestep's own, and those of others."""

from __future__ import annotations

from collections import OrderedDict
from itertools import product

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from surestep.errors import UserError
from surestep.weights import Signature, load_any_weights, load_weights, read_signature, save_weights


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


class TestWeights:
    def test_round_trip_in_any_memory_format(self, tmp_path):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        save_weights(tmp_path / "a", net)
        save_weights(tmp_path / "b", net.to(memory_format=torch.channels_last))
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        load_weights(tmp_path / "a", other)
        assert identical(dict(other.state_dict()), dict(net.state_dict()))

    def test_others_can_read_them(self, tmp_path):
        net = nn.Linear(2, 3)
        save_weights(tmp_path / "w", net)
        net.load_state_dict(safetensors.torch.load_file(tmp_path / "w"))

    def test_what_a_model_takes_and_gives(self, tmp_path):
        for signature in (Signature(), Signature(("ape", "bee, \u00e4"), (3, 8, 8))):
            save_weights(tmp_path / "w", nn.Linear(2, 2), signature)
            assert read_signature(tmp_path / "w") == signature
            load_weights(tmp_path / "w", nn.Linear(2, 2))
        with pytest.raises(UserError, match="does not exist"):
            read_signature(tmp_path / "none")

    def test_tied_weights(self, tmp_path):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        save_weights(tmp_path / "w", net)
        load_weights(tmp_path / "w", net)
        assert net[1].weight is net[0].weight

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            (nn.Linear(2, 4), r"bias has shape \(3,\), expected \(4,\)"),
            (nn.Linear(2, 3, bias=False), "missing nothing, unexpected bias"),
            (nn.Sequential(nn.Linear(2, 3)), r"missing 0\.bias, 0\.weight, unexpected bias"),
            (nn.BatchNorm1d(3), r"missing num_batches_tracked, running_mean, running_var, un"),
        ],
    )
    def test_weights_of_another_model(self, tmp_path, other, said):
        path = tmp_path / "w.safetensors"
        save_weights(path, nn.Linear(2, 3))
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(UserError, match=rf"w\.safetensors does not fit the model: .*{said}"):
            load_weights(path, other)
        assert identical(before, dict(other.state_dict()))


def test_weights_that_are_named_as_the_body_names_them(tmp_path):
    """As timm's own, of a model whose normalisation stands before timm's network."""
    net = nn.Sequential(OrderedDict(mean=nn.BatchNorm1d(2, affine=False), body=nn.Linear(2, 3)))
    other = nn.Linear(2, 3)
    for prefix, save in product(("", "module."), (safetensors.torch.save_file, torch.save)):
        path = tmp_path / ("w.safetensors" if save is not torch.save else "w.pt")
        save({f"{prefix}{k}": v for k, v in other.state_dict().items()}, path)
        net.body.reset_parameters()
        load_any_weights(path, net)
        assert torch.equal(net.body.weight, other.weight)
    save_weights(tmp_path / "whole.safetensors", net)
    net.body.reset_parameters()
    load_any_weights(tmp_path / "whole.safetensors", net)
    assert torch.equal(net.body.weight, other.weight)
    headed = nn.Sequential(OrderedDict(body=nn.Linear(2, 3), head=nn.Linear(3, 3)))
    with pytest.raises(UserError, match=r"does not fit the model: missing body\.bias"):
        load_any_weights(tmp_path / "w.safetensors", headed)


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "model", "net"])
def test_weights_of_a_checkpoint(tmp_path, entry):
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({entry: other.state_dict(), "acc": 1.0, "mean": torch.ones(1)}, tmp_path / "w.pt")
    load_any_weights(tmp_path / "w.pt", net)
    assert torch.equal(net.weight, other.weight)


def test_a_checkpoint_with_weights_elsewhere_names_its_entries(tmp_path):
    torch.save({"weights": nn.Linear(2, 2).state_dict(), "t": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"a dict of weights, t: save .* or 'net'$"):
        load_any_weights(tmp_path / "w.pt", nn.Linear(2, 2))
    torch.save([1], tmp_path / "w.pt")
    with pytest.raises(UserError, match="no state_dict but a list"):
        load_any_weights(tmp_path / "w.pt", nn.Linear(2, 2))


@pytest.mark.parametrize("named", ["_orig_mod.0.{}", "module._orig_mod.0.{}", "0._orig_mod.{}"])
def test_weights_of_a_compiled_model(tmp_path, named):
    """torch.compile puts a name before each, of the whole or of parts."""
    layer = nn.Linear(2, 2)
    torch.save({named.format(k): v for k, v in layer.state_dict().items()}, tmp_path / "w.pt")
    net = nn.Sequential(nn.Linear(2, 2))
    load_any_weights(tmp_path / "w.pt", net)
    assert torch.equal(net[0].weight, layer.weight)


def test_a_compiled_model_takes_the_names_that_it_has(tmp_path):
    compiled = nn.Sequential(OrderedDict(_orig_mod=nn.Linear(2, 2)))
    torch.save(compiled.state_dict(), tmp_path / "w.pt")
    load_any_weights(tmp_path / "w.pt", compiled)


def test_safetensors_of_a_wrapped_model(tmp_path):
    """As DistributedDataParallel, and RobustBench, put a name before each."""
    net = nn.Linear(2, 2)
    for prefix in ("module.", "model.", "module.model."):
        named = {f"{prefix}{k}": v for k, v in net.state_dict().items()}
        safetensors.torch.save_file(named, tmp_path / "w.safetensors")
        other = nn.Linear(2, 2)
        load_any_weights(tmp_path / "w.safetensors", other)
        assert torch.equal(other.weight, net.weight)
    safetensors.torch.save_file({"weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="missing bias"):
        load_any_weights(tmp_path / "w.safetensors", nn.Linear(2, 2))


class Versioned(nn.Linear):
    """A layer that once stored its weight doubled, and now refuses weights of the future."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        version = metadata.get("version") or 1
        if version < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2
        if version > 2:
            raise ValueError(f"version {version} is newer than 2")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_modules_are_told_the_version_of_their_weights(tmp_path, prefix):
    net = nn.Sequential(Versioned(2, 2))
    wrapped = net
    for part in reversed(prefix.split(".")[:-1]):
        wrapped = nn.Sequential(OrderedDict([(part, wrapped)]))
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "w.pt")
    safetensors.torch.save_file(wrapped.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        other = nn.Sequential(Versioned(2, 2))
        load_any_weights(tmp_path / name, other)
        assert torch.equal(other[0].weight, net[0].weight)
    save_weights(tmp_path / "own", net)
    load_weights(tmp_path / "own", other)
    assert torch.equal(other[0].weight, net[0].weight)


def test_weights_that_a_module_refuses(tmp_path):
    net = Versioned(2, 2)
    net._version = 3
    torch.save(net.state_dict(), tmp_path / "w.pt")
    save_weights(tmp_path / "w", net)
    with pytest.raises(UserError, match="does not fit the model: version 3 is newer than 2"):
        load_any_weights(tmp_path / "w.pt", Versioned(2, 2))
    with pytest.raises(UserError, match="does not fit the model: version 3 is newer than 2"):
        load_weights(tmp_path / "w", net)
