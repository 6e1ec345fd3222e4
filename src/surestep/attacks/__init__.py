"""Attacks: (model, x, y) to x_adv."""

from surestep.attacks import autoattack, nearest
from surestep.attacks.gradient import fgsm, i_fgsm, mi_fgsm, pgd, r_fgsm, random_noise

__all__ = ["autoattack", "fgsm", "i_fgsm", "mi_fgsm", "nearest", "pgd", "r_fgsm", "random_noise"]
