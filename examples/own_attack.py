"""Evaluate a model with your own attack next to surestep's; the worst case is taken per image."""

import torch

import surestep
from surestep import data, models
from surestep.evaluation import suite

threat = surestep.Linf(eps=0.1)
net = models.create("cnn-small")
surestep.fit(
    net,
    data.load("mnist").first(4096),
    surestep.methods.Standard(threat),
    epochs=2,
    val_images=0,
    quiet=True,
)


def darken(model, x, y):
    """Return images with darkened pixels (an attack's points are projected to the ball)."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), x)
    return (x - threat.eps * (grad < 0)).detach()


attacks = {
    "darken": suite.Attack(darken, uses_gradient=True),
    "pgd-20": suite.parse("pgd-20", threat),
}
found = surestep.evaluate(net, data.load("mnist", "test").first(800), threat, attacks)
for name, accuracy in found.robust_accuracy.items():
    low, high = found.intervals[name]
    print(f"{name}: {accuracy:.1%} ({low:.1%} to {high:.1%})")
print(f"worst case {found.worst_case_accuracy:.1%} of {found.n} images")
