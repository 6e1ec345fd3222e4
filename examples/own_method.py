"""Write a training method of your own, FGSM with half of the loss on clean images, and train."""

from dataclasses import dataclass

import torch

import surestep
from surestep import data, models
from surestep.methods import Cost, Method, Update, attack_gradient


@surestep.methods.register("half-clean")  # its name in run folders
@dataclass
class HalfClean(Method):
    """Cross entropy on the images and at FGSM's points, in equal parts."""

    summary = "FGSM; half of the loss is on clean images"
    paper = "Goodfellow et al. 2015, arXiv 1412.6572"

    def craft(self, model, x, y):
        """Return the images of the update's forward pass, the loss there, and which are x_adv."""
        grad, _ = attack_gradient(model, x, y)  # in eval mode; leaves the model as it was
        x_adv = self.threat.ascend(x, grad, self.threat.eps, x)
        return Update(torch.cat([x, x_adv]), self.plain_loss(y.repeat(2)), slice(len(x), None))

    def cost(self, batch_size):
        """Return the passes per image: one gradient in the attack, two images in the update."""
        return Cost.of(attack=1, update=2)


net, method = models.create("cnn-small"), HalfClean(surestep.Linf(eps=0.1))
images = data.load("mnist").first(4096)
fitted = surestep.fit(net, images, method, epochs=2, batch_size=32, val_images=100, quiet=True)
row = fitted.history[-1]
print({name: f"{row[name]:.3f}" for name in ("ce", "adv_accuracy", "val_worst_case")})
