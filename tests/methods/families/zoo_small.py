"""tmp"""
STEPS = {"steps": 3, "alpha": 0.05}
SMALL = {
    **dict.fromkeys(("alp", "fat", "iaat", "mart", "pgd-wa", "uat"), STEPS),
    "pap": {"steps": 2, "lam": 2.0},
    "free": {"replays": 2},
    "fgsm-fuap": {"count": 4},
    "elle": {"lam": 10.0},
    "elle-a": {"lam": 10.0},
    "liet": {"lam": 5.0},
    "uat": {**STEPS, "labelled": 0.5},
    "mart": {**STEPS, "sigma": 0.05},
}
TRAIN_PASSES = {"zerograd": 2, "multigrad": 4, "gradalign": 2, "aaer": 2, "ssat": 2, "converge-smooth": 2}
REACH = {"fgsm-pco": 0.05}
DETERMINISTIC = ("pap", "fgsm-uap", "fgsm-cuap", "sads_", "fgsm-pco", "free", "fgsm-fuap")
