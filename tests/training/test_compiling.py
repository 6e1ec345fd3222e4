"""torch.compile of the network: the same training, and one line where it cannot."""

from __future__ import annotations

import functools

import pytest
import safetensors.torch
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.registry import lookup_backend

import surestep
from surestep import UserError

pytestmark = pytest.mark.usefixtures("nothing_stays_compiled")


@pytest.fixture
def backend(monkeypatch):
    """Compile by a backend that needs no C++ compiler; whatever it is given is counted."""
    graphs = []

    def use(name):
        def counted(graph, inputs):
            graphs.append(graph)
            return lookup_backend(name)(graph, inputs)

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
        return graphs

    return use


@pytest.mark.parametrize("slug", ["sat-r1", "sat-r2", "pgd", "fgsm-fuap"])
def test_the_run_is_that_of_the_plain_network(tiny, tmp_path, backend, slug):
    plain = tiny.train(slug, out=tmp_path / "plain", epochs=1, ema=0.9)
    graphs = backend("aot_eager")
    compiled = tiny.train(slug, out=tmp_path / "compiled", epochs=1, ema=0.9, compile=True)
    assert graphs
    ours, theirs = plain.model.state_dict(), compiled.model.state_dict()
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    # The file is that of any run: no wrapper's prefix in the names.
    assert tiny.weights(tmp_path / "compiled")[:500] == tiny.weights(tmp_path / "plain")[:500]
    tiny.train(slug, out=tmp_path / "compiled", epochs=1, ema=0.9, compile=True, resume=True)


@pytest.mark.parametrize("slug", ["fgsm", "sat-r1", "pgd"])
def test_the_attack_computes_no_weight_gradient(tiny, monkeypatch, slug):
    """A backward graph holds whatever its inputs want, used or not."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def note(graph, inputs):
        found = [n for n in graph.graph.nodes if "convolution_backward" in str(n.target)]
        if found:
            seen.append([list(n.args[-1]) for n in found])
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = tiny.net().train()
    tiny.train(slug, model=model, epochs=1, compile=True, val_images=0)
    update = [masks for masks in seen if any(mask[1] for mask in masks)]
    attack = [masks for masks in seen if masks not in update]
    # The image's gradient comes with no weight's, the weights' without the image's.
    assert update
    assert attack
    assert all(mask[0] for masks in attack for mask in masks)
    assert not any(masks[-1][0] for masks in update)
    assert all(p.requires_grad for p in model.parameters())


def test_a_network_that_comes_compiled(tiny, tmp_path):
    plain = tiny.train("sat-r2", out=tmp_path / "plain", epochs=1)
    graphs, backend = [], lookup_backend("aot_eager")
    model = tiny.net()
    given = torch.compile(model, backend=lambda *args: graphs.append(args) or backend(*args))
    fitted = tiny.train("sat-r2", model=given, out=tmp_path / "given", epochs=1)
    assert graphs
    assert fitted.model is model
    torch.testing.assert_close(model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-5)
    kept = safetensors.torch.load_file(tmp_path / "given" / "model.safetensors")
    assert kept.keys() == model.state_dict().keys()
    tiny.train("sat-r2", model=given, out=tmp_path / "given", epochs=1, resume=True)
    with pytest.raises(UserError, match="compile and max_memory"):
        tiny.train("sat-r2", model=given, max_memory=1.0)


@pytest.mark.usefixtures("small_budget")
def test_judging_a_compiled_network(tiny):
    model, (x, y) = tiny.net().eval(), tiny.data()
    compiled = torch.compile(model, backend="aot_eager")
    task = ((x, y), tiny.threat)
    ours, theirs = (surestep.evaluate(m, *task, budget="quick", n=20) for m in (model, compiled))
    assert theirs.robust_accuracy == ours.robust_accuracy
    plain, inside = (surestep.audit(m, *task, budget="quick", n=20) for m in (model, compiled))
    assert [(c.name, c.status) for c in inside.checks] == [(c.name, c.status) for c in plain.checks]
    assert inside.verdict == plain.verdict


def test_a_failing_compiler_is_one_line(tiny, monkeypatch):
    def failing(graph, inputs):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=failing))
    with pytest.raises(
        UserError, match=r"torch\.compile fails here, leave compile out: .*failing"
    ) as caught:
        tiny.train("sat-r2", compile=True)
    assert "\n" not in str(caught.value)


def test_a_compiler_that_refuses_is_one_line(tiny, monkeypatch):
    def refuses(_):
        raise RuntimeError("Dynamo is not supported on Python 3.99+")

    monkeypatch.setattr(torch, "compile", refuses)
    with pytest.raises(UserError, match="fails here, leave compile out: Dynamo is not supported"):
        tiny.train("sat-r2", compile=True)


def test_not_with_second_derivatives_or_dropout(tiny):
    with pytest.raises(UserError, match="gradalign differentiates gradients, which cannot be"):
        tiny.train("gradalign", compile=True)
    with pytest.raises(UserError, match="sads changes its dropout at each step"):
        tiny.train("sads", compile=True)
    with pytest.raises(UserError, match="fgsm changes its dropout at each step"):
        tiny.train("fgsm", compile=True, dropout=0.2)


def test_no_second_derivatives_in_half_precision(tiny):
    for slug, options in (("gradalign", {}), ("converge-smooth", {"perturbation": "gradalign"})):
        with pytest.raises(UserError, match=f"{slug} differentiates gradients, .* fp16: use"):
            tiny.train(tiny.method(slug, **options), precision="fp16")


def test_not_with_a_memory_limit(tiny):
    with pytest.raises(UserError, match=r"compile and max_memory \(1\) do not go together"):
        tiny.train("sat-r2", compile=True, max_memory=1.0)
