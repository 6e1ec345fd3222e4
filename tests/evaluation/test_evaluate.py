from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import surestep
from surestep import attacks
from surestep.attacks import auto
from surestep.data import Images
from surestep.errors import UserError
from surestep.evaluation import Evaluation, evaluate, suite, wilson_interval
from surestep.evaluation.result import at_least, at_most
from surestep.evaluation.suite import BUDGETS, Attack, AttackResult

THREAT = surestep.Linf(0.05)
WIDE = surestep.Linf(0.2)
"""Holds the points of the attacks that ``told`` makes; others would not count."""
STEADY = ("fgsm", "i-fgsm-5")
"""Attacks without a random number."""


def numbers(found: Evaluation) -> dict[str, Any]:
    """Return everything but the times."""
    values = found.to_dict()
    values["attacks"] = [{k: v for k, v in a.items() if k != "seconds"} for a in values["attacks"]]
    return {k: v for k, v in values.items() if "seconds" not in k}


class TestWorstCase:
    """Ten images of class 0, known by number; attacks that break the ones they are told to."""

    x = torch.stack([torch.zeros(10), torch.arange(10) / 1000], 1)
    y = torch.zeros(10, dtype=torch.int64)

    @pytest.mark.parametrize("batch_size", [1, 3, 10])
    @pytest.mark.parametrize(
        ("broken", "by_attack", "worst"),
        [
            # Each attack leaves 7 or more of 10, together they leave 4: never the minimum 0.7.
            ({"a": {0, 1, 2}, "b": {3, 4}, "c": {5}}, [0.7, 0.8, 0.9], 0.4),
            ({"a": {0, 1, 2}, "b": {2, 3, 0}, "c": set()}, [0.7, 0.7, 1.0], 0.6),
            ({"a": set(range(5)), "b": set(range(5, 10))}, [0.5, 0.5], 0.0),
            ({"a": set(), "b": set()}, [1.0, 1.0], 1.0),
        ],
    )
    def test_it_is_taken_per_image(self, told, broken, by_attack, worst, batch_size):
        model = told(**broken)
        found = evaluate(model, (self.x, self.y), WIDE, list(broken), batch_size=batch_size)
        assert list(found.robust_accuracy.values()) == by_attack
        assert found.worst_case_accuracy == worst
        assert found.intervals["worst case"] == wilson_interval(round(10 * worst), 10)

    def test_an_image_that_is_wrong_clean_is_broken(self, told):
        # The attack would put image 0 right: adding a class to it gives its label, 1.
        y = self.y.clone()
        y[0] = 1
        found = evaluate(told(a={0}, b={3}), (self.x, y), WIDE, ["a", "b"])
        assert found.clean_accuracy == 0.9
        assert found.robust_accuracy == {"a": 0.9, "b": 0.8}
        assert found.worst_case_accuracy == 0.8

    def test_images_that_are_wrong_only_fill_up_a_batch(self, told, monkeypatch):
        monkeypatch.setattr("surestep.attacks.ascent._BUCKET", 3)
        model = told(a={3})
        y = self.y.clone()
        y[:5] = 1
        seen = []

        def parse(*_: Any) -> Any:
            return Attack(
                lambda _model, x, y: seen.append((len(x), y.sum().item())) or AttackResult(x)
            )

        monkeypatch.setattr("surestep.evaluation.suite.parse", parse)
        evaluate(model, (self.x, y), WIDE, ["a"])
        assert seen == [(6, 1)]  # five that are right, one that is not

    def test_all_wrong(self, told):
        found = evaluate(told(a={1}), (self.x, self.y + 1), WIDE, ["a"])
        assert found.clean_accuracy == found.worst_case_accuracy == found.robust_accuracy["a"] == 0
        assert found.n == 10


class TestAgainstAttacks:
    def test_the_numbers_are_those_of_the_attacks(self, net, images):
        x, y = images
        found = evaluate(net, images, THREAT, STEADY)
        net.eval()
        clean = net(x).argmax(1) == y
        fgsm = net(attacks.fgsm(net, x, y, THREAT)).argmax(1) == y
        ifgsm = net(attacks.i_fgsm(net, x, y, THREAT, 5)).argmax(1) == y
        assert found.clean_accuracy == clean.sum().item() / 90 == 80 / 90
        assert found.robust_accuracy == {
            "fgsm": (clean & fgsm).sum().item() / 90,
            "i-fgsm-5": (clean & ifgsm).sum().item() / 90,
        }
        assert found.worst_case_accuracy == (clean & fgsm & ifgsm).sum().item() / 90
        assert 0 < found.worst_case_accuracy < found.clean_accuracy

    @pytest.mark.parametrize("batch_size", [1, 7, 89, 90, 1000])
    def test_the_batch_size_changes_nothing(self, net, images, batch_size):
        found = evaluate(net, images, THREAT, STEADY, batch_size=batch_size)
        assert numbers(found) == numbers(evaluate(net, images, THREAT, STEADY))

    @pytest.mark.parametrize("n", [1, 33, 90, 1000])
    @pytest.mark.parametrize("kind", ["pair", "DataLoader"])
    def test_n_takes_the_first(self, net, images, n, kind):
        x, y = images
        whole: Any = images if kind == "pair" else DataLoader(TensorDataset(x, y), 16)
        found = evaluate(net, whole, THREAT, STEADY, n=n, batch_size=20)
        assert found.n == min(n, 90)
        assert numbers(found) == numbers(evaluate(net, (x[:n], y[:n]), THREAT, STEADY))

    def test_a_seed_decides_the_random_starts(self, net, images):
        def run(seed: int) -> Tensor:
            points = []
            search = suite.search

            def spy(*args: Any, **kwargs: Any) -> Any:
                found = search(*args, **kwargs)
                points.append(found.x_adv)
                return found

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(suite, "search", spy)
                evaluate(net, images, THREAT, ["pgd-2"], seed=seed)
            return torch.cat(points)

        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))

    def test_eps_zero_is_clean_accuracy(self, net, images):
        found = evaluate(net, images, surestep.Linf(0.0), ("fgsm", "pgd-3x2", "noise-3"))
        assert set(found.robust_accuracy.values()) == {found.clean_accuracy}
        assert found.worst_case_accuracy == found.clean_accuracy

    @pytest.mark.parametrize("threat", [surestep.Linf(0.1), surestep.L2(0.5)])
    def test_more_attack_never_helps(self, net, images, threat):
        few = evaluate(net, images, threat, ["fgsm"])
        more = evaluate(net, images, threat, ["fgsm", "pgd-10-margin"])
        assert more.robust_accuracy["fgsm"] == few.robust_accuracy["fgsm"]
        assert more.worst_case_accuracy <= few.worst_case_accuracy
        assert more.threat == {
            "norm": type(threat).__name__.lower(),
            "eps": threat.eps,
            "bounds": [0.0, 1.0],
        }

    def test_the_default_is_the_standard_budget(self, net, images, monkeypatch):
        for part in auto.PARTS:
            monkeypatch.setitem(auto.PARTS, part, lambda model, x, y, threat: x)
        found = evaluate(net, images, surestep.Linf(0.01), n=2)
        assert tuple(found.robust_accuracy) == BUDGETS["standard"]
        assert [a["scope"] for a in found.attacks] == ["all"] * 4 + ["survivors"]


class TestKinds:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda x, y: (x, y),
            lambda x, y: (x.numpy(), y.numpy()),
            lambda x, y: Images(x, y),
            lambda x, y: TensorDataset(x, y),
            lambda x, y: DataLoader(TensorDataset(x, y), 13),
            lambda x, y: [(a, int(b)) for a, b in zip(x, y, strict=True)],
        ],
        ids=["pair", "numpy", "Images", "Dataset", "DataLoader", "list in a DataLoader"],
    )
    def test_data_of_any_kind(self, net, images, wrap):
        wrapped = wrap(*images)
        wrapped = DataLoader(wrapped, 13) if isinstance(wrapped, list) else wrapped
        found = evaluate(net, wrapped, THREAT, STEADY)
        assert numbers(found) == numbers(evaluate(net, images, THREAT, STEADY))

    def test_uint8_images(self, net, images):
        x = (images[0] * 255).round().byte()
        found = evaluate(net, Images(x, images[1]), THREAT, STEADY)
        expected = evaluate(net, (x.float() / 255, images[1]), THREAT, STEADY)
        assert numbers(found) == numbers(expected)

    @pytest.mark.parametrize(
        "empty",
        [
            (torch.rand(0, 1, 8, 8), torch.zeros(0).long()),
            DataLoader([], 3),
            TensorDataset(torch.rand(0, 1, 8, 8), torch.zeros(0).long()),
        ],
        ids=["pair", "DataLoader", "Dataset"],
    )
    def test_no_data(self, net, empty):
        for names in (STEADY, ["transfer"]):
            with pytest.raises(UserError, match=r"empty|no image"):
                evaluate(net, empty, THREAT, names)

    @pytest.mark.parametrize("kind", ["pair", "DataLoader"])
    def test_none_of_the_data(self, net, images, kind):
        source = images if kind == "pair" else DataLoader(TensorDataset(*images), 4)
        with pytest.raises(UserError, match=r"1 or more|no image"):
            evaluate(net, source, THREAT, STEADY, n=0)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda x, y: (x * 255, y), "divide x by 255"),
            (lambda x, y: (x, y + 3), "labels from .* but the model has 3 classes"),
            (lambda x, y: (x[:, :, :5], y), "the model fails on one batch of shape"),
            (lambda x, y: (x, y[:5]), "90 images but y has 5 labels"),
            (lambda x, y: DataLoader(TensorDataset(x * 2 - 1, y), 5), r"expected \[0, 1\]"),
        ],
    )
    def test_data_that_cannot_be_judged(self, net, images, change, said):
        with pytest.raises(UserError, match=said) as caught:
            evaluate(net, change(*images), THREAT, STEADY)
        assert "\n" not in str(caught.value)
        assert all(m.training for m in net.modules())

    @pytest.mark.parametrize("none", [[], {}])
    def test_no_attack(self, net, images, none):
        with pytest.raises(UserError, match="no attack given"):
            evaluate(net, images, THREAT, none)

    def test_an_unknown_attack_is_refused_before_any_work(self, net, images):
        net.register_forward_hook(lambda *_: pytest.fail("the model was run"))
        with pytest.raises(UserError, match="unknown attack 'pgd'"):
            evaluate(net, images, THREAT, ["fgsm", "pgd"])


class TestSideEffects:
    SUITE = ("fgsm", "r-fgsm", "pgd-3x2", "noise-2")

    @pytest.mark.parametrize("kind", ["pair", "shuffled DataLoader"])
    def test_the_random_state_is_left_alone(self, net, images, kind):
        source: Any = images
        if kind != "pair":
            source = DataLoader(TensorDataset(*images), 13, shuffle=True)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        evaluate(net, source, THREAT, self.SUITE)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002

    @pytest.mark.parametrize("training", [True, False, None])
    @pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
    def test_the_model_is_left_as_it_was(self, net, images, training, precision):
        net.train(training is not False)
        if training is None:
            net[1].eval()  # frozen statistics amid a model in train mode
            net[0].weight.requires_grad_(False)
        modes = [m.training for m in net.modules()]
        flags = [p.requires_grad for p in net.parameters()]
        state = {k: v.clone() for k, v in net.state_dict().items()}
        evaluate(net, images, THREAT, self.SUITE, precision=precision)
        assert [m.training for m in net.modules()] == modes
        assert [p.requires_grad for p in net.parameters()] == flags
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())

    def test_images_are_left_as_they_were(self, net, images):
        before = [t.clone() for t in images]
        evaluate(net, images, THREAT, self.SUITE)
        assert all(torch.equal(a, b) for a, b in zip(before, images, strict=True))

    def test_eval_mode_is_what_is_judged(self, net, images):
        found = evaluate(net.train(), images, THREAT, ["fgsm"])
        assert numbers(found) == numbers(evaluate(net.eval(), images, THREAT, ["fgsm"]))


class TestPrecision:
    def test_bf16_points_are_judged_in_float32(self, net, images):
        seen = []
        net[5].register_forward_hook(
            lambda _module, _args, logits: seen.append((logits.dtype, logits.requires_grad))
        )
        evaluate(net, images, THREAT, ["fgsm"], precision=torch.bfloat16, doubt=False)
        judged = [dtype for dtype, grad in seen if not grad]
        crafted = [dtype for dtype, grad in seen if grad]
        assert crafted == [torch.bfloat16]
        assert torch.float32 in judged
        assert judged[-1] == torch.float32

    def test_both_precisions_find_about_the_same(self, net, images):
        full, half = (
            evaluate(net, images, THREAT, ["pgd-10"], precision=p).worst_case_accuracy
            for p in (torch.float32, torch.bfloat16)
        )
        assert full == pytest.approx(half, abs=0.05)


class TestIntervals:
    @pytest.mark.parametrize(
        ("right", "n", "expected"),
        [
            (0, 10, (0.0, 0.2775)),
            (5, 10, (0.2366, 0.7634)),
            (10, 10, (0.7225, 1.0)),
            # The examples of Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
            (81, 263, (0.2553, 0.3662)),
            (15, 148, (0.0624, 0.1605)),
            (0, 20, (0.0, 0.1611)),
            (1, 29, (0.0061, 0.1718)),
            # Nothing seen, nothing known.
            (0, 0, (0.0, 1.0)),
        ],
    )
    def test_known_values(self, right, n, expected):
        assert wilson_interval(right, n) == pytest.approx(expected, abs=5e-5)
        assert (at_least(right, n), at_most(right, n)) == wilson_interval(right, n)

    @pytest.mark.parametrize("n", [1, 2, 10, 1000, 10_000])
    def test_it_is_symmetric_and_holds_the_share(self, n):
        for right in {0, 1, n // 3, n // 2, n - 1, n}:
            low, high = wilson_interval(right, n)
            assert 0 <= low <= right / n + 1e-12
            assert right / n - 1e-12 <= high <= 1
            assert wilson_interval(n - right, n) == pytest.approx((1 - high, 1 - low))

    def test_every_accuracy_has_one(self, net, images):
        found = evaluate(net, images, THREAT, STEADY)
        shares = {
            "clean": found.clean_accuracy,
            **found.robust_accuracy,
            "worst case": found.worst_case_accuracy,
        }
        assert found.intervals == {
            name: wilson_interval(round(share * 90), 90) for name, share in shares.items()
        }


@pytest.mark.parametrize(
    "batch",
    [lambda x, y: (x, y, y), lambda x, y: {"x": x, "y": y}, lambda x, y: (x, y.tolist())],
    ids=["three", "dict", "list"],
)
def test_a_loader_of_something_else(net, images, batch):
    def collate(pairs):
        return batch(*(torch.stack(part) for part in zip(*pairs, strict=True)))

    loader = DataLoader(TensorDataset(*images), 10, collate_fn=collate)
    with pytest.raises(surestep.UserError, match=r"expected a pair \(x, y\) of tensors"):
        evaluate(net, loader, surestep.Linf(0.1), STEADY)


class TestReport:
    def test_to_dict(self, net, images):
        found = evaluate(net, images, surestep.Linf(8 / 255), STEADY)
        plain = found.to_dict()
        assert json.loads(json.dumps(plain)) == plain
        assert plain["clean_accuracy"] == found.clean_accuracy
        assert plain["robust_accuracy"] == found.robust_accuracy
        assert plain["worst_case_accuracy"] == found.worst_case_accuracy
        assert plain["n"] == 90
        assert 0 < sum(plain["attack_seconds"].values()) <= plain["seconds"]
        assert plain["threat"] == {"norm": "linf", "eps": 8 / 255, "bounds": [0.0, 1.0]}

    @pytest.mark.parametrize("kind", ["pair", "Dataset", "DataLoader"])
    def test_progress(self, net, images, kind):
        calls: list[tuple[int, int, float]] = []
        source: Any = images if kind == "pair" else TensorDataset(*images)
        source = DataLoader(source, 40) if kind == "DataLoader" else source
        found = evaluate(
            net, source, THREAT, STEADY, batch_size=40, progress=lambda *a: calls.append(a)
        )
        done = [done for done, _, _ in calls]
        # Also while a batch is attacked: it may take an hour.
        assert done == sorted(done)
        assert {0, 40, 80, 90} < set(done)
        assert {total for _, total, _ in calls} == {0 if kind == "DataLoader" else 90}
        assert calls[-1][2] == found.worst_case_accuracy


def test_images_without_a_label_are_refused_before_the_work(net, images):
    x, y = images
    y = y.clone()
    y[-1] = -1
    net.register_forward_pre_hook(lambda *_: pytest.fail("judged"))
    with pytest.raises(UserError, match="has images without a label"):
        evaluate(net, (x, y), THREAT, STEADY, batch_size=10)
