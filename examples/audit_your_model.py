"""Audit your own model: here one without any robustness, masked by noise at its input."""

import torch
from torch import nn

import surestep
from surestep import data, models


class Noisy(nn.Module):
    """A randomised defence: gradient attacks see a different network at each step."""

    def forward(self, x):
        """Add noise."""
        return x + 0.2 * torch.randn_like(x)


train, test = data.load("mnist").first(4096), data.load("mnist", "test").first(400)
threat = surestep.Linf(eps=0.1)
net = models.create("cnn-small")
surestep.fit(net, train, surestep.methods.Standard(threat), epochs=2, val_images=0, quiet=True)

# Any module that returns logits will do, and any data: tensors, a Dataset, a DataLoader.
found = surestep.audit(nn.Sequential(Noisy(), net), test, threat, budget="quick", n=100)
print(found.verdict, "-", found.sentence)
for check in found.flagged:
    print(f"  {check.title}: {check.sentence}")
