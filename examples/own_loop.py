"""SAT-R2 in your own training loop: three lines."""

import torch

import surestep
from surestep import data, models

images = data.load("mnist").first(5120)
model = models.create("lenet+")
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

threat = surestep.Linf(eps=0.3)  # norm, radius and data range, once
method = surestep.methods.SATR2(threat, lam=5.0)  # what one training step minimises

for x, y, _ in data.Batches(images, batch_size=128).epoch(0):
    result = method(model, x, y)  # the attack, the forward pass and the loss
    optimizer.zero_grad()
    result.loss.backward()
    optimizer.step()

print({name: f"{value:.3f}" for name, value in result.terms.items()})
found = surestep.evaluate(model, data.load("mnist", "test").first(500), threat, ["fgsm", "pgd-20"])
print(f"clean {found.clean_accuracy:.1%}, worst case {found.worst_case_accuracy:.1%}")
