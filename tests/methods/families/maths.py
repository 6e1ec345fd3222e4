"""Plain float64 mathematics for the oracles: nothing of surestep is used."""

import copy

import torch

EPS = 0.1


def cross_entropy(row, label, smoothing=0.0):
    log_p = row - row.exp().sum().log()
    return -(1 - smoothing) * log_p[label] - smoothing * log_p.sum() / len(row)


def relaxed(row, label, share):
    """Cross entropy with a label whose true class has just ``share``."""
    log_p = row - row.exp().sum().log()
    wrong = sum(log_p[k] for k in range(len(row)) if k != int(label)) / (len(row) - 1)
    return -share * log_p[label] - (1 - share) * wrong


def mean_ce(logits, y, smoothing):
    return sum(cross_entropy(row, k, smoothing) for row, k in zip(logits, y, strict=True)) / len(y)


def signs(net, x, y):
    """Sign of each sample's own gradient, in eval mode, one sample at a time."""
    net = copy.deepcopy(net).eval()
    result = []
    for image, label in zip(x, y, strict=True):
        image = image.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(net(image[None]), label[None])
        result.append(torch.autograd.grad(loss, image)[0].sign())
    return torch.stack(result)


def train_signs(net, x, y):
    """Sign of the gradient of the batch's mean loss, in train mode: batch norm couples samples."""
    x = x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(copy.deepcopy(net).train()(x), y)
    return torch.autograd.grad(loss, x)[0].sign()


def box(p):
    return p.clamp(0, 1)


def ball(p, x):
    return box(x + (p - x).clamp(-EPS, EPS))


def noise_signs(x):
    return torch.randn_like(x).sign()


def squared_distance(a, b):
    return sum(((p - q) ** 2).sum() for p, q in zip(a, b, strict=True)) / len(a)


def ce_at(points, y, smoothing):
    """The update of a method that minimises the cross entropy at its points, and no more."""
    return points, lambda z: mean_ce(z, y, smoothing), slice(None)
