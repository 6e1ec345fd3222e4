"""timm is not needed here: a stand-in with its interface takes its place."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from surestep import runs, targets
from surestep.config import RunConfig
from surestep.data import Images
from surestep.errors import UserError
from surestep.models import create
from surestep.weights import load_weights, save_weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FakeModel(nn.Module):
    def __init__(self, num_classes, in_chans, size, fixed):
        super().__init__()
        self.pretrained_cfg = {"mean": MEAN, "std": STD, "input_size": (3, 224, 224)}
        if fixed:
            self.pretrained_cfg["fixed_input_size"] = True
        self.size = size
        self.fc = nn.Linear(in_chans, num_classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    def create_model(name, *, pretrained, num_classes, in_chans, **options):
        if pretrained and name != "net":
            raise OSError("no network")
        if name == "net" and not options:
            made = FakeModel(num_classes, in_chans, size=None, fixed=False)
            made.pretrained = pretrained
            return made
        if name == "vit":
            return FakeModel(num_classes, in_chans, size=options.get("img_size", 224), fixed=True)
        raise RuntimeError(f"Unknown model ({name})")

    module = ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)


def test_timm_model_normalises_as_pretrained():
    model = create("timm:net", num_classes=5)
    x = torch.rand(2, 3, 16, 16)
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert model(x).shape == (2, 5)
    torch.testing.assert_close(model(x), model.body(normalised))


def test_timm_model_takes_other_statistics_and_channels():
    grey = create("timm:net", in_channels=1)
    assert grey.normalize.mean.flatten().tolist() == [pytest.approx(sum(MEAN) / 3)]
    assert grey(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    own = create("timm:net", mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    assert own.normalize.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="mean has 1 values"):
        create("timm:net", mean=(0.1,), std=(0.2,))


def test_pretrained_weights_for_other_channels_expect_the_mean_statistics(tmp_path, monkeypatch):
    mean, std = (pytest.approx(sum(values) / 3) for values in (MEAN, STD))
    for channels in (1, 4):
        found = create("timm:net", in_channels=channels, pretrained=True).normalize
        assert found.mean.flatten().tolist() == [mean] * channels
        assert found.std.flatten().tolist() == [std] * channels
    assert create("timm:net", in_channels=1, pretrained=True, normalize=False).normalize is None
    # A run that began with them is loaded without them, also as weights alone.
    images = Images(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
    config = RunConfig(model="timm:net", weights="pretrained")
    begun = runs.build_model(config, images, begin=True)
    save_weights(tmp_path / "w.safetensors", begun)
    loaded = runs.build_model(config, images)
    assert not loaded.body.pretrained
    load_weights(tmp_path / "w.safetensors", loaded)
    torch.testing.assert_close(loaded(images.x), begun(images.x))
    monkeypatch.setattr(targets.runs, "load_data", lambda *_: images)
    asked = {"dataset": "npz:any", "eps": 0.1, "device": "cpu"}
    weights = str(tmp_path / "w.safetensors")
    judged = targets.open_target("timm:net", weights=weights, **asked).model
    torch.testing.assert_close(judged(images.x), begun(images.x))


def test_image_size_reaches_only_models_of_a_fixed_size():
    assert create("timm:net", image_size=32).image_size is None
    assert create("timm:vit").image_size == 224
    vit = create("timm:vit", image_size=32)
    assert vit.image_size == vit.body.size == 32
    with pytest.raises(UserError, match=r"timm:vit takes images of shape \(N, 3, 32, 32\)"):
        vit(torch.rand(2, 3, 64, 64))


def test_unknown_timm_name():
    with pytest.raises(UserError, match=r"timm cannot create 'timm:nonet' \(Unknown model"):
        create("timm:nonet")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError) as error:
        create("timm:net")
    assert str(error.value) == "timm:net needs timm: pip install 'surestep[timm]'"


def test_pretrained_weights():
    assert create("timm:net", pretrained=True).body.pretrained
    assert not create("timm:net").body.pretrained
    with pytest.raises(UserError, match=r"timm cannot load the weights of 'timm:vit': no network"):
        create("timm:vit", pretrained=True)
    said = r"lenet\+ has no pretrained weights, only timm:NAME has: give a file"
    with pytest.raises(UserError, match=said):
        create("lenet+", pretrained=True)


def test_weights_of_ones_own_are_judged_with_one_normalisation(tmp_path, monkeypatch):
    torch.save(nn.Linear(3, 5).state_dict(), tmp_path / "other.pt")
    net = create("timm:net", num_classes=5)
    torch.save(net.body.state_dict(), tmp_path / "w.pt")
    images = Images(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 4]))
    monkeypatch.setattr(targets.runs, "load_data", lambda config, split, n: images)
    asked = {"dataset": "npz:any", "eps": 0.1, "device": "cpu"}

    def judged(**more):
        target = targets.open_target("timm:net", weights=str(tmp_path / "w.pt"), **asked, **more)
        outside, inside = target.preprocess, target.model.normalize
        assert (outside is None) is (inside is not None)
        return nn.Sequential(nn.Identity() if outside is None else outside, target.model)

    torch.testing.assert_close(judged()(images.x), net(images.x))
    other = judged(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))(images.x)
    by_hand = (images.x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [1.0, 1.0, 2.0]
    ).view(3, 1, 1)
    torch.testing.assert_close(other, net.body(by_hand))
    with pytest.raises(UserError, match="does not fit the model"):
        targets.open_target("timm:net", weights=str(tmp_path / "other.pt"), **asked)
