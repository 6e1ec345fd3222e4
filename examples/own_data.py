"""Train a network of your own on tensors of your own, measure its robustness, and audit it."""

import tempfile

import torch
from torch import nn

import surestep

# In place of your data: dark noise with one brighter corner, whose position is the class.
torch.manual_seed(0)
y = torch.arange(600) % 4
corner = torch.eye(4)[y].view(-1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
x = (0.2 + 0.4 * corner + 0.2 * torch.randn(600, 1, 8, 8)).clamp(0, 1)  # (N, C, H, W) in [0, 1]
train, test = (x[:500], y[:500]), (x[500:], y[500:])

net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))  # to logits
threat = surestep.Linf(eps=0.1)
method = surestep.methods.SATR2(threat)

with tempfile.TemporaryDirectory() as folder:  # in your script a folder that stays
    surestep.fit(net, train, method, out=f"{folder}/run", epochs=4, batch_size=32, quiet=True)
found = surestep.evaluate(net, test, threat, ["fgsm", "pgd-20", "pgd-20-margin"])
print(f"clean {found.clean_accuracy:.1%}, worst case {found.worst_case_accuracy:.1%}")
print(surestep.audit(net, test, threat, budget="quick", n=50).sentence)
