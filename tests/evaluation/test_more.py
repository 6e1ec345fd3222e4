"""What an evaluation tells beside its accuracies, and whose models it judges."""

from __future__ import annotations

import copy
import warnings
from collections import namedtuple

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import surestep
from surestep import attacks
from surestep.attacks import auto
from surestep.data import Images
from surestep.errors import UserError
from surestep.evaluation import Adapted, evaluate, suite
from surestep.evaluation.batches import batches_of
from surestep.evaluation.suite import Attack, AttackResult
from surestep.models import Normalize

THREAT = surestep.Linf(0.05)


class Wrapped(nn.Module):
    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x):
        return self.wrap(self.net, x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net, x: (net(x), x),
        lambda net, x: [net(x)],
        lambda net, x: {"loss": None, "logits": net(x)},
        lambda net, x: type("Output", (), {})(),
        lambda net, x: namedtuple("Named", "logits aux")(net(x), None),
    ],
    ids=["tuple", "list", "dict", "object", "named tuple"],
)
def test_logits_are_found_in_what_a_model_returns(net, images, wrap):
    def give(net, x):
        returned = wrap(net, x)
        if type(returned).__name__ == "Output":
            returned.logits = net(x)
        return returned

    found = evaluate(Wrapped(net, give), images, THREAT, ["fgsm", "pgd-3"])
    plain = evaluate(net, images, THREAT, ["fgsm", "pgd-3"])
    assert found.robust_accuracy == plain.robust_accuracy


def test_half_precision(net, images):
    found = evaluate(net.bfloat16(), images, THREAT, ["fgsm"])
    assert found.clean_accuracy > 0.7
    assert found.worst_case_accuracy < found.clean_accuracy


def test_declared_preprocessing_is_normalisation_inside(net, images):
    norm = Normalize([0.3], [0.2])
    inside = nn.Sequential(norm, net)
    x, _ = images
    y = inside.eval()(x).argmax(1).detach()
    a = evaluate(net, (x, y), THREAT, ["fgsm", "pgd-3"], preprocess=norm)
    b = evaluate(inside, (x, y), THREAT, ["fgsm", "pgd-3"])
    assert a.robust_accuracy == b.robust_accuracy
    assert a.worst_case_accuracy < a.clean_accuracy == 1


def test_nan_is_wrong(net, images):
    """A model that fails on some images does not get them right, clean or attacked."""
    x, y = images
    bad = torch.arange(90) < 9  # image 0 is wrong already

    def spoil(net, z):
        out = net(z).clone()
        for row, image in enumerate(z):
            if (image.detach() - x[bad]).abs().amax((1, 2, 3)).min() < 0.051:
                out[row] = float("nan")
        return out

    found = evaluate(Wrapped(net, spoil), (x, y), THREAT, ["noise-1"], n=30)
    plain = evaluate(net, (x, y), THREAT, ["noise-1"], n=30)
    assert found.clean_accuracy == pytest.approx(plain.clean_accuracy - 8 / 30)
    assert found.worst_case_accuracy <= plain.worst_case_accuracy


def test_a_model_that_raises_later(net, images):
    """The first image passes; a later batch does not."""

    def fail(net, x):
        if len(x) > 5:
            raise KeyError("no such feature")
        return net(x)

    with pytest.raises(UserError, match=r"fails on one batch of shape .* KeyError") as caught:
        evaluate(Wrapped(net, fail), images, THREAT, ["fgsm"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", [True, False])
def test_what_is_adapted_has_the_models_mode(net, mode):
    assert Adapted(net.train(mode)).training is mode


def test_transfer_without_sources_trains_one(net, images):
    """It breaks a model that hides its gradient, twice alike, and draws no number from others."""

    class Hidden(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return net(x)

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    wide = surestep.Linf(0.3)
    found = [evaluate(Hidden(), images, wide, ["transfer"], doubt=False) for _ in range(2)]
    assert torch.random.get_rng_state().equal(state)
    assert found[0].robust_accuracy == found[1].robust_accuracy
    assert found[0].clean_accuracy > 0.5
    assert found[0].robust_accuracy["transfer"] < 0.5 * found[0].clean_accuracy


def test_given_sources_take_its_place(net, images, monkeypatch):
    monkeypatch.setattr(
        "surestep.evaluation._evaluate.substitute", lambda *_: pytest.fail("trained one")
    )
    evaluate(net, images, THREAT, ["transfer"], sources=[net])


def test_a_curve_wants_attacks_by_name(net, images):
    mine = {"mine": Attack(lambda m, x, y: AttackResult(x))}
    with pytest.raises(UserError, match="attacks by name"):
        evaluate(net, images, THREAT, mine, eps=[0.1])


def test_per_class_and_curve(net, images):
    found = evaluate(net, images, THREAT, ["i-fgsm-5"], eps=[0.0, 0.02, 0.05])
    assert [row["label"] for row in found.per_class] == images[1].unique().tolist()
    assert sum(row["n"] for row in found.per_class) == 90
    for name in ("clean_accuracy", "worst_case_accuracy"):
        mean = sum(row["n"] * row[name] for row in found.per_class) / 90
        assert mean == pytest.approx(getattr(found, name))
    at = [row["worst_case_accuracy"] for row in found.curve]
    assert at[0] == found.clean_accuracy
    assert at[2] == found.worst_case_accuracy
    assert at == sorted(at, reverse=True)


def test_by_step(net, images):
    """The curve of success by step is that of attacks with fewer steps of the same size."""
    (row,) = evaluate(net, images, THREAT, ["i-fgsm-5"]).attacks
    x, y = images
    net.eval()
    curve = []
    for steps in range(6):
        x_adv = x
        if steps:
            x_adv = attacks.pgd(net, x, y, THREAT, steps, 0.01, start_radius=0.0)
        curve.append(((net(x).argmax(1) == y) & (net(x_adv).argmax(1) == y)).sum().item() / 90)
    assert row["by_step"] == curve
    assert len(set(curve)) > 2


def test_survivors_only(told):
    """AutoAttack's place: after all others, on what they left; the cheap ones first."""
    seen: dict[str, list[float]] = {}

    def attack(name: str, hit: set[int], **more) -> Attack:
        def run(model, x, y):
            numbers = (x[:, 1] * 1000).round().int().tolist()
            seen[name] = [*seen.get(name, []), *sorted(numbers)]
            order.append(name)
            x = x.clone()
            x[[n in hit for n in numbers], 0] += 0.1
            return AttackResult(x)

        return Attack(run, **more)

    order: list[str] = []
    suite = {
        "last": attack("last", {1, 5}, passes=1, survivors_only=True),
        "dear": attack("dear", {2}, passes=9),
        "cheap": attack("cheap", {0, 1}, passes=2),
    }
    x = torch.stack([torch.zeros(40), torch.arange(40) / 1000], 1)
    y = torch.zeros(40, dtype=torch.int64)
    found = evaluate(told(), (x, y), surestep.Linf(0.2), suite, batch_size=40)
    assert order == ["cheap", "dear", "last"]
    assert list(found.robust_accuracy) == ["last", "dear", "cheap"]
    # 37 survivors: rounded up to 40 for the backend's sake, 1 counts as broken before.
    assert found.robust_accuracy == {"last": 36 / 40, "dear": 39 / 40, "cheap": 38 / 40}
    assert found.worst_case_accuracy == 36 / 40


def test_a_point_outside_the_threat_model_does_not_count(told):
    """Nor does one that is NaN: it would break any model."""

    def run(to):
        def attack(model, x, y):
            x = x.clone()
            x[:, 0] += to
            return AttackResult(x)

        x = torch.stack([torch.zeros(9), torch.arange(9) / 1000], 1)
        y = torch.zeros(9, dtype=torch.int64)
        return evaluate(told(), (x, y), surestep.Linf(0.02), {"a": Attack(attack)})

    assert run(0.1).worst_case_accuracy == 1
    assert run(float("nan")).worst_case_accuracy == 1


def test_a_threat_model_in_another_range(net, images):
    """The same network, told pixels in [-1, 1], gives the same numbers at twice the radius."""
    x, y = images

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, z):
            return self.net((z + 1) / 2)

    wide = surestep.Linf(0.1, bounds=(-1.0, 1.0))
    found = evaluate(Centred(), (2 * x - 1, y), wide, ["fgsm", "pgd-3"])
    plain = evaluate(net, images, THREAT, ["fgsm", "pgd-3"])
    assert found.clean_accuracy == plain.clean_accuracy
    assert found.robust_accuracy["fgsm"] == pytest.approx(plain.robust_accuracy["fgsm"], abs=0.03)
    for data in ((x.mul(255).byte(), y), (x.numpy(), y.numpy()), surestep.data.as_images((x, y))):
        with pytest.raises(UserError, match=r"data range \(-1\.0, 1\.0\) give float32 tensors"):
            evaluate(net, data, wide, ["fgsm"])
    with pytest.raises(UserError, match=r"x has values in"):
        evaluate(net, (4 * x - 2, y), wide, ["fgsm"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loader_of_halves_leaves_room_in_the_ball(net, images, dtype):
    """In half an image's digits nearly all of a ball in l2 is lost to rounding."""
    x, y = images
    seen = []

    def noting(model, x, y):
        seen.append(x.dtype)
        return x

    loader = DataLoader(TensorDataset(x.to(dtype), y), 20)
    evaluate(net, loader, surestep.L2(0.5), {"mine": Attack(noting)}, n=20)
    assert seen == [torch.float32]


def test_a_loader_of_float64(net, images):
    x, y = images
    loader = DataLoader(TensorDataset(x.double(), y), 20)
    found = evaluate(net, loader, THREAT, ["fgsm", "transfer", "fab-t"], n=20)
    plain = evaluate(net, (x, y), THREAT, ["fgsm"], n=20)
    assert found.robust_accuracy["fgsm"] == plain.robust_accuracy["fgsm"]


def test_every_budget_takes_two_classes(images, monkeypatch):
    monkeypatch.setitem(
        suite.BUDGETS, "thorough", ("fgsm", "pgd-2-dlr", "pgd-2-margin", "autoattack")
    )
    x, y = images
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    found = evaluate(net, (x, y % 2), THREAT, budget="thorough", n=10)
    assert list(found.robust_accuracy) == ["fgsm", "pgd-2-dlr", "pgd-2-margin", "autoattack"]
    assert found.robust_accuracy["pgd-2-dlr"] <= found.robust_accuracy["fgsm"]


def test_square_in_l2_wants_images(images):
    x, y = images
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(UserError, match=r"Square.* 5 x 5 pixels or more in the l2 norm.*\(64,\)"):
        evaluate(net, (x.flatten(1), y), surestep.L2(0.5), ["square-5"])
    evaluate(net, (x.flatten(1), y), surestep.Linf(0.1), ["square-5"])


def test_memory_that_is_full_is_one_line(net, images):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"out of memory in an attack: lower batch_size \(40\)"):
        evaluate(net, images, THREAT, {"mine": Attack(full)}, batch_size=40)


def test_an_evaluation_tells_autoattacks_parts_apart_and_resumes_within_a_batch(
    monkeypatch, tmp_path
):
    """The first and the third break an image each; the fourth is killed at first."""
    ran: list[tuple[str, int]] = []

    def part(name, breaks):
        def run(model, x, y, threat):
            ran.append((name, len(x)))
            if name == "square" and len(ran) == 4:
                raise KeyboardInterrupt
            found = x.clone()
            found[:breaks] = 0.8
            return found

        return run

    class Half(nn.Module):
        def forward(self, x):
            return torch.cat([0.5 - x, x - 0.5], 1)

    for name, breaks in (("apgd-ce", 1), ("apgd-t", 0), ("fab-t", 1), ("square", 0)):
        monkeypatch.setitem(auto.PARTS, name, part(name, breaks))
    monkeypatch.setattr("surestep.evaluation.judge.round_up", lambda count, _: count)
    data = torch.full((4, 1), 0.2), torch.zeros(4, dtype=torch.int64)
    said: list[str] = []
    options = {"state": tmp_path / "state", "tell": said.append}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Half(), data, surestep.Linf(0.7), ["autoattack"], **options)
    found = evaluate(Half(), data, surestep.Linf(0.7), ["autoattack"], **options)
    assert ran == [("apgd-ce", 4), ("apgd-t", 3), ("fab-t", 3), ("square", 2), ("square", 2)]
    assert said[0] == "autoattack: apgd-ce on images 1 to 4 of 4; worst case 100.0% so far"
    assert found.worst_case_accuracy == found.robust_accuracy["autoattack"] == 0.5
    (row,) = found.attacks
    assert row["by_part"] == {"apgd-ce": 0.75, "apgd-t": 0.75, "fab-t": 0.5, "square": 0.5}
    again = evaluate(Half(), data, surestep.Linf(0.7), ["autoattack"], **options)
    assert len(ran) == 5
    assert again.attacks == found.attacks
    assert found.right["autoattack"].tolist() == [False, False, True, True]


def test_preprocessing_reaches_the_curve_and_the_substitute(net, images):
    norm = Normalize([0.3], [0.2])
    inside = nn.Sequential(norm, net)
    x, _ = images
    data = (x, inside.eval()(x).argmax(1).detach())
    for attacks_, eps in ((["fgsm"], [0.02]), (["transfer"], [])):
        a = evaluate(net, data, THREAT, attacks_, eps=eps, preprocess=norm)
        b = evaluate(inside, data, THREAT, attacks_, eps=eps)
        assert (a.curve, a.robust_accuracy) == (b.curve, b.robust_accuracy)
        assert a.clean_accuracy == 1


def test_full_memory_in_a_forward_pass_is_no_fault_of_the_model(net, images):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    net.register_forward_pre_hook(lambda _, args: full() if len(args[0]) > 1 else None)
    with pytest.raises(UserError, match=r"out of memory in an attack: lower batch_size \(40\)"):
        evaluate(net, images, THREAT, ["fgsm"], batch_size=40)


@pytest.mark.usefixtures("small_budget")
class TestSortedByClass:
    @pytest.fixture
    def ordered(self):
        y = torch.arange(90) // 30
        return (y / 3 + 0.1)[:, None].repeat(1, 4), y

    def test_one_class_alone_is_told(self, ordered):
        net, loader = nn.Linear(4, 3), DataLoader(TensorDataset(*ordered), 10)
        said = "25 images are all of class 0: if the data are sorted by class, shuffle them, or jud"
        with pytest.warns(UserWarning, match=said) as told:
            surestep.evaluate(net, loader, surestep.Linf(0.1), ["fgsm"], n=25)
        assert told[0].filename == __file__
        with pytest.warns(UserWarning, match=said) as told:
            surestep.audit(net, loader, surestep.Linf(0.1), budget="quick", n=25)
        assert told[0].filename == __file__

    @pytest.mark.parametrize("n", [None, 31, 10])
    def test_nothing_is_told_of_several_or_of_few(self, ordered, n):
        loader = DataLoader(TensorDataset(*ordered), 10)
        surestep.evaluate(nn.Linear(4, 3), loader, surestep.Linf(0.1), ["fgsm"], n=n)

    @pytest.mark.parametrize("kind", ["tensors", "Dataset"])
    def test_a_part_is_drawn_from_all(self, ordered, kind):
        data = ordered if kind == "tensors" else TensorDataset(*ordered)
        found = surestep.evaluate(nn.Linear(4, 3), data, surestep.Linf(0.1), ["fgsm"], n=27)
        assert found.n == 27
        assert [row["label"] for row in found.per_class] == [0, 1, 2]
        again = surestep.evaluate(nn.Linear(4, 3), data, surestep.Linf(0.1), ["fgsm"], n=27)
        assert [row["n"] for row in found.per_class] == [row["n"] for row in again.per_class]
        audited = surestep.audit(nn.Linear(4, 3), data, surestep.Linf(0.1), budget="quick", n=27)
        assert audited.chance < 0.7

    def test_a_stream_with_a_length_is_read_as_it_comes(self, ordered):
        class Stream(IterableDataset):
            def __len__(self):
                return 90

            def __iter__(self):
                return iter(zip(*ordered, strict=True))

        found = surestep.evaluate(nn.Linear(4, 3), Stream(), surestep.Linf(0.1), ["fgsm"], n=40)
        assert [row["n"] for row in found.per_class] == [30, 10]

    def test_a_live_stream_is_not_read_further_than_needed(self, ordered):
        class Stream(IterableDataset):
            def __iter__(self):
                yield from [(x, int(y)) for x, y in zip(*ordered, strict=True)][:40]
                pytest.fail("image 41 was read")

        loader = DataLoader(Stream(), 10)
        assert (
            surestep.evaluate(nn.Linear(4, 3), loader, surestep.Linf(0.1), ["fgsm"], n=40).n == 40
        )

    def test_of_others_it_is_the_first(self):
        y = torch.arange(30) % 3
        x = torch.linspace(0.1, 0.9, 30)[:, None].repeat(1, 4)
        assert torch.equal(Images(x, y).first(7).x, x[:7])


def test_a_loader_of_bytes_or_doubles_is_the_same_as_of_pixels(net, images):
    x, y = images
    grey = (255 * x).round().to(torch.uint8)
    pixels = grey.float() / 255
    whole = evaluate(net, (pixels, y), THREAT, ["fgsm"])
    for given in (grey, pixels.double()):
        found = evaluate(net, DataLoader(TensorDataset(given, y), 500), THREAT, ["fgsm"])
        assert torch.equal(found.right["fgsm"], whole.right["fgsm"])


@pytest.mark.parametrize(("n", "last"), [(None, [13, 13, 13, 1, 10]), (50, [10])])
def test_a_loaders_batches_are_divided(images, n, last):
    """They may be larger than what fits into memory under attack."""
    loader = DataLoader(TensorDataset(*images), 40)
    batches, total = batches_of(loader, 13, n, torch.device("cpu"))
    parts = list(batches)
    assert [len(x) for x, _ in parts] == [13, 13, 13, 1, *last]
    assert total == (n or 0)
    for whole, divided in zip(images, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(divided), whole[:n])
    with pytest.raises(UserError, match="batch size 0: give 1 or more"):
        batches_of(loader, 0, n, torch.device("cpu"))


@pytest.mark.usefixtures("small_budget")
def test_one_process_judges_a_distributed_model_by_itself(net, images):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net)
        wrapped.register_forward_pre_hook(lambda *_: pytest.fail("the wrapper was called"))
        found = evaluate(wrapped, images, THREAT, ["fgsm", "transfer"])
        evaluate(net, images, THREAT, ["transfer"], sources=[wrapped])
        audited = surestep.audit(wrapped, images, THREAT, budget="quick", n=40)
    finally:
        distributed.destroy_process_group()
    assert found.right["fgsm"].equal(evaluate(net, images, THREAT, ["fgsm"]).right["fgsm"])
    assert audited.verdict


def test_what_is_given_in_another_form(net, images):
    one = evaluate(net, images, THREAT, "fgsm")
    assert list(one.robust_accuracy) == ["fgsm"]
    own = suite.Attack(lambda model, x, y: attacks.fgsm(model, x, y, THREAT))
    assert (
        evaluate(net, images, THREAT, {"own": own}).robust_accuracy["own"]
        == (one.robust_accuracy["fgsm"])
    )
    for call in (evaluate, surestep.audit):
        with pytest.raises(
            UserError, match=r"0\.03 is not a threat model: give surestep\.Linf\(8 / 255"
        ):
            call(net, images, 0.03)


def test_a_radius_of_the_curve_is_not_attacked_twice(net, images):
    seen: list[int] = []
    options = {"eps": (0.02, 0.05), "progress": lambda done, *_: seen.append(done)}
    found = evaluate(net, images, THREAT, ["fgsm"], **options)
    alone = evaluate(net, images, surestep.Linf(0.02), ["fgsm"])
    assert [at["eps"] for at in found.curve] == [0.02, 0.05]
    assert found.curve[0]["worst_case_accuracy"] == alone.worst_case_accuracy
    assert found.curve[1]["worst_case_accuracy"] == found.worst_case_accuracy
    assert seen == [0, len(images[1])] * 2


def test_what_is_being_done_is_told(net, images, tmp_path):
    said: list[str] = []
    options = {"batch_size": 50, "tell": said.append, "state": tmp_path / "state"}
    found = evaluate(net, images, THREAT, ["fgsm", "pgd-2"], **options)
    told = [text.partition(";")[0] for text in said]
    assert told == [
        *("fgsm on images 1 to 50 of 90", "pgd-2 on images 1 to 50 of 90"),
        *("fgsm on images 51 to 90 of 90", "pgd-2 on images 51 to 90 of 90"),
    ]
    clean, fgsm = found.right["clean"][:50], found.right["fgsm"][:50]
    assert said[0].endswith(f"; worst case {clean.double().mean():.1%} so far")
    assert said[1].endswith(f"; worst case {fgsm.double().mean():.1%} so far")
    evaluate(net, images, THREAT, ["fgsm", "pgd-2"], **options)
    assert len(said) == 4, "what a state knows is not done again"


@pytest.mark.parametrize("kind", ["DataLoader", "Dataset"])
def test_a_substitute_moves_no_random_state(net, images, kind):
    pairs = TensorDataset(*images)
    data = DataLoader(pairs, 30, shuffle=True) if kind == "DataLoader" else pairs
    before = torch.get_rng_state()
    evaluate(net, data, THREAT, ["transfer"])
    assert torch.equal(before, torch.get_rng_state())


def test_each_batch_has_random_points_of_its_own(net):
    """The same images twice: what is drawn for the second batch is not the first's again."""
    seen = []

    def attack(model, x, y):
        seen.append(torch.rand(3))
        return x

    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    surestep.evaluate(net, (x, y), surestep.Linf(0.1), {"mine": Attack(attack)}, batch_size=4)
    assert len(seen) == 2
    assert not torch.equal(*seen)


@pytest.mark.parametrize("crafted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("caller", [False, True])
def test_what_decides_is_float32_whatever_else_is_bf16(caller, crafted):
    class Near(nn.Module):
        """Right by a thousandth, which bf16 does not see."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1.0], [1.0]]))

        def forward(self, x):
            z = nn.functional.linear(x, self.weight * torch.tensor([[1.0], [1.001]]))
            return z

    x, y = torch.full((8, 1), 0.5), torch.ones(8, dtype=torch.int64)
    attacks = {"none": Attack(keep)}
    options = {"doubt": False, "precision": crafted}
    with torch.autocast("cpu", torch.bfloat16, enabled=caller):
        found = surestep.evaluate(Near(), (x, y), surestep.Linf(0.0001), attacks, **options)
    assert found.clean_accuracy == found.worst_case_accuracy == 1


@pytest.mark.parametrize("name", ["clean", "worst case"])
def test_an_attack_may_not_be_called_what_it_is_held_against(net, images, name):
    with pytest.raises(UserError, match=f"cannot be called '{name}', a name the result needs"):
        evaluate(net, images, THREAT, {name: Attack(keep)})


@pytest.mark.parametrize("name", ["autoattack", "autoattack-bpda"])
def test_an_attack_of_ones_own_may_not_pass_for_autoattack(net, images, name):
    """RobustBench's entries take the accuracy under these names."""
    for attack in (keep, Attack({"apgd-ce": keep})):
        with pytest.raises(UserError, match=f"'{name}' means the four attacks of AutoAttack"):
            evaluate(net, images, THREAT, {name: attack})


def keep(model, x, y):
    return x


def test_a_point_that_only_float32_sees_as_wrong_was_found_by_the_last_step(told, tmp_path):
    model = told(a={1})
    x = torch.stack([torch.zeros(3), torch.arange(3) / 1000], 1)
    hit = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
    attack = Attack(lambda m, x, y: AttackResult(x + hit, torch.full((3,), -1)), points_tried=4)
    y = torch.zeros(3, dtype=torch.int64)
    state = tmp_path / "state.jsonl"

    def by_step():
        found = surestep.evaluate(model, (x, y), surestep.Linf(0.2), {"late": attack}, state=state)
        return found.attacks[0]["by_step"]

    assert by_step() == by_step() == pytest.approx([1, 1, 1, 2 / 3])
    written = state.read_text()
    state.write_text(written.replace('"steps": [-1]', '"steps": [3]'))  # as it was once kept
    assert state.read_text() != written
    assert by_step() == pytest.approx([1, 1, 1, 2 / 3])


def test_an_attack_that_returns_points_alone_found_them_by_its_last_step(told):
    model = told(a={1})
    x = torch.stack([torch.zeros(3), torch.arange(3) / 1000], 1)
    hit = torch.tensor([[0.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
    move = lambda m, x, y: x + hit[: len(x)]  # noqa: E731
    y = torch.zeros(3, dtype=torch.int64)
    for run in (move, {"part": move}):
        attack = Attack(run, points_tried=4)
        found = surestep.evaluate(model, (x, y), surestep.Linf(0.2), {"late": attack})
        (row,) = found.attacks
        assert row["by_step"] == pytest.approx([1, 1, 1, 2 / 3])


def test_transfer_climbs_the_margin_with_momentum_too(net, monkeypatch):
    calls = []
    monkeypatch.setattr(suite.attacks, "mi_fgsm", lambda *a, **k: calls.append(k["loss"]) or a[1])
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    surestep.evaluate(net, (x, y), surestep.Linf(1e-6), ["transfer"], sources=[net, net])
    assert calls == ["margin", "margin"]


def test_a_function_is_an_attack(net, images):
    def far(model, x, y):  # outside the ball, to which it is projected
        return attacks.fgsm(model, x, y, surestep.Linf(0.9))

    def in_place(model, x, y):
        return x.copy_(far(model, x, y))

    own = {"far": far, "as one": Attack(far), "in place": in_place}
    found = evaluate(net, images, THREAT, own, doubt=False)
    assert len(set(found.robust_accuracy.values())) == 1
    assert 0 < found.robust_accuracy["far"] < found.clean_accuracy


@pytest.mark.parametrize(
    ("attacks", "said"),
    [
        ({"mine": 3}, "the attack 'mine' is 3, expected a function"),
        ({"mine": lambda m, x, y: x[:, :, 1:]}, r"'mine' returned points of shape \(.*, 7, 8\)"),
        ({"mine": lambda m, x, y: None}, "'mine' returned a NoneType, expected a tensor"),
        (["fgsm", lambda m, x, y: x], "attacks holds <function .* give an attack of your own by"),
    ],
)
def test_what_is_no_attack(net, images, attacks, said):
    with pytest.raises(UserError, match=said):
        evaluate(net, images, THREAT, attacks)


class Dicts(TensorDataset):
    def __getitem__(self, at):
        x, y = super().__getitem__(at)
        return {"x": x, "y": y}


def test_a_dataset_of_dicts_is_told_of_a_loader(net, images):
    with pytest.raises(UserError, match=r"yield a dict, .* collate_fn .* a DataLoader with it"):
        evaluate(net, Dicts(*images), THREAT, ["fgsm"])


def test_what_is_adapted_is_not_adapted_again(net, images):
    """Twice, pixels would be rounded to the weights' type before they are normalised."""
    seen: list[torch.dtype] = []

    class Look(torch.nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    half = copy.deepcopy(net).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = Adapted(half, Look())
        for model in (adapted, nn.Sequential(adapted)):  # an audit may wrap it once more
            evaluate(model, images, THREAT, ["fgsm"], doubt=False)
    assert set(seen) == {torch.float32}


def test_the_radius_is_the_threat_models(net, images):
    """Elsewhere an attack's eps is one number."""
    with pytest.raises(UserError, match=r"eps 0\.1 is a number, expected a list of further radii"):
        evaluate(net, images, THREAT, ["fgsm"], eps=0.1)


@pytest.mark.parametrize(("name", "meant"), [("AA", "autoattack"), ("bim", "i-fgsm-10")])
def test_other_names_of_attacks_are_known(name, meant):
    with pytest.raises(UserError, match=f"unknown attack '{name}': did you mean {meant}"):
        suite.parse(name, THREAT)
