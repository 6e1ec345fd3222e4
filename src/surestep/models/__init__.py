"""Image classifiers that take pixels in [0, 1]; any normalisation is inside the model."""

from surestep.models._base import Classifier, Normalize, choose_normalize
from surestep.models._from_file import absolute, file_of, from_file, in_file
from surestep.models._registry import check_name, create, names, register
from surestep.models.hypersphere import HypersphereHead, on_hypersphere
from surestep.models.lenet import CNNSmall, LeNetPlus
from surestep.models.resnet import PreActResNet, ResNet
from surestep.models.wideresnet import WideResNet

__all__ = [
    "CNNSmall",
    "Classifier",
    "HypersphereHead",
    "LeNetPlus",
    "Normalize",
    "PreActResNet",
    "ResNet",
    "WideResNet",
    "absolute",
    "check_name",
    "choose_normalize",
    "create",
    "file_of",
    "from_file",
    "in_file",
    "names",
    "on_hypersphere",
    "register",
]
