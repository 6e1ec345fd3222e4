"""A stand-in for a model, trained from its answers alone, on which transfer attacks are made."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surestep.attacks.inputs import forward_logits
from surestep.attacks.lending import attacking
from surestep.randomness import forked_rng, seed_everything
from surestep.threat import ThreatModel

STEPS, BATCH, WIDTH = 250, 64, 16


def substitute(model: nn.Module, x: Tensor, threat: ThreatModel, seed: int) -> nn.Module:
    """Train a small network to answer like the model, from questions only (Papernot et al. 2017).

    The questions are images with noise of up to eps, so it needs no other data. The model and the
    random state are left as they were.

    Args:
        model: whose answers are learnt; asked in eval mode.
        x: images (N, ...) on its device.
        threat: norm, radius and data range.
        seed: of the network, the questions and the noise.
    """
    with attacking(model) as inner, forked_rng(x.device):
        seed_everything(seed)
        with torch.no_grad():
            classes = forward_logits(inner, x[:1]).shape[1]
        net = _network(x, classes).to(x.device)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(STEPS):
            rows = torch.randint(len(x), (BATCH,)).to(x.device)
            asked = threat.random_start(x[rows], float(torch.rand(())) * threat.eps)
            with torch.no_grad():
                answers = forward_logits(inner, asked).argmax(1)
            with torch.enable_grad():
                loss = F.cross_entropy(net(asked), answers)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval()


def _network(x: Tensor, classes: int) -> nn.Module:
    if x.dim() != 4 or min(x.shape[2:]) < 8:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(x[0].numel(), 256), nn.ReLU(), nn.Linear(256, classes)
        )
    channels, (high, wide) = x.shape[1], ((size + 3) // 4 for size in x.shape[2:])
    # Windows of one size: the gradient of adaptive ones is not deterministic on a GPU.
    window = max(1, high // 7), max(1, wide // 7)
    parts = (high // window[0]) * (wide // window[1])
    return nn.Sequential(
        nn.Conv2d(channels, WIDTH, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(WIDTH, 2 * WIDTH, 3, 2, 1),
        nn.ReLU(),
        nn.AvgPool2d(window),
        nn.Flatten(),
        nn.Linear(2 * WIDTH * parts, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )
