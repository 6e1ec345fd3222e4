"""Test the audit on models whose true verdict is known: masked on purpose, or honest.

    python benchmarks/audit_zoo.py                      # every model, seed 0
    python benchmarks/audit_zoo.py --seeds 0 1 2 --n 200
    python benchmarks/audit_zoo.py --only jpeg kwta --autoattack
    python benchmarks/audit_zoo.py --table              # the rows so far, as Markdown

The base models (LeNet+ on MNIST, eps 0.3) are trained in minutes and kept in --cache. A masked
model must be judged "pseudo-robust", or "not robust" if its true accuracy is near zero and the
audit's own attacks see that at once. An undefended model must be "not robust", an honest one
"robust". "inconclusive" is right, too, where a line inside the forward blocks the way of one branch
of two, and where noise turns single passes of an honest model. With --autoattack, AutoAttack's
standard version runs on the same images; the accuracy found by the audit must not exceed its.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _table import append, read
from torch import Tensor, nn

import surestep
from surestep import models, runs
from surestep.auditing._subject import Graphed
from surestep.data import Images, load
from surestep.weights import load_weights, save_weights

MASKED = {"pseudo-robust", "not robust"}
HONEST = {"robust"}
THREAT = surestep.Linf(0.3)


class Quantize(nn.Module):
    """Round pixels to a few levels, which blocks gradients."""

    def __init__(self, levels: int = 8) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return (x * (self.levels - 1)).round() / (self.levels - 1)


class JPEG(nn.Module):
    """Quantise the cosine transform coefficients of 4 x 4 blocks."""

    def __init__(self, step: float = 0.4) -> None:
        super().__init__()
        self.step = step
        k = torch.arange(4.0)
        basis = torch.cos(torch.pi / 4 * (k[None] + 0.5) * k[:, None])
        self.register_buffer("basis", F.normalize(basis, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        basis = self.get_buffer("basis")
        blocks = x.reshape(n, c, h // 4, 4, w // 4, 4).transpose(3, 4)
        coefficients = basis @ blocks @ basis.T
        rounded = (coefficients / self.step).round() * self.step
        return (basis.T @ rounded @ basis).transpose(3, 4).reshape(n, c, h, w).clamp(0, 1)


class Thermometer(nn.Module):
    """Encode a pixel as ten comparisons (Buckman et al. 2018), which blocks gradients."""

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.arange(0.05, 1, 0.1, device=x.device)
        return (x > levels.view(1, -1, 1, 1)).float()


class Noise(nn.Module):
    def __init__(self, sigma: float = 0.15) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sigma * torch.randn_like(x)


class RandomResize(nn.Module):
    """Shrink to a random size and pad to a random position (Xie et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        size = int(torch.randint(22, 29, ()))
        left, top = (int(torch.randint(0, 29 - size, ())) for _ in range(2))
        small = F.interpolate(x, size=(size, size), mode="bilinear", antialias=False)
        return F.pad(small, (left, 28 - size - left, top, 28 - size - top))


class Detach(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class KWTA(nn.Module):
    """Keep the largest activations of a layer (Xiao et al. 2020)."""

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, 0).view_as(x)


class DeadZone(nn.Module):
    """MeanSparse with a large threshold: replace activations near their mean by the mean."""

    def __init__(self, mean: Tensor, half: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("reach", half)

    def forward(self, x: Tensor) -> Tensor:
        mean, half = self.get_buffer("mean"), self.get_buffer("reach")
        return torch.where((x - mean).abs() <= half, mean, x)


class Purify(nn.Module):
    """Move the image towards the net's predicted class, by gradient steps inside forward."""

    def __init__(self, net: nn.Module, steps: int = 1) -> None:
        super().__init__()
        self.inner = [net]  # not a submodule: its parameters are the classifier's
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        z = x.detach()
        for _ in range(self.steps):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                logits = self.inner[0](z)
                (grad,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), z)
            z = (z - 0.1 * grad.sign()).clamp(0, 1)
        return z.detach()


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * logits


class Bases:
    """The trained base models, kept on disk by name and seed."""

    def __init__(self, cache: Path, seed: int) -> None:
        self.cache, self.seed = cache, seed

    def run(self, name: str, method: str, preset: str, **changes: Any) -> nn.Module:
        """Train LeNet+ with a method's preset."""
        settings = {"val_images": 0, "select": "last", "seed": self.seed, "method": method}
        config = runs.resolve({**settings, **changes}, preset)
        model = runs.build_model(config, runs.load_data(config, "test"))
        return self._kept(name, model, lambda: runs.train(config, None, quiet=True).model)

    def fit(self, name: str, model: nn.Module, **changes: Any) -> nn.Module:
        """Train the given model without attacks, by default for one epoch."""
        method = surestep.methods.get("standard")(THREAT)
        settings = {"epochs": 1, "lr": 0.05, "val_images": 0, "seed": self.seed, "select": "last"}
        train = load("mnist", "train")
        return self._kept(
            name,
            model,
            lambda: surestep.fit(model, train, method, quiet=True, **{**settings, **changes}).model,
        )

    def _kept(self, name: str, model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
        path = self.cache / f"{name}-{self.seed}.safetensors"
        if not path.exists():
            start = time.time()
            path.parent.mkdir(parents=True, exist_ok=True)
            save_weights(path, make())
            print(f"trained {name} in {time.time() - start:.0f} s", flush=True)
        load_weights(path, model)
        return model.eval()

    def plain(self) -> nn.Module:
        return self.run("plain", "standard", "mnist", epochs=1, lr=0.05)

    def fgsm(self) -> nn.Module:
        return self.run("fgsm", "fgsm", "mnist-fast", epochs=4, lr=0.03, engine="fast")

    def sat_r2(self) -> nn.Module:
        return self.run("sat-r2", "sat-r2", "mnist-fast", epochs=3)

    def sat_r3(self) -> nn.Module:
        """Train the whole recipe; after three epochs only, one of three seeds was masked."""
        return self.run("sat-r3", "sat-r3", "mnist-fast")

    def pgd(self) -> nn.Module:
        params = {"steps": 10, "alpha": 0.06}
        return self.run("pgd", "pgd", "mnist-fast", epochs=2, params=params)

    def trades(self) -> nn.Module:
        params = {"steps": 10, "alpha": 0.06}
        return self.run(
            "trades",
            "trades",
            "mnist",
            epochs=2,
            batch_size=128,
            lr=0.05,
            schedule="onecycle",
            params=params,
        )

    def n_fgsm(self) -> nn.Module:
        return self.run("n-fgsm", "n-fgsm", "mnist", epochs=3)

    def sparse(self) -> nn.Module:
        """Add a dead zone of 1.5 channel standard deviations after each ReLU of the plain model."""
        model = self.plain()
        x = load("mnist", "test").first(500).pixels()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.ReLU):
                seen: list[Tensor] = []
                handle = module.register_forward_hook(
                    lambda _m, _i, out, seen=seen: seen.append(out)
                )
                with torch.no_grad():
                    model(x)
                handle.remove()
                dims = [d for d in range(seen[0].dim()) if d != 1]
                mean = seen[0].mean(dims, keepdim=True)[0]
                half = 1.5 * seen[0].std(dims, keepdim=True)[0]
                parent = model.get_submodule(name.rpartition(".")[0])
                last = name.rpartition(".")[2]
                setattr(parent, last, nn.Sequential(nn.ReLU(), DeadZone(mean, half)))
        return model.eval()

    def kwta(self) -> nn.Module:
        model = models.create("lenet+", 10)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.ReLU):
                setattr(
                    model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], KWTA()
                )
        return self.fit("kwta", model)

    def thermometer(self) -> nn.Module:
        torch.manual_seed(self.seed)
        net = models.create("lenet+", 10, in_channels=10)
        return self.fit("thermometer", nn.Sequential(Thermometer(), net))


Zoo = dict[str, tuple[set[str], Callable[[Bases], nn.Module]]]
ZOO: Zoo = {
    "fgsm collapsed": (MASKED, Bases.fgsm),
    "quantised input": (MASKED, lambda b: nn.Sequential(Quantize(), b.plain())),
    "jpeg": (MASKED, lambda b: nn.Sequential(JPEG(), b.plain())),
    "logits x 1e4": (MASKED, lambda b: nn.Sequential(b.plain(), Scale(1e4))),
    "temperature 1e-3": (MASKED, lambda b: nn.Sequential(b.plain(), Scale(1e3))),
    "softmax as logits": (MASKED, lambda b: nn.Sequential(b.plain(), Scale(10), nn.Softmax(1))),
    "noise": (MASKED, lambda b: nn.Sequential(Noise(), b.plain())),
    "random resize": (MASKED, lambda b: nn.Sequential(RandomResize(), b.plain())),
    "kwta": (MASKED, Bases.kwta),
    "detached": (MASKED, lambda b: nn.Sequential(Detach(), b.plain())),
    "dead zone": (MASKED, Bases.sparse),
    "thermometer": (MASKED, Bases.thermometer),
    "label smoothing .9": (
        MASKED,
        lambda b: b.run("smooth", "standard", "mnist", epochs=1, lr=0.05, label_smoothing=0.9),
    ),
    "half quantised": (MASKED, lambda b: Branches(Quantize(), b)),
    "half detached": (MASKED | {"inconclusive"}, lambda b: Branches(Detach(), b)),
    "hard gate": (MASKED, lambda b: Gate(b)),
    "purifier": (MASKED, lambda b: nn.Sequential(Purify(b.plain()), b.plain())),
    "plain": ({"not robust"}, Bases.plain),
    "plain x 10": ({"not robust"}, lambda b: nn.Sequential(b.plain(), Scale(10))),
    "sat-r2": (HONEST, Bases.sat_r2),
    "sat-r2 x 10": (HONEST, lambda b: nn.Sequential(b.sat_r2(), Scale(10))),
    "sat-r2 x .1": (HONEST, lambda b: nn.Sequential(b.sat_r2(), Scale(0.1))),
    "sat-r2 normalised inside": (
        HONEST,
        lambda b: nn.Sequential(
            models.Normalize([-1.0], [2.0]), Scale(2.0), Shift(-1.0), b.sat_r2()
        ),
    ),
    "sat-r2 dropout": (
        HONEST,
        lambda b: nn.Sequential(nn.Dropout(0.5), b.sat_r2(), nn.Dropout(0.5)),
    ),
    "sat-r2 noise on logits": (
        HONEST | {"inconclusive"},
        lambda b: nn.Sequential(b.sat_r2(), Noise(1.0)),
    ),
    "sat-r3": (HONEST, Bases.sat_r3),
    "n-fgsm": (HONEST, Bases.n_fgsm),
    "pgd": (HONEST, Bases.pgd),
    "trades": (HONEST, Bases.trades),
}


class Branches(nn.Module):
    """The undefended model behind a mask, and a robust one that adds a little, and a gradient."""

    def __init__(self, mask: nn.Module, bases: Bases) -> None:
        super().__init__()
        self.mask, self.net, self.robust = mask, bases.plain(), bases.sat_r2()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.mask(x)) + 0.01 * self.robust(x)


class Halves(nn.Module):
    """Tell only whether a digit is below five."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.stack([half.logsumexp(1) for half in logits.split(5, dim=1)], 1)


class Gate(nn.Module):
    """A robust model that may answer only with a digit of the half that the undefended one says."""

    def __init__(self, bases: Bases) -> None:
        super().__init__()
        self.router, self.expert = nn.Sequential(bases.plain(), Halves()), bases.sat_r2()

    def forward(self, x: Tensor) -> Tensor:
        half = self.router(x).argmax(1, keepdim=True)
        allowed = torch.arange(10, device=x.device) // 5 == half
        return torch.where(allowed, self.expert(x), -20.0)


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def judge(name: str, bases: Bases, images: Images, args: argparse.Namespace) -> dict[str, Any]:
    """Audit one model of the zoo and compare the verdict with the expected one."""
    expected, build = ZOO[name]
    model = build(bases).eval()
    found = surestep.audit(model, images, THREAT, budget=args.budget, n=args.n, seed=bases.seed)
    row: dict[str, Any] = {
        "model": name,
        "seed": bases.seed,
        "expected": " or ".join(sorted(expected)),
        "verdict": found.verdict,
        "ok": found.verdict in expected,
        "clean": found.clean_accuracy,
        "fgsm": found.claims["fgsm"],
        "pgd_10": found.claims["pgd-10"],
        "found": found.found_accuracy,
        "by": found.found_by,
        "autoattack": "",
        "flags": " ".join(str(check.number) for check in found.flagged),
        "n": found.n,
        "budget": args.budget,
        "seconds": round(found.seconds, 1),
        "date": datetime.date.today().isoformat(),
    }
    if args.autoattack:
        x, y = images.first(args.n).tensors()
        torch.manual_seed(bases.seed)
        # Without input gradients, the gradient parts get zeros; Square still sees the outputs.
        attacked = surestep.evaluate(Graphed(model), (x, y), THREAT, ["autoattack"], batch_size=250)
        row["autoattack"] = attacked.worst_case_accuracy
    return row


def table(rows: list[dict[str, str]]) -> None:
    """Print one line per model: expected verdict, actual verdicts, means over the seeds."""
    print("| model | must be | verdicts | clean | FGSM | PGD-10 | found | AutoAttack | flags |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        verdicts = [row["verdict"] for row in mine]
        got = ", ".join(f"{v} x{verdicts.count(v)}" for v in dict.fromkeys(verdicts))
        flags = sorted({int(f) for row in mine for f in row["flags"].split()})
        cells = []
        for key in ("clean", "fgsm", "pgd_10", "found", "autoattack"):
            values = [float(row[key]) for row in mine if row[key]]
            cells.append(f"{100 * sum(values) / len(values):.1f}" if values else "")
        line = [name, mine[0]["expected"], got, *cells, " ".join(map(str, flags))]
        print(f"| {' | '.join(line)} |")
    wrong = [row for row in rows if row["ok"] != "True"]
    n = ", ".join(sorted({row["n"] for row in rows}))
    print(f"\n{len(rows) - len(wrong)} of {len(rows)} verdicts as they must be (n {n})")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n", type=int, default=200, help="test images")
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--autoattack", action="store_true", help="compare with AutoAttack")
    parser.add_argument("--cache", type=Path, default=Path(".cache/zoo"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/audit_zoo.csv"))
    parser.add_argument("--table", action="store_true", help="print the rows of --out as a table")
    args = parser.parse_args()
    rows = read(args.out)
    if args.table:
        return table(rows)
    images = load("mnist", "test")
    done = {(row["model"], int(row["seed"])) for row in rows}
    for seed in args.seeds:
        bases = Bases(args.cache, seed)
        for name in args.only or ZOO:
            if (name, seed) in done:
                continue
            row = judge(name, bases, images, args)
            append(args.out, list(row), row)
            mark = "ok   " if row["ok"] else "WRONG"
            print(
                f"{mark} {name:26} {row['verdict']:14} clean {row['clean']:.3f} "
                f"fgsm {row['fgsm']:.3f} pgd-10 {row['pgd_10']:.3f} found {row['found']:.3f} "
                f"({row['by']}) aa {row['autoattack']} flags {row['flags']} "
                f"{row['seconds']} s",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
