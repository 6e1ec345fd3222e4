"""An attack leaves everything as it found it, wherever it is called from."""

import copy

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from surestep import attacks
from surestep.attacks import auto
from surestep.attacks.gradients import input_gradient
from surestep.attacks.inputs import check_inputs, forward_logits
from surestep.attacks.lending import attacking, buffers_kept, copy_all, hooked, interpreted


def snapshot(net):
    return {
        "modes": {name: m.training for name, m in net.named_modules()},
        "flags": {name: p.requires_grad for name, p in net.named_parameters()},
        "state": {name: t.clone() for name, t in net.state_dict().items()},
        "grads": {name: p.grad for name, p in net.named_parameters()},
    }


def assert_untouched(net, before):
    after = snapshot(net)
    for part in ("modes", "flags"):
        assert after[part] == before[part]
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value), name
    for name, value in before["grads"].items():
        assert after["grads"][name] is value, name


def break_at(net, call):
    """Make the network raise at the given forward call, counted from 1."""
    calls = iter(range(1, 100))

    def hook(module, args):
        if next(calls) == call:
            raise KeyError("the model broke")

    return net.register_forward_pre_hook(hook)


def test_model_images_and_labels_are_left_as_found(convnet, images, threat, attack):
    x, y = images()
    before, x_before, y_before = snapshot(convnet), x.clone(), y.clone()
    assert {True, False} == set(before["modes"].values())
    x_adv = attack(convnet, x, y, threat)
    assert_untouched(convnet, before)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert x.grad is None
    assert not x.requires_grad
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None
    assert x_adv.data_ptr() != x.data_ptr()


def test_no_graph_even_from_images_that_ask_for_one(convnet, images, threat, attack):
    x, y = images()
    x.requires_grad_()
    x_adv = attack(convnet, x, y, threat)
    assert not x_adv.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("part", [auto.fab_t, auto.apgd_ce, auto.square])
def test_the_parts_of_autoattack_leave_no_gradients(convnet, images, threat, part):
    x, y = images()
    before = snapshot(convnet)
    part(convnet, x, y, threat, 3)
    assert_untouched(convnet, before)


def test_existing_gradients_survive(convnet, images, threat, attack):
    x, y = images()
    nn.functional.cross_entropy(convnet(x), y).backward()
    before = snapshot(convnet)
    kept = {name: g.clone() for name, g in before["grads"].items() if g is not None}
    attack(convnet, x, y, threat)
    assert_untouched(convnet, before)
    for name, grad in kept.items():
        assert torch.equal(before["grads"][name], grad)


def test_modes_are_restored_when_the_model_raises(convnet, images, threat, attack):
    x, y = images()
    before = snapshot(convnet)
    handle = break_at(convnet, 2)  # the first call is the check of the inputs
    with pytest.raises(KeyError, match="the model broke"):
        attack(convnet, x, y, threat)
    handle.remove()
    assert_untouched(convnet, before)


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_attacking_restores(convnet, images, train_mode, broken):
    x, y = images()
    # As a whole in train mode it would keep the modes of its layers.
    convnet.training = not train_mode
    before = snapshot(convnet)
    handle = break_at(convnet, 3 if broken else 99)
    try:
        with attacking(convnet, train_mode=train_mode) as inner:
            assert all(m.training == train_mode for m in inner.modules())
            for _ in range(3):
                input_gradient(inner, x, y)
            changed = not torch.equal(inner[5].running_mean, before["state"]["5.running_mean"])
            assert changed == train_mode
    except KeyError:
        assert broken
    handle.remove()
    assert_untouched(convnet, before)


@pytest.mark.parametrize("part", [False, True])
def test_a_gradient_outlives_the_next_pass_of_a_cuda_graph(convnet, images, monkeypatch, part):
    """What torch.compile's reduce-overhead returns lies in memory that the next pass uses, too."""
    x, y = images()
    graphs, grad = torch.zeros_like(x), torch.autograd.grad

    def replayed(*args, **options):
        return (graphs.copy_(*grad(*args, **options)),)

    compiled = convnet[0] if part else convnet
    compiled._compiled_call_impl = compiled._call_impl
    monkeypatch.setattr(torch.autograd, "grad", replayed)
    found, _ = input_gradient(convnet, x, y)
    before = found.clone()
    other, _ = input_gradient(convnet, 1 - x, y)
    assert torch.equal(found, before)
    assert not torch.equal(found, other)


class Copies(TorchDispatchMode):
    """Counts the copies, each a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "copy" in func.overloadpacket.__name__ or "clone" in func.overloadpacket.__name__:
            self.made.append(args[0])
        return func(*args, **kwargs or {})


def test_buffers_are_kept_by_one_copy_a_type():
    """Those of layers that their owner keeps in eval mode are not even copied."""
    net = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(4))).train()
    net[1].eval()
    net[3].running_mean = net[0].running_mean  # shared
    before = {name: b.clone() for name, b in net.named_buffers()}
    with Copies() as copies, buffers_kept(net):
        for buffer in net.buffers():
            buffer += 7
    # Floats and counts, there and back.
    assert sorted(map(len, copies.made)) == [3, 3, 5, 5]
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name] + 7 * name.startswith("1."))


def test_buffers_come_back_when_the_pass_raises():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(5, 2))
    with pytest.raises(RuntimeError, match="shapes"), buffers_kept(net):
        net(torch.rand(4, 3))
    assert torch.equal(net[0].running_mean, torch.zeros(3))
    assert int(net[0].num_batches_tracked) == 0


def test_copies_between_types_and_of_nothing():
    kinds = [torch.float32, torch.int64, torch.float64, torch.bool, torch.float32]
    to = [torch.zeros(2, 3, dtype=kind) for kind in kinds]
    of = [torch.full((2, 3), 1 + k).to(kind) for k, kind in enumerate(kinds)]
    of[0] = of[0].double().T.contiguous().T
    copy_all(to, of)
    assert all(
        torch.equal(mine, theirs.to(mine.dtype)) for mine, theirs in zip(to, of, strict=True)
    )
    copy_all([], [])


def test_a_graph_from_before_a_train_mode_attack_still_differentiates(convnet, images):
    x, y = images()
    loss = nn.functional.cross_entropy(convnet(x), y)
    with attacking(convnet, train_mode=True) as inner:
        input_gradient(inner, x, y)
    loss.backward()
    assert convnet[0].weight.grad.isfinite().all()


def test_eval_and_train_mode_attacks_see_different_networks(convnet, images):
    x, y = images()
    convnet[3] = nn.Identity()
    grads = []
    for train_mode in (False, True):
        with attacking(convnet, train_mode=train_mode) as inner:
            grads.append(input_gradient(inner, x, y)[0])
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [False, True], ids=["tensors-from-outside", "from-inside"])
def test_works_where_gradients_are_off(convnet, images, threat, attack, context, inside):
    x, y = images()
    torch.manual_seed(0)
    expected = attack(convnet, x, y, threat)
    torch.manual_seed(0)
    with context():
        if inside:
            x, y = x.clone(), y.clone()
        assert torch.equal(attack(convnet, x, y, threat), expected)


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_the_gradient_mode_is_given_back(convnet, images, threat, attack, outer):
    with outer():
        before = torch.is_grad_enabled()
        attack(convnet, *images(), threat)
        assert torch.is_grad_enabled() == before


def test_works_under_bf16_autocast(convnet, images, threat, attack):
    x, y = images()
    before = snapshot(convnet)
    with torch.autocast("cpu", torch.bfloat16):
        assert convnet(x).dtype == torch.bfloat16
        assert forward_logits(convnet, x).dtype == torch.float32
    convnet.load_state_dict(before["state"])
    with torch.autocast("cpu", torch.bfloat16):
        x_adv = attack(convnet, x, y, threat)
    assert x_adv.dtype == torch.float32
    assert bool((x_adv - x).abs().max() <= torch.tensor(threat.eps))
    assert bool((x_adv != x).any())
    assert_untouched(convnet, before)


class Forbidden(torch.autograd.Function):
    """The identity on a weight; fails if that weight's gradient is asked for."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("a weight gradient was computed")


class Guarded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 36))
        self.last = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        hidden = nn.functional.linear(x.flatten(1), Forbidden.apply(self.first)).tanh()
        return nn.functional.linear(hidden, Forbidden.apply(self.last))


def test_no_weight_gradient_is_computed(images, threat, attack):
    torch.manual_seed(0)
    net = Guarded()
    x, y = images()
    with pytest.raises(AssertionError, match="a weight gradient"):
        nn.functional.cross_entropy(net(x), y).backward()
    assert attack(net, x, y, threat).shape == x.shape


def test_works_on_frozen_weights(convnet, images, threat, attack):
    x, y = images()
    frozen = copy.deepcopy(convnet).requires_grad_(False)
    torch.manual_seed(0)
    expected = attack(convnet, x, y, threat)
    torch.manual_seed(0)
    assert torch.equal(attack(frozen, x, y, threat), expected)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_check_inputs_leaves_the_model_as_found(convnet, images, threat):
    before = snapshot(convnet)
    check_inputs(convnet, *images(), threat)
    assert_untouched(convnet, before)


def test_distributed_model_is_attacked_unwrapped(mlp, digits, threat):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(mlp)
        wrapped.register_forward_pre_hook(lambda m, args: pytest.fail("the wrapper was called"))
        x, y = digits()
        with attacking(wrapped) as inner:
            assert inner is mlp
            input_gradient(inner, x, y)
        assert wrapped.training
    finally:
        distributed.destroy_process_group()
    assert attacks.fgsm(mlp, x, y, threat).shape == x.shape


def test_layers_that_are_kept_in_eval_mode_are_so_in_an_attack_in_train_mode(convnet):
    """Frozen batch norm: attack and update must be of one function."""
    modes = {name: m.training for name, m in convnet.named_modules()}
    assert convnet.training
    assert not convnet[1].training
    with attacking(convnet, train_mode=True) as inner:
        assert {name: m.training for name, m in inner.named_modules()} == modes
    convnet.eval()
    with attacking(convnet, train_mode=True) as inner:
        assert all(m.training for m in inner.modules())
    assert not any(m.training for m in convnet.modules())


@pytest.mark.parametrize("part", ["whole", "inside"])
@pytest.mark.usefixtures("nothing_stays_compiled")
def test_no_weight_gradient_of_a_model_compiled_in_place(mlp, digits, part):
    wanted = []

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp

        def forward(self, x):
            return self.net(x)

    def look(graph, example):
        wanted.append([p.requires_grad for p in mlp.parameters()])
        return graph.forward

    net = Own()
    net.compile(backend=look)
    net = net if part == "whole" else nn.Sequential(net)
    x, y = digits()
    with attacking(net) as inner:
        input_gradient(inner, x, y)
    assert wanted
    assert not any(map(any, wanted))
    assert all(p.requires_grad for p in mlp.parameters())
    with interpreted(net):
        seen = len(wanted)
        net(torch.rand(3, 1, 3, 4, dtype=torch.float64))
    assert len(wanted) == seen


def test_values_that_rounding_took_out_of_the_range(mlp, digits, threat):
    x, y = digits()
    x[0, 0, 0, 0] = 1 + 1e-7
    with pytest.raises(ValueError, match=r"1\.0000001\], expected \[0, 1\]: if this is rounding"):
        check_inputs(mlp, x, y, threat)


def test_hooks_are_taken_off_even_if_one_cannot_be_put_on():
    layers = [nn.Linear(2, 2) for _ in range(2)]

    def hooks():
        yield layers[0].register_forward_hook(lambda *_: None)
        raise RuntimeError("no hooks here")

    with pytest.raises(RuntimeError, match="no hooks here"), hooked(hooks()):
        pass
    assert not layers[0]._forward_hooks
    with hooked(layer.register_forward_hook(lambda *_: None) for layer in layers):
        assert all(layer._forward_hooks for layer in layers)
    assert not any(layer._forward_hooks for layer in layers)
