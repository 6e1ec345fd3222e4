"""Steps under a memory limit: the same step, less kept; and what is said when nothing helps."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from families import merged
from torch import Tensor, nn

from surestep import UserError, methods, models
from surestep.attacks.gradients import input_gradient
from surestep.attacks.losses import weighted_log_odds
from surestep.threat import Linf
from surestep.training import Engine, preparing, validating
from surestep.training.memory import (
    Frugal,
    fit_into,
    kept_bytes,
    repeated_blocks,
    uses_batch_statistics,
)

PLAIN = Engine()
SHAPE = torch.Size([3, 16, 16])


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return models.create("preactresnet10-slim", 10, image_size=16).double().train()


def plain() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh()]
    layers += [nn.Flatten(), nn.Linear(1152, 10)]
    return nn.Sequential(*layers).double().train()


NETS = {"blocks": resnet, "chunks": plain}


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.arange(n) % 10


REFUSED = ("gradalign", "sads")


@pytest.mark.parametrize("slug", REFUSED)
def test_what_cannot_be_computed_twice_is_refused(tiny, slug):
    said = rf"{slug} .* cannot be recomputed: leave max_memory \(4\) out"
    with pytest.raises(UserError, match=said):
        tiny.train(slug, max_memory=4.0)


OF_EACH_KIND = [
    *("standard", "fgsm", "n-fgsm", "multigrad", "pgd", "fat", "trades", "nuat", "uat", "pap"),
    *("sat-r1", "sat-r2", "sat-r3", "free", "fgsm-mep", "converge-smooth", "elle-a"),
]
"""Attacks in either mode, on parts of a batch, in several passes; losses of one view or more."""


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("slug", OF_EACH_KIND)
def test_a_step_is_the_same(slug, net):
    whole = NETS[net]()
    frugal = copy.deepcopy(whole)
    x, y = batch()
    found = []
    for model, run in ((whole, whole), (frugal, Frugal(frugal, 2))):
        method = methods.get(slug)(Linf(0.1), **merged("SMALL").get(slug, {}))
        torch.manual_seed(5)
        result = method(run, x, y, torch.arange(len(x)))
        result.loss.backward()
        found.append((result, [p.grad for p in model.parameters()], list(model.buffers())))
    (one, grads, buffers), (other, their_grads, their_buffers) = found
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(one.loss, other.loss, **exact)
    torch.testing.assert_close(one.x_adv, other.x_adv, **exact)
    torch.testing.assert_close(grads, their_grads, **exact)
    # Batch norm has counted the batch once.
    torch.testing.assert_close(buffers, their_buffers, **exact)


@pytest.mark.parametrize("net", NETS)
def test_an_attack_computes_no_chunk_again(net):
    """A step takes two passes, one forward and one backward."""
    model, sizes = NETS[net]().eval(), []
    x, y = batch()
    expected = input_gradient(model, x, y)
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    torch.testing.assert_close(input_gradient(Frugal(model, 2), x, y), expected)
    assert sizes == [2, 2, 2]
    # But three where an image's value depends on the other images.
    input_gradient(Frugal(model, 2), x, y, weighted_log_odds)
    assert sizes == [2] * 9


@pytest.mark.parametrize("net", NETS)
def test_less_is_kept(net):
    model = NETS[net]()
    x, _ = batch(12)
    frugal = Frugal(model, 2)
    assert kept_bytes(frugal, x, PLAIN) < 0.6 * kept_bytes(model, x, PLAIN)


def test_kept_bytes_are_those_of_the_activations():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3))
    # Each linear layer keeps its input (the second's is what tanh keeps), and not its weight.
    assert kept_bytes(net, torch.rand(4, 3, 4), PLAIN) == 4 * (4 * 12 + 4 * 5)


def test_casts_of_the_weights_are_kept_once():
    """Under autocast they are kept for backward too, whatever the number of images."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 400), nn.Tanh(), nn.Linear(400, 400))
    bf16, shape = Engine(torch.bfloat16), torch.Size([3, 4, 4])
    weights = sum(p.numel() * 4 for p in net.parameters())
    limit = (4 * weights + 64 * 3000) / 2**30 + 64 * 8 * 48 * 4 / 2**30
    assert fit_into(net.train(), methods.FGSM(Linf(0.1)), bf16, shape, 64, limit) is net


def test_looking_at_the_memory_changes_nothing():
    model = resnet()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fit_into(model.float(), methods.SATR2(Linf(0.1)), PLAIN, SHAPE, 64, 0.03)
    torch.testing.assert_close(model.double().state_dict(), before, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


class TestFitInto:
    def into(self, gibibytes: float, net: str = "blocks", images: int = 64) -> nn.Module:
        model = NETS[net]().float()
        return fit_into(model, methods.SATR2(Linf(0.1)), PLAIN, SHAPE, images, gibibytes)

    def test_a_model_that_fits_is_left_alone(self):
        assert not isinstance(self.into(4.0), Frugal)

    def test_batch_norm_goes_by_blocks(self):
        frugal = self.into(0.03)
        assert isinstance(frugal, Frugal)
        assert len(frugal.blocks) == 4
        assert frugal.images >= 1

    def test_without_it_images_go_in_chunks(self):
        frugal = self.into(0.028, net="chunks", images=512)
        assert isinstance(frugal, Frugal)
        assert frugal.blocks == []
        limit, weights = 0.028 * 2**30, sum(4 * p.numel() for p in frugal.parameters())
        fixed = 4 * weights + 8 * (2 * 512) * 4 * SHAPE.numel()  # SAT-R2 has two views
        chunk = torch.rand(frugal.images, *SHAPE)
        kept = kept_bytes(frugal.module, chunk, PLAIN) - chunk.nbytes  # which is fixed
        assert 0.98 * limit < fixed + 1.4 * kept <= limit

    @pytest.mark.parametrize("net", NETS)
    def test_too_little_is_said(self, net):
        with pytest.raises(
            UserError, match=r"max_memory 1e-06 GiB is too little.*batch_size \(64"
        ) as e:
            self.into(1e-6, net)
        assert "\n" not in str(e.value)
        # What it asks for is enough.
        (asked,) = re.findall(r"needs about (\S+) GiB", str(e.value))
        assert isinstance(self.into(float(asked), net), Frugal)

    def test_batch_norm_without_blocks_has_no_way(self):
        net = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(6272, 3)
        )
        with pytest.raises(UserError, match="too little"):
            fit_into(net.train(), methods.FGSM(Linf(0.1)), PLAIN, SHAPE, 256, 0.01)


def test_repeated_blocks_of_the_registered_models():
    counts = {"resnet18": 8, "resnet34": 16, "preactresnet18": 8, "wrn-28-10": 12, "lenet+": 0}
    for name, count in counts.items():
        with torch.device("meta"):
            model = models.create(name, 10)
        assert len(repeated_blocks(model)) == count, name


def test_batch_norm_without_running_statistics_uses_the_batchs_in_eval_mode_too():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    assert uses_batch_statistics(net)
    assert not uses_batch_statistics(nn.Sequential(nn.BatchNorm1d(4)).eval())


def test_a_forward_that_was_set_on_a_block_is_there_afterwards():
    net = resnet()
    block = repeated_blocks(net)[0]
    own = type(block).forward.__get__(block)
    block.forward = own
    Frugal(net, 2)(batch()[0])
    assert block.__dict__["forward"] is own
    assert all("forward" not in b.__dict__ for b in repeated_blocks(net)[1:])


class TestTraining:
    def test_weights_are_those_of_the_unlimited_run(self, tiny, tmp_path, monkeypatch):
        def frugal(model, *_):
            return Frugal(model, 3)

        # In eval mode the net's batch norm lets the attack go in chunks.
        free = tiny.train("pgd", out=tmp_path / "free", ema=0.9)
        monkeypatch.setattr(preparing, "fit_into", frugal)
        tight = tiny.train("pgd", out=tmp_path / "tight", ema=0.9, max_memory=1.0)
        for ours, theirs in zip(free.model.parameters(), tight.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert tiny.rows(tmp_path / "tight")[-1].keys() == tiny.rows(tmp_path / "free")[-1].keys()

    def test_a_limit_a_little_above_what_a_refusal_asks_for(self, tiny, monkeypatch):
        """Chosen by the limit alone, training goes in chunks and ends as without one."""
        found, sizes = [], []

        def noting(*args):
            found.append(fit_into(*args))
            return found[-1]

        def train(**limit):
            net = tiny.net(norm=False)
            sizes.clear()
            net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
            return tiny.train("sat-r2", model=net, **limit)

        monkeypatch.setattr(preparing, "fit_into", noting)
        with pytest.raises(UserError) as refused:
            train(max_memory=1e-7)
        (asked,) = re.findall(r"needs about (\S+) GiB", str(refused.value))
        free, tight = train(), train(max_memory=1.05 * float(asked))
        (frugal,) = found
        assert isinstance(frugal, Frugal)
        assert max(sizes) == frugal.images < 20  # which SAT-R2's two views of ten are
        initial = tiny.net(norm=False).parameters()
        pairs = zip(free.model.parameters(), tight.model.parameters(), initial, strict=True)
        for ours, theirs, before in pairs:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert (ours - before).abs().max() > 1e-3, "it must have learnt something"

    @pytest.mark.parametrize(
        ("limit", "parts", "room", "expected"),
        [
            (1.0, 3, 2**30, 3),
            (1.0, None, 2**30, 20),  # all fit: as many as SAT-R2's update, twice the batch of ten
            (None, None, 60, 60),
            (None, None, 5, 20),
        ],
    )
    def test_how_many_images_validation_attacks_at_a_time(
        self, tiny, monkeypatch, limit, parts, room, expected
    ):
        """With a limit no more than fit, in parts; without one as many as find room."""
        sizes, evaluate = [], validating.evaluate

        def noting(*args, batch_size, **options):
            sizes.append(batch_size)
            return evaluate(*args, batch_size=batch_size, **options)

        monkeypatch.setattr(validating, "evaluate", noting)
        monkeypatch.setattr(
            preparing, "fit_into", lambda model, *_: Frugal(model, parts) if parts else model
        )
        net, x = tiny.net().eval(), torch.zeros(2, 1, 8, 8)
        each = kept_bytes(net, x, PLAIN) - kept_bytes(net, x[:1], PLAIN)
        monkeypatch.setattr(preparing, "ROOM_TO_JUDGE", room * each)
        tiny.train("sat-r2", epochs=1, max_memory=limit)
        assert sizes == [expected]

    def test_what_a_method_remembers_is_said_where_memory_is_short(self, tiny, monkeypatch):
        def full(*_):
            raise MemoryError

        monkeypatch.setattr(methods.get("fgsm-mep"), "craft", full)
        monkeypatch.setattr(methods.get("iaat"), "craft", full)
        with pytest.raises(UserError) as plain:  # one number an image is nothing
            tiny.train("iaat")
        assert "keeps a perturbation" not in str(plain.value)
        said = r"keeps a perturbation for each of 58 images, .* GiB or more"
        with pytest.raises(UserError, match=said):
            tiny.train("fgsm-mep")

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ..."),
            MemoryError(),
        ],
    )
    @pytest.mark.parametrize(
        ("settings", "said"),
        [({}, "set max_memory, in GiB"), ({"max_memory": 4.0}, r"max_memory \(4\)")],
    )
    def test_out_of_memory_is_one_clear_line(self, tiny, monkeypatch, error, settings, said):
        def full(*_):
            raise error

        monkeypatch.setattr(methods.SATR2, "craft", full)
        expected = rf"out of memory in step 1, of 10 images: lower batch_size \(10\), or {said}"
        with pytest.raises(UserError, match=expected):
            tiny.train("sat-r2", **settings)

    @pytest.mark.parametrize("where", ["the trial of engines", "an attack"])
    def test_so_it_is_before_and_after_the_steps(self, tiny, monkeypatch, where):
        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(preparing, "MIN_STEPS", 1)
        if where == "an attack":
            monkeypatch.setattr("surestep.evaluation.suite.search", full)
        else:
            monkeypatch.setattr(preparing, "pick_engine", full)
        said = rf"out of memory in {where}.*lower batch_size \(10\), or set max_memory"
        with pytest.raises(UserError, match=said):
            tiny.train("fgsm", engine="auto")

    def test_no_engine_is_tried_where_memory_is_short(self, tiny, monkeypatch):
        monkeypatch.setattr(preparing, "MIN_STEPS", 1)
        monkeypatch.setattr(preparing, "pick_engine", lambda *_: pytest.fail("tried"))
        tiny.train("fgsm", engine="auto", max_memory=4.0, epochs=0.4)

    def test_other_errors_are_not_taken_for_it(self, tiny, monkeypatch):
        def broken(*_):
            raise RuntimeError("shapes differ")

        monkeypatch.setattr(methods.SATR2, "craft", broken)
        with pytest.raises(RuntimeError, match="shapes differ"):
            tiny.train("sat-r2")

    def test_the_limit_is_taken_for_data_of_any_kind(self, tiny):
        pairs = torch.utils.data.TensorDataset(*tiny.data())
        with pytest.raises(UserError, match="max_memory"):
            tiny.train("sat-r2", data=pairs, validation=tiny.data(), max_memory=1e-7)
        tiny.train("sat-r2", data=pairs, validation=tiny.data(), max_memory=1.0)
