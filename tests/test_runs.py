"""From settings to a run's parts; the command line's tests cover the runs themselves."""

from __future__ import annotations

import copy
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import surestep
from surestep import data, methods, posthoc, runs
from surestep.config import RunConfig
from surestep.errors import UserError
from surestep.models.hypersphere import HypersphereHead
from surestep.posthoc.mean_sparse import layers
from surestep.training import TrainStep
from surestep.training.run_folder import RunFolder
from surestep.weights import Signature, read_signature, save_weights

DEFAULT = {name: field.default for name, field in RunConfig.model_fields.items()}


class TestResolve:
    def test_nothing_at_all_takes_the_preset_of_the_default_data_set(self):
        config = runs.resolve({})
        chosen = methods.preset(DEFAULT["method"], DEFAULT["dataset"])
        assert config.params == chosen.params
        assert (config.model, config.eps) == (chosen.model, chosen.eps)
        assert {k: getattr(config, k) for k in chosen.settings} == chosen.settings
        rest = RunConfig.model_fields.keys() - {"params", "model", "eps", "normalize"}
        rest -= chosen.settings.keys()
        assert all(getattr(config, k) == DEFAULT[k] for k in rest)

    def test_none_takes_the_defaults(self):
        assert runs.resolve({}, "none") == RunConfig()
        assert runs.resolve({"method": "sat-r3"}, "none") == RunConfig(method="sat-r3")

    def test_a_presets_lengths_follow_eps_unless_given(self):
        """RS-FGSM's step is 1.25 eps, SAT-R3's short step a quarter of eps, at any eps."""
        twice = {"eps": "16/255", "dataset": "cifar10"}
        assert runs.resolve({"method": "rs-fgsm", **twice}).params == {"alpha": 20 / 255}
        found = runs.resolve({"method": "sat-r3", **twice, "params": {"alpha": "1/255"}}).params
        assert found["eps_low"] == pytest.approx(4 / 255)
        assert found["alpha"] == pytest.approx(1 / 255)
        assert (found["lam"], found["tau"]) == (1.0, 0.6)
        # None stays the method's own default.
        given = {"method": "pgd", **twice, "params": {"alpha": None}}
        assert runs.resolve(given).params["alpha"] is None

    @pytest.mark.parametrize(
        ("slug", "name"), [(s, p) for s in methods.names() for p in methods.get(s).presets]
    )
    def test_every_preset_resolves_and_builds(self, slug, name):
        config = runs.resolve({"method": slug}, name)
        chosen = methods.preset(slug, name)
        assert (config.dataset, config.model, config.eps) == (
            *(chosen.dataset, chosen.model),
            chosen.eps,
        )
        assert config.normalize == chosen.normalize
        method = runs.build_method(config)
        assert method.slug == slug
        assert chosen.params.items() <= method.params().items()

    @pytest.mark.parametrize("slug", methods.names())
    @pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
    def test_the_preset_called_as_the_data_set(self, slug, dataset):
        found = runs.resolve({"method": slug, "dataset": dataset})
        assert found == runs.resolve({"method": slug}, dataset)

    @pytest.mark.parametrize(
        ("method", "eps", "preset", "lam"),
        [
            ("gradalign", "8/255", "cifar10", 0.2),
            ("gradalign", "16/255", "cifar10-16", 2.0),
            ("gradalign", "14/255", "cifar10-16", 2.0),
            ("gradalign", "2/255", "cifar10", 0.2),
            ("elle", "16/255", "cifar10-16", 5000.0),
            ("nuat", "16/255", "cifar10", None),  # cifar10-wa is for no radius
        ],
    )
    @pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
    def test_of_presets_for_several_radii_the_nearest(self, method, eps, preset, lam, dataset):
        assert runs.usual_preset(method, dataset, eps) == preset
        found = runs.resolve({"method": method, "dataset": dataset, "eps": eps})
        assert lam in (None, found.params["lam"])

    def test_an_l2_radius_is_near_to_no_preset(self):
        values = {"method": "gradalign", "dataset": "cifar10", "norm": "l2", "eps": "128/255"}
        assert runs.resolve(values).params["lam"] == 0.2

    @pytest.mark.parametrize("dataset", ["npz", "folder:x", "unknown"])
    def test_no_preset_for_other_data(self, dataset):
        config = runs.resolve({"dataset": dataset, "eps": 0.2})
        assert config == RunConfig(dataset=dataset, eps=0.2)

    @pytest.mark.parametrize(
        "values",
        [
            {"dataset": "npz"},
            {"dataset": "folder:."},
            {"dataset": "mnist", "norm": "l2"},
            {"dataset": "cifar10", "norm": "l2"},
        ],
    )
    def test_a_radius_that_no_preset_has_is_asked_for(self, values):
        with pytest.raises(UserError, match=r"no radius is known for sat-r2 on .*: give --eps"):
            runs.resolve(values)
        assert runs.resolve({**values, "eps": 0.25}).eps == 0.25

    @pytest.mark.parametrize(
        ("file", "values", "said"),
        [
            ({"dataset": "mnist"}, {"norm": "l2"}, "for mnist in linf, .* about mnist in l2: give"),
            ({"norm": "l2"}, {"norm": "linf"}, "in l2, .* in linf: give --eps, too$"),
            ({"dataset": "mnist"}, {"dataset": "cifar10"}, "for mnist .* about cifar10 in linf"),
            ({"dataset": "npz:a"}, {"dataset": "npz:b", "norm": "linf"}, None),
            ({"dataset": "cifar10"}, {"dataset": "cifar100"}, None),
            ({}, {"dataset": "cifar10"}, None),
        ],
    )
    def test_a_files_radius_is_for_its_norm_and_data(self, file, values, said):
        file = {"eps": "8/255", **file}
        if said:
            with pytest.raises(UserError, match=f"the file's eps 0.0313725 is .*{said}"):
                runs.resolve(values, "none", file)
        else:
            assert runs.resolve(values, "none", file).eps == 8 / 255
        assert runs.resolve({**values, "eps": 0.5}, "none", file).eps == 0.5

    @pytest.mark.parametrize("values", [{"dataset": "npz:no.npz"}, {"dataset": "folder:no.npz"}])
    def test_a_place_that_is_not_there_is_told_before_the_radius(self, values):
        with pytest.raises(UserError, match=r"^no\.npz does not exist: give .* --data$"):
            runs.resolve(values)

    def test_cifar100_is_trained_as_cifar10(self):
        found, expected = (runs.resolve({"dataset": name}) for name in ("cifar100", "cifar10"))
        assert found == expected.model_copy(update={"dataset": "cifar100"})

    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    def test_a_data_set_with_its_place_keeps_the_preset(self, name):
        found = runs.resolve({"dataset": f"{name}:somewhere"})
        expected = runs.resolve({"dataset": name})
        assert found == expected.model_copy(update={"dataset": f"{name}:somewhere"})

    def test_an_explicit_preset_wins_over_the_data_set(self):
        assert runs.resolve({"dataset": "npz"}, "mnist").dataset == "npz"
        assert runs.resolve({"dataset": "npz"}, "mnist").schedule == "step"

    @pytest.mark.parametrize(
        ("name", "value"),
        [("eps", 0.1), ("epochs", 3), ("model", "cnn-small"), ("lr", 0.7), ("normalize", False)],
    )
    def test_what_is_given_wins(self, name, value):
        assert getattr(runs.resolve({name: value}, "mnist"), name) == value

    @pytest.mark.parametrize(
        ("file", "given", "found"),
        [
            (None, {}, True),
            (None, {"normalize": False}, False),
            ({"weights": "pretrained", "normalize": False}, None, False),
            ({"weights": None, "normalize": False}, {}, True),  # a preset's choice for raw pixels
        ],
    )
    def test_pretrained_weights_turn_normalisation_on(self, file, given, found):
        assert not methods.preset("sat-r2", "cifar10").normalize
        values = {"weights": "pretrained", **given} if given is not None else {}
        assert runs.resolve(values, "cifar10", file).normalize is found

    def test_params_are_merged_one_by_one(self):
        config = runs.resolve({"method": "sat-r3", "params": {"tau": 0.6}}, "mnist")
        assert config.params == {"lam": 1.0, "tau": 0.6, "alpha": 0.01, "eps_low": 0.1}
        assert runs.resolve({"params": None}, "mnist") == runs.resolve({}, "mnist")

    def test_an_optimizer_and_its_learning_rate_may_come_from_two_places(self):
        rate = {"lr": 1e-3}
        assert runs.resolve(rate, "mnist", {"optimizer": "adam"}).optimizer == "adam"
        assert runs.resolve({}, "mnist", {"optimizer": "adam", **rate}).lr == 1e-3
        adamw = {"method": "rs-fgsm", "optimizer": "adamw"}
        assert runs.resolve(adamw, "mnist").lr == 0.005
        with pytest.raises(UserError, match="optimizer adam needs"):
            runs.resolve({"optimizer": "adam"}, "mnist", rate)

    def test_the_end_of_a_presets_name_is_enough(self):
        assert runs.resolve({}, "speed") == runs.resolve({}, "mnist-speed")
        cifar = runs.resolve({"dataset": "cifar10"}, "speed")
        assert cifar == runs.resolve({"dataset": "cifar10"}, "cifar10-speed")

    def test_ratios(self):
        config = runs.resolve({"eps": "8/255", "params": {"alpha": "2 / 255"}}, "none")
        assert (config.eps, config.params["alpha"]) == (8 / 255, 2 / 255)

    @pytest.mark.parametrize(
        ("values", "preset", "said"),
        [
            ({"method": "sat-r9"}, None, "did you mean 'sat-r3'"),
            ({"method": "sat-r9"}, "none", "did you mean 'sat-r3'"),
            ({"method": "fgsm-pgi"}, None, "did you mean 'fgsm-mep'"),
            ({}, "mnsit", "did you mean 'mnist'"),
            ({"epoch": 3}, "none", "did you mean 'epochs'"),
            ({"epoch": 3}, "mnist", "did you mean 'epochs'"),
            ({"eps": "8/0"}, None, "ratio such as 8/255"),
            ({"optimizer": "adam"}, "mnist", "optimizer adam needs .* meant for sgd"),
            (
                {"method": "rs-fgsm", "optimizer": "sgd"},
                "mnist",
                "optimizer sgd needs .* meant for adam",
            ),
        ],
    )
    def test_a_mistake(self, values, preset, said):
        with pytest.raises(UserError, match=said):
            runs.resolve(values, preset)


class TestParts:
    @pytest.mark.parametrize(("norm", "kind"), [("linf", surestep.Linf), ("l2", surestep.L2)])
    def test_threat(self, norm, kind):
        assert runs.build_threat(RunConfig(norm=norm, eps=0.5)) == kind(0.5)

    def test_method(self):
        config = RunConfig(method="sat-r3", params={"tau": 0.6}, eps=0.12, label_smoothing=0.1)
        method = runs.build_method(config)
        assert isinstance(method, methods.SATR3)
        assert (method.tau, method.label_smoothing) == (0.6, 0.1)
        assert method.eps_low == pytest.approx(0.04)
        assert method.threat == surestep.Linf(0.12)

    @pytest.mark.parametrize(
        ("settings", "passes"),
        [
            ({"method": "standard"}, 3),
            ({"method": "fgsm"}, 5),
            ({"method": "free", "params": {"replays": 4}}, 3),
            ({"method": "fgsm", "awp": 0.01}, 8),
            ({"method": "trades", "params": {"steps": 1}, "awp": 0.01}, 15),
            # In the last of four epochs.
            ({"method": "fgsm", "awp": 0.01, "epochs": 4, "awp_from": 3}, 5.75),
            ({"method": "fgsm", "awp": 0.01, "epochs": 4, "awp_from": 5}, 5),
        ],
    )
    def test_passes(self, settings, passes):
        assert runs.passes_of(runs.resolve(settings, "none")) == passes

    @pytest.mark.parametrize(("split", "n"), [("train", 24), ("validation", 3), ("test", 3)])
    def test_data(self, tmp_path, split, n):
        x = np.zeros((30, 8, 8, 3), np.uint8)
        np.savez(tmp_path / "a.npz", x=x, y=np.arange(30) % 4)
        for config in (
            RunConfig(dataset="npz", data=str(tmp_path / "a.npz")),
            RunConfig(dataset=f"npz:{tmp_path / 'a.npz'}"),
        ):
            images = runs.load_data(config, split)
            assert (len(images), images.image_shape, images.num_classes) == (n, (3, 8, 8), 4)

    @pytest.mark.parametrize(
        ("model", "shape"),
        [("cnn-small", (1, 28, 28)), ("cnn-small", (3, 16, 16)), ("lenet+", (2, 8, 8))],
    )
    def test_a_model_fits_its_data(self, model, shape):
        images = data.as_images((torch.zeros(2, *shape), torch.tensor([0, 6])))
        net = runs.build_model(RunConfig(model=model), images)
        assert net(images.x).shape == (2, 7)

    def test_normalisation(self):
        images = data.as_images((torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])))
        name = "preactresnet10-slim"
        assert runs.build_model(RunConfig(model=name), images).normalize is not None
        assert runs.build_model(RunConfig(model=name, normalize=False), images).normalize is None

    def test_weights_follow_the_seed(self):
        images = data.as_images((torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])))

        def weights(seed):
            return runs.build_model(RunConfig(model="cnn-small", seed=seed), images).head.weight

        assert torch.equal(weights(3), weights(3))
        assert not torch.equal(weights(3), weights(4))

    def test_features_are_no_images(self):
        images = data.as_images((torch.zeros(2, 8), torch.tensor([0, 1])), name="mine")
        with pytest.raises(UserError, match=r"mine has samples of shape \(8,\).*surestep\.fit"):
            runs.build_model(RunConfig(), images)


@pytest.fixture
def short(tmp_path):
    """Settings of a run of a second, on an archive of sixty images."""
    x = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(60) % 3)
    values = {"dataset": "npz", "data": str(tmp_path / "a.npz"), "model": "cnn-small"}
    return {**values, "eps": 0.3, "epochs": 1, "batch_size": 16}


class TestFolders:
    @pytest.fixture
    def config(self, short):
        values = {**short, "val_attacks": ["fgsm"], "method": "sat-r2"}
        return runs.resolve({**values, "engine": "reference"})

    def test_train_and_load(self, config, tmp_path):
        result = runs.train(config, tmp_path / "run", quiet=True)
        assert result.out == tmp_path / "run"
        state = torch.get_rng_state()
        run = runs.load(tmp_path / "run", "cpu")
        assert torch.equal(torch.get_rng_state(), state)
        assert run.folder == tmp_path / "run"
        assert run.threat == surestep.Linf(0.3)
        assert not run.model.training
        # All of the method's parameters are written out, the defaults as well.
        params = {"lam": 5.0, "alpha": 0.01, "project": False, "fraction": 1.0}
        params |= {"every": 1, "perturbation": "fgsm"}
        # And the precision, which another engine would choose by the machine.
        parts = {"label_smoothing": 0.0, "dropout": 0.0}
        written = {"params": params, "precision": "fp32", **parts}
        assert run.config == config.model_copy(update=written)
        expected = result.model.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in run.model.state_dict().items())

    def test_eat_attacks_other_runs(self, config, tmp_path, monkeypatch):
        runs.train(config, tmp_path / "source", quiet=True)
        values = {"method": "eat", "sources": [str(tmp_path / "source")], "params": {}}
        eat = runs.resolve({**config.model_dump(), **values}, "none")
        attacked, craft = [], methods.get("eat").craft

        def noted(self, *batch):
            attacked.extend(self.sources)
            return craft(self, *batch)

        monkeypatch.setattr(methods.get("eat"), "craft", noted)
        runs.train(eat, tmp_path / "run", quiet=True)
        kept = runs.load(tmp_path / "source", "cpu").model.state_dict()
        assert all(torch.equal(v, kept[k]) for k, v in attacked[0].state_dict().items())
        assert not attacked[0].training
        assert runs.load(tmp_path / "run", "cpu").config.sources == (str(tmp_path / "source"),)

    def test_eat_without_other_runs_says_so(self, config):
        eat = runs.resolve({**config.model_dump(), "method": "eat", "params": {}}, "none")
        with pytest.warns(UserWarning, match="eat has no sources, so the model attacks itself"):
            runs.train(eat, None, quiet=True)

    def test_eat_attacks_no_run_of_other_classes(self, config, tmp_path):
        x, y = np.load(tmp_path / "a.npz").values()
        np.savez(tmp_path / "four.npz", x=x, y=y + (np.arange(60) > 40))
        four = {"data": str(tmp_path / "four.npz"), "val_images": 0}
        runs.train(config.model_copy(update=four), tmp_path / "source", quiet=True)
        values = {"method": "eat", "sources": [str(tmp_path / "source")], "params": {}}
        eat = runs.resolve({**config.model_dump(), **values}, "none")
        with pytest.raises(UserError, match=r"source has 4 classes, .* 3: give runs of the same"):
            runs.train(eat, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()

    def test_other_methods_attack_no_other_models(self, config):
        with pytest.raises(UserError, match="sat-r2 attacks no other models"):
            runs.build_method(config.model_copy(update={"sources": ("runs/one",)}))

    def test_without_validation_and_without_a_folder(self, config, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.rglob("*"))
        result = runs.train(config.model_copy(update={"val_images": 0}), None, quiet=True)
        assert "val_n" not in result.history[0]
        assert result.out is None
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_run_with_a_model_of_ones_own_is_refused(self, tmp_path):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        method = methods.SATR2(surestep.Linf(0.1))
        own = (torch.rand(40, 1, 4, 4), torch.arange(40) % 3)
        out = tmp_path / "own"
        settings = {"epochs": 1, "batch_size": 8, "val_images": 0}
        surestep.fit(net, own, method, out=out, quiet=True, **settings)
        for read in (runs.read_config, runs.load):
            with pytest.raises(UserError, match=r"own was trained from Python .*surestep\.fit\("):
                read(out)

    def test_it_is_loaded_without_its_data(self, config, tmp_path):
        result = runs.train(config, tmp_path / "run", quiet=True)
        (tmp_path / "a.npz").unlink()
        run = surestep.load(tmp_path / "run", "cpu")
        assert isinstance(run, surestep.Run)
        x = torch.rand(4, *read_signature(run.weights).shape)
        assert torch.equal(run.model(x), result.model.eval()(x))

    @pytest.mark.parametrize(
        ("engine", "flatten", "last"),
        [
            ("fast", "x.flatten(1)", True),
            ("fast", "x.view(len(x), -1)", False),
            ("reference", "x.flatten(1)", False),
        ],
    )
    def test_its_model_is_laid_out_as_the_engine_trained_it(
        self, config, tmp_path, engine, flatten, last
    ):
        source = f"""
            import torch

            class Net(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.first, self.second = torch.nn.Conv2d(1, 3, 3), torch.nn.Conv2d(3, 2, 3)
                    self.head = torch.nn.Linear(32, 3)

                def forward(self, x):
                    x = self.second(self.first(x).relu())
                    return self.head({flatten})

        """
        (tmp_path / "net.py").write_text(textwrap.dedent(source))
        values = {"model": f"{tmp_path / 'net.py'}:Net", "engine": engine}
        runs.train(config.model_copy(update=values), tmp_path / "run", quiet=True)
        weight = runs.load(tmp_path / "run", "cpu").model.second.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is last
        assert weight.is_contiguous() is not last

    def test_an_explicit_zero_counts(self, config, tmp_path):
        """Of a part that the method brings along."""
        values = {**config.model_dump(), "method": "sads", "params": {}}
        own = runs.resolve({**values, "dropout": None}, "none")
        assert runs.build_method(own).dropout == methods.get("sads")(surestep.Linf(0.3)).dropout > 0
        none = runs.resolve({**values, "dropout": 0}, "none")
        assert runs.build_method(none).dropout == 0
        runs.train(none, tmp_path / "run", quiet=True)
        assert runs.read_config(tmp_path / "run").dropout == 0
        fgsm = {**config.model_dump(), "method": "fgsm", "params": {}}
        runs.train(runs.resolve(fgsm, "none"), tmp_path / "fgsm", quiet=True)
        one, other = (tmp_path / name / "model.safetensors" for name in ("run", "fgsm"))
        assert one.read_bytes() == other.read_bytes()

    def test_no_run_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
            runs.load(tmp_path)


def test_a_hypersphere_head_has_its_scale_and_its_margin():
    """The margin is on the cosine: on the logits it is scale times as wide."""
    values = {"method": "alp", "eps": 0.1, "head": "hypersphere", "head_scale": 20.0}
    config = runs.resolve({**values, "head_margin": 0.3, "model": "cnn-small"})
    assert runs.build_method(config).margin == pytest.approx(6.0)
    images = surestep.data.load("mnist", "test").first(4)
    model = runs.build_model(config, images)
    (head,) = [m for m in model.modules() if isinstance(m, HypersphereHead)]
    assert head.scale == 20.0
    logits = model.eval()(images.pixels()).detach()
    assert 1 < float(logits.abs().max()) <= 20.0
    plain = config.model_copy(update={"head": "linear"})
    assert runs.build_method(plain).margin == 0


class TestWeightsToBeginWith:
    @pytest.fixture
    def values(self, short):
        return {**short, "val_images": 0}

    @pytest.mark.parametrize("kind", ["safetensors", "state_dict"])
    def test_of_a_file(self, values, tmp_path, kind):
        first, second = tmp_path / "first", tmp_path / "second"
        runs.train(runs.resolve({"method": "fgsm", "seed": 5, **values}), first, quiet=True)
        before = runs.load(first, "cpu").model.state_dict()
        file = first / "model.safetensors"
        if kind == "state_dict":
            file = tmp_path / "w.pt"
            torch.save(before, file)
        values |= {"method": "sat-r2", "seed": 9, "lr": 1e-12, "weights": str(file)}
        runs.train(runs.resolve(values), second, quiet=True)
        after = runs.load(second, "cpu").model.state_dict()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
        file.unlink()  # the run has weights of its own by now
        runs.train(runs.resolve(values), second, resume=True, quiet=True)

    def test_a_run_stopped_before_its_first_checkpoint_begins_with_them_again(
        self, values, tmp_path, monkeypatch
    ):
        file = tmp_path / "w.safetensors"
        given = runs.resolve({"method": "fgsm", **values})
        model = runs.build_model(given, runs.load_data(given, "test", 1))
        with torch.no_grad():
            next(model.parameters()).fill_(0.125)
        save_weights(file, model)
        config = runs.resolve({"method": "fgsm", "lr": 1e-12, "weights": str(file), **values})
        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "__call__", lambda *_: {}["a crash"])
            with pytest.raises(KeyError):
                runs.train(config, tmp_path / "run", quiet=True)
        runs.train(config, tmp_path / "run", resume=True, quiet=True)
        after = runs.load(tmp_path / "run", "cpu").model.state_dict()
        for name, value in model.named_parameters():
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)

    def test_of_a_model_with_either_head(self, values, tmp_path):
        given = runs.resolve({"method": "fgsm", "head": "hypersphere", **values})
        images = runs.load_data(given, "test", 1)
        for head in ("hypersphere", "linear"):
            old = runs.build_model(given.model_copy(update={"head": head, "seed": 7}), images)
            save_weights(tmp_path / f"{head}.safetensors", old)
            named = given.model_copy(update={"weights": str(tmp_path / f"{head}.safetensors")})
            new = runs.build_model(named, images, begin=True)
            assert isinstance(new.head, HypersphereHead)
            after = new.state_dict()
            for name, value in old.state_dict().items():
                if head == "hypersphere" or not name.startswith("head."):
                    assert torch.equal(after[name], value)

    def test_what_cannot_be_taken(self, values, tmp_path):
        values |= {"method": "fgsm"}
        runs.train(runs.resolve(values), tmp_path / "first", quiet=True)
        weights = str(tmp_path / "first" / "model.safetensors")
        for model, given, said in (
            ("preactresnet10-slim", weights, "model.safetensors"),
            ("cnn-small", "pretrained", "only timm:NAME has"),
            ("cnn-small", "gone.pt", "gone.pt does not exist"),
        ):
            config = runs.resolve({**values, "model": model, "weights": given})
            with pytest.raises(UserError, match=said):
                runs.train(config, tmp_path / "second", quiet=True)
        assert not (tmp_path / "second").exists()


def test_weights_are_chosen_on_validation_images_alone(monkeypatch, tmp_path):
    """Neither training nor the search for a threshold may see a test image."""
    asked, judged = [], []
    digits = {
        split: data.load("mnist", split).first(60) for split in ("train", "validation", "test")
    }

    def load(dataset, split, *, n=None, **_):
        asked.append((split, n))
        return digits[split]

    monkeypatch.setattr(data, "load", load)
    settings = {"method": "fgsm", "model": "cnn-small", "epochs": 1, "val_attacks": ("fgsm",)}
    config = runs.resolve(settings, "none")
    runs.train(config, tmp_path / "run", quiet=True)
    # Only what is judged is decoded.
    assert asked == [("train", None), ("validation", config.val_images)]

    def harden(model, train, validation, *args, **kwargs):
        judged.append((train, validation))
        sparse = posthoc.insert(copy.deepcopy(model), train.pixels(slice(0, 1)), 0.1)
        return posthoc.Hardened(sparse, 0.1, [])

    def evaluate(model, images, threat, attacks, *, sources, **_):
        sparse = bool(layers(model))
        assert [bool(layers(source)) for source in sources] == [False]  # the run as it was
        assert images is digits["test"]
        right = torch.tensor([True, True, True, False] if sparse else [False, True, False, True])
        return SimpleNamespace(right={"worst case": right}, to_dict=lambda: {"sparse": sparse})

    monkeypatch.setattr(posthoc, "harden", harden)
    monkeypatch.setattr("surestep.runs._harden.evaluate", evaluate)
    asked.clear()
    found = runs.harden(tmp_path / "run", tmp_path / "hard", attacks=["fgsm"], n=4, n_search=5)
    ((train, validation),) = judged
    assert train is digits["train"]
    assert validation is digits["validation"]
    assert asked == [("test", 4), ("train", None), ("validation", 5)]
    assert (found["before"], found["after"]) == ({"sparse": False}, {"sparse": True})
    assert (found["saved"], found["lost"]) == (2, 1)


@pytest.fixture
def run_of_nothing(monkeypatch, tmp_path):
    """A run whose hardening costs nothing."""
    judged = SimpleNamespace(right={"worst case": torch.ones(3, dtype=torch.bool)}, to_dict=dict)
    run = runs.Run(RunConfig(), torch.nn.Identity(), surestep.Linf(0.3), tmp_path / "run")
    monkeypatch.setattr("surestep.runs._harden.load", lambda *_: run)
    images = data.Images(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), ("cat", "dog"))
    monkeypatch.setattr(data, "load", lambda *_, **__: images)
    monkeypatch.setattr("surestep.runs._harden.evaluate", lambda *_, **__: judged)
    found = posthoc.Hardened(run.model, 0.1, [])
    monkeypatch.setattr(posthoc, "harden", lambda *_, **__: found)
    for room in ("_load", "_harden"):
        monkeypatch.setattr(f"surestep.runs.{room}.read_signature", lambda _: Signature())
    return run


def test_a_full_disk_leaves_no_hardened_run_without_weights(run_of_nothing, monkeypatch, tmp_path):
    def full(*_):
        raise UserError("no space left")

    out = tmp_path / "hard"
    runs.harden(run_of_nothing.folder, out)
    assert {path.name for path in out.iterdir()} == {"config.yaml", "model.safetensors"}
    monkeypatch.setattr("surestep.runs._harden.save_weights", full)
    with pytest.raises(UserError, match="no space left"):
        runs.harden(run_of_nothing.folder, tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_run_is_hardened_on_labels_in_its_class_order(run_of_nothing, monkeypatch, tmp_path):
    labels, told = [], []

    def harden(model, train, validation, *_, **__):
        labels.append(validation.y.tolist())
        return posthoc.Hardened(model, 0.1, [])

    def evaluate(model, images, *_, **__):
        labels.append(images.y.tolist())
        right = {"worst case": torch.ones(2, dtype=torch.bool)}
        return SimpleNamespace(right=right, to_dict=dict)

    monkeypatch.setattr(posthoc, "harden", harden)
    monkeypatch.setattr("surestep.runs._harden.evaluate", evaluate)
    monkeypatch.setattr("surestep.runs._load.read_signature", lambda _: Signature(("dog", "cat")))
    folder = run_of_nothing.folder
    runs.harden(folder, tmp_path / "hard", tell=told.append)
    assert labels == [[1, 0]] * 3
    for part in ("test", "validation"):
        said = f"the {part} labels are renumbered to the class order of {folder}, by class name"
        assert said in told


def test_a_hardened_runs_settings_train_nothing(tmp_path):
    """Its layers would have no statistics, and the run could not be resumed."""
    said = r"mean_sparse 0\.2 belongs to a run hardened after training"
    with pytest.raises(UserError, match=said):
        runs.train(RunConfig(mean_sparse=0.2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class TestPlaces:
    """config.yaml must say the same from any folder."""

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"data": "d"}, {"data": "{here}/d"}),
            ({"data": "~/d"}, {"data": "{home}/d"}),
            ({"dataset": "npz:a/b.npz"}, {"dataset": "npz:{here}/a/b.npz"}),
            ({"dataset": "folder:../x"}, {"dataset": "folder:{above}/x"}),
            ({"dataset": "hf:owner/name"}, {"dataset": "hf:owner/name"}),
            ({"dataset": "hf", "data": "owner/name"}, {"data": "owner/name"}),
            ({"weights": "w.pt"}, {"weights": "{here}/w.pt"}),
            ({"weights": "pretrained"}, {"weights": "pretrained"}),
            ({"sources": ("r/one", "/two")}, {"sources": ("{here}/r/one", "/two")}),
            ({"model": "net.py:make"}, {"model": "{here}/net.py:make"}),
            ({"model": "lenet+"}, {"model": "lenet+"}),
        ],
    )
    def test_what_is_a_place(self, tmp_path, monkeypatch, settings, expected):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/me")
        known = {"here": tmp_path, "above": tmp_path.parent, "home": "/home/me"}

        def told(value):
            if isinstance(value, tuple):
                return tuple(v.format(**known) for v in value)
            return value.format(**known)

        config = RunConfig(**settings)
        found = runs.from_anywhere(config)
        assert found == config.model_copy(update={k: told(v) for k, v in expected.items()})
        assert runs.from_anywhere(found) == found

    def test_a_run_goes_on_with_what_it_was_begun_with(self, short, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("surestep.runs._train.fit", lambda *_, describe, **__: describe)
        config = runs.resolve({**short, "data": "a.npz", "val_images": 0, "method": "fgsm"})
        begun = runs.train(config, "run")
        assert begun["data"] == str(tmp_path / "a.npz")
        run = RunFolder(tmp_path / "run")
        run.make(begun)
        again = runs.train(config, "run", resume=True)
        run.check_same(again)
        # Another machine, with less memory.
        run.check_same({**again, "device": "cuda:1", "max_memory": 8.0, "checkpoint_every": 9})
        assert again["data"] == begun["data"]


class TestHeads:
    @pytest.mark.parametrize("name", ["head_scale", "head_margin"])
    def test_what_only_another_head_has(self, name):
        said = (
            rf"{name} 1 applies only to a hypersphere head, but head is linear: "
            "give --head hypersphere"
        )
        with pytest.raises(UserError, match=said):
            runs.resolve({name: 1})
        with pytest.raises(UserError, match=said):
            runs.resolve({"head": "linear", name: 1})
        assert getattr(runs.resolve({"head": "hypersphere", name: 1}), name) == 1

    def test_defaults_may_be_spelt_out(self):
        values = runs.resolve({}).model_dump()
        assert runs.resolve(values, "none") == runs.resolve({})
        # In files of runs that ignored it, anything.
        old = runs.resolve({"lr": 0.1}, "none", {**values, "head_scale": 1.0})
        assert old.head_scale == 1


class TestFiles:
    def test_lengths_of_each_layer_are_of_its_own_radius(self):
        """rs-fgsm's preset has a step of 1.25 eps."""
        file = {"method": "rs-fgsm", "dataset": "cifar10", "eps": "4/255"}
        found = runs.resolve({"eps": "16/255"}, "cifar10", {**file, "params": {"alpha": 0.01}})
        assert found.params == {"alpha": pytest.approx(0.04)}
        found = runs.resolve({"eps": "16/255"}, "cifar10", file)
        assert found.params == {"alpha": pytest.approx(20 / 255)}

    def test_what_is_no_number_is_left_to_the_method(self):
        file = {"method": "rs-fgsm", "eps": 0.2, "params": {"alpha": "much"}}
        assert runs.resolve({"eps": 0.1}, "none", file).params == {"alpha": "much"}

    @pytest.mark.parametrize("radius", [{}, {"eps": 0}])
    def test_lengths_of_no_radius_stay(self, radius):
        file = {"method": "rs-fgsm", "params": {"alpha": 0.01}, **radius}
        assert runs.resolve({"eps": "8/255"}, "none", file).params == {"alpha": 0.01}


@pytest.mark.parametrize("read", ["weights", "sources"])
def test_what_a_run_reads_is_not_replaced_by_it(tmp_path, read):
    """--overwrite would empty the folder first."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("method: eat\n")
    value = str(out / "model.safetensors") if read == "weights" else (str(out),)
    config = RunConfig(method="eat", **{read: value})
    with pytest.raises(UserError, match=f"is read from {out}, which is to be replaced"):
        runs.train(config, out, overwrite=True)
    assert (out / "config.yaml").is_file()
