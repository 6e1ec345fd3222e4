"""Training methods: what one training step minimises.

Every module of this package registers its methods when it is imported, and so does every installed
package with an entry point in the group ``surestep.methods``; ``get`` returns them by slug. The
names below are what a plug-in or a loop of one's own needs, and the classes of the core methods.
"""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from warnings import warn

from surestep.attacks.gradients import attack_gradient, input_gradient
from surestep.attacks.lending import attacking
from surestep.methods._base import Cost, LossAndTerms, Method, Progress, StepResult, Update
from surestep.methods._hyperparameters import SHARED, length_names, of_eps, of_span, param
from surestep.methods._losses import once
from surestep.methods._memory import Memory
from surestep.methods._presets import Preset
from surestep.methods._registry import (
    build,
    card,
    get,
    is_registered,
    names,
    overview,
    preset,
    recipe_of,
    register,
    settle,
)
from surestep.methods._single_step import OnSingleStep, SingleStep
from surestep.methods.fgsm import FGSM
from surestep.methods.n_fgsm import NFGSM
from surestep.methods.pgd import PGD
from surestep.methods.r_fgsm import RFGSM
from surestep.methods.rs_fgsm import RSFGSM
from surestep.methods.sat import SATR1, SATR2, SATR3, sat_r1_loss, sat_r2_loss, sat_r3_loss
from surestep.methods.standard import Standard
from surestep.methods.trades import TRADES, trades_loss

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
for _plug_in in entry_points(group="surestep.methods"):
    try:
        _plug_in.load()
    except Exception as e:  # a broken plug-in must not break surestep
        warn(f"cannot load the plug-in {_plug_in.name} of surestep.methods: {e!r}", stacklevel=1)

__all__ = [
    "FGSM",
    "NFGSM",
    "PGD",
    "RFGSM",
    "RSFGSM",
    "SATR1",
    "SATR2",
    "SATR3",
    "SHARED",
    "TRADES",
    "Cost",
    "LossAndTerms",
    "Memory",
    "Method",
    "OnSingleStep",
    "Preset",
    "Progress",
    "SingleStep",
    "Standard",
    "StepResult",
    "Update",
    "attack_gradient",
    "attacking",
    "build",
    "card",
    "get",
    "input_gradient",
    "is_registered",
    "length_names",
    "names",
    "of_eps",
    "of_span",
    "once",
    "overview",
    "param",
    "preset",
    "recipe_of",
    "register",
    "sat_r1_loss",
    "sat_r2_loss",
    "sat_r3_loss",
    "settle",
    "trades_loss",
]
