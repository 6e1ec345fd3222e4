"""What a step does on devices that are not here."""

import pytest
import torch
from families.reading import NoReading
from torch import Tensor

from surestep import Linf, methods


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("q", [0.0, 0.35, 0.99])
def test_zerograd_where_only_deterministic_kernels_may_run(
    make_task, deterministic, monkeypatch, q
):
    """kthvalue has none on CUDA and MPS, where it raises."""
    task = make_task("conv")
    task.x[0] = 0.5  # pixels whose gradients are alike
    method = methods.get("zerograd")(Linf(0.1), q=q)
    torch.use_deterministic_algorithms(False)
    plain = method.gradient(task.net, task.x, task.y)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(Tensor, "kthvalue", None)
    assert torch.equal(method.gradient(task.net, task.x, task.y), plain)


def test_no_step_needs_values_or_the_host(method, make_task):
    """Two steps of tensors that have no values, on a device of which there is none."""
    task = make_task("conv", dtype=torch.float32)
    net = task.net.to("meta")
    method._inputs_checked = True  # the check of the first batch looks at values, as it should
    x, y, index = task.x.to("meta"), task.y.to("meta"), task.index.to("meta")
    for step in (3, 4):
        method.progress = methods.Progress(step=step, steps_per_epoch=10, epochs=2, images=64)
        with NoReading():
            result = method(net, x, y, index)
            result.loss.backward()
        assert all(t.is_meta for t in (result.loss, result.x_adv, *result.terms.values()))
        assert all(p.grad is not None and p.grad.is_meta for p in net.parameters())
