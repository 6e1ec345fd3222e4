from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from surestep.config import FitSettings, RunConfig, parse, read_yaml, to_yaml
from surestep.errors import UserError


def run(**values: Any) -> RunConfig:
    return parse(RunConfig, values)


@pytest.mark.parametrize(
    ("written", "eps"),
    [
        ("8/255", 8 / 255),
        (" 8 / 255 ", 8 / 255),
        ("0/255", 0.0),
        ("0.3", 0.3),
        ("3e-2", 0.03),
        (0.3, 0.3),
        (1, 1.0),
    ],
)
def test_eps(written, eps):
    assert run(eps=written).eps == eps


@pytest.mark.parametrize(
    "written", ["8 255", "eight", "8/0", "8/255/2", "-8/255", -0.1, "nan", "inf", None, [1], "/"]
)
def test_what_is_no_eps(written):
    with pytest.raises(UserError, match=r"^eps .* is invalid: ") as caught:
        run(eps=written)
    assert "\n" not in str(caught.value)
    assert repr(written) in str(caught.value)


@pytest.mark.parametrize(
    ("cls", "name", "nearest"),
    [
        (RunConfig, "epoch", "epochs"),
        (RunConfig, "batchsize", "batch_size"),
        (RunConfig, "dataet", "dataset"),
        (RunConfig, "esp", "eps"),
        (FitSettings, "weight-decay", "weight_decay"),
        (FitSettings, "LR", None),
    ],
)
def test_an_unknown_name(cls, name, nearest):
    with pytest.raises(UserError, match=f"run.yaml: unknown setting '{name}': ") as caught:
        parse(cls, {name: 1}, "run.yaml: ")
    assert (f"did you mean '{nearest}'?" in str(caught.value)) is (nearest is not None)


def test_fit_settings_have_no_dataset():
    with pytest.raises(UserError, match="unknown setting 'eps'"):
        parse(FitSettings, {"eps": 0.3})


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("epochs", 0, "greater than 0"),
        ("epochs", "many", "valid integer"),
        ("epochs", None, "valid integer"),
        ("batch_size", -1, "greater than or equal to 1"),
        ("lr", 0, "greater than 0"),
        ("lr", float("nan"), "finite"),
        ("lr", [0.1, 0.2], "valid number"),
        ("momentum", 1, "less than 1"),
        ("weight_decay", -1e-4, "greater than or equal to 0"),
        ("label_smoothing", 1.0, "less than 1"),
        ("ema", 1.0, "less than 1"),
        ("ema", 0, "greater than 0"),
        ("clip_grad", 0, "greater than 0"),
        ("eps_warmup", -0.5, "greater than or equal to 0"),
        ("warmup", -1, "greater than or equal to 0"),
        ("seed", -1, "greater than or equal to 0"),
        ("val_images", -1, "greater than or equal to 0"),
        ("checkpoint_every", 0, "greater than or equal to 1"),
        ("optimizer", "sdg", "'sgd', 'adam' or 'adamw'"),
        ("schedule", "linear", "'step', 'onecycle'"),
        ("engine", "quick", "'auto', 'fast' or 'reference'"),
        ("precision", "float32", "'bf16'"),
        ("augment", "flip", "'none' or 'crop-flip'"),
        ("select", "first", "'best' or 'last'"),
        ("norm", "l1", "'linf' or 'l2'"),
        ("val_attacks", "fgsm", "a list such as [fgsm, pgd-20]"),
        ("sources", "runs/one", "a list such as [runs/one, runs/two]"),
        ("val_attacks", ["fgsm", 3], "valid string"),
        ("method", 3, "valid string"),
        ("image_size", 0, "greater than or equal to 1"),
        ("params", [1], "valid dictionary"),
        ("tensorboard", "maybe", "valid boolean"),
    ],
)
def test_a_value_that_is_wrong_is_named_in_one_line(name, value, why):
    with pytest.raises(UserError) as caught:
        parse(RunConfig, {name: value}, "run.yaml: ")
    message = str(caught.value)
    assert message.startswith(f"run.yaml: {name} {value!r} is invalid: ")
    assert why in message
    assert "\n" not in message


def test_a_list_without_examples_is_named_like_the_others():
    class More(FitSettings):
        tags: tuple[str, ...] = ()

    with pytest.raises(UserError, match=r"^tags 'a' is invalid: expected a list such as \[one, "):
        parse(More, {"tags": "a"})


def test_the_first_of_several_errors_is_said():
    with pytest.raises(UserError, match=r"^epochs 0 is invalid"):
        run(epochs=0, lr=-1, norm="l1")


class TestParams:
    @pytest.mark.parametrize(
        ("written", "value"),
        [
            (1, 1),
            (1.0, 1.0),
            (0.5, 0.5),
            ("8/255", 8 / 255),
            ("1e-3", 1e-3),
            (True, True),
            ("true", True),
            ("false", False),
            ("none", None),
            ("None", None),
            ("TRUE", True),
            ("010", 10),
            ("on", "on"),
            ("n-fgsm noise=1/2", "n-fgsm noise=1/2"),
        ],
    )
    def test_values_keep_their_type(self, written, value):
        got = run(params={"alpha": written}).params["alpha"]
        assert got == value
        assert type(got) is type(value)

    def test_none_is_the_default(self):
        assert run(params={"alpha": None}).params == {"alpha": None}

    @pytest.mark.parametrize("written", ["8 eights", "", "8/0", "1:30", [1], float("inf")])
    def test_what_is_no_value(self, written):
        with pytest.raises(UserError, match=r"^params\.alpha ") as caught:
            run(params={"alpha": written})
        assert repr(written) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_number_is_what_is_asked_for(self):
        with pytest.raises(UserError, match="number"):
            run(params={"lam": "8 eights"})

    @pytest.mark.parametrize("written", ["1", "0"])
    def test_a_number_in_quotes_is_a_number(self, written):
        assert type(run(params={"steps": written}).params["steps"]) is not bool


# PyYAML takes the controls of Unicode, such as U+0085, for line breaks.
TEXT = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=8)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "epochs": st.integers(1, 1000),
        "lr": st.floats(1e-8, 1e3),
        "ema": st.none() | st.floats(0.1, 0.9999),
        "optimizer": st.sampled_from(["sgd", "adam", "adamw"]),
        "val_attacks": st.lists(TEXT, max_size=3),
        "seed": st.integers(0, 2**32 - 1),
        "method": TEXT,
        "params": st.dictionaries(
            TEXT, st.booleans() | st.integers() | st.floats(-1e9, 1e9), max_size=3
        ),
        "data": st.none() | TEXT,
        "eps": st.floats(0, 10) | st.just("8/255"),
        "tensorboard": st.booleans(),
    },
)


@given(SETTINGS)
def test_yaml_round_trip(values):
    config = parse(RunConfig, values)
    written = to_yaml(config.model_dump(mode="json"))
    assert parse(RunConfig, yaml.safe_load(written)) == config


def test_yaml_keeps_the_order_and_reads_well(tmp_path):
    path = tmp_path / "größe.yaml"
    path.write_text(to_yaml({"method": "sat-r2", "data": "Bilder/größer", "eps": 0.1}), "utf-8")
    assert path.read_text("utf-8") == "method: sat-r2\ndata: Bilder/größer\neps: 0.1\n"
    assert list(read_yaml(path)) == ["method", "data", "eps"]


def test_a_file_written_by_hand(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: sat-r3\nparams: {tau: 0.6, alpha: 2/255}\neps: 8/255\nlr: 1e-1\n")
    config = parse(RunConfig, read_yaml(path))
    assert config.params == {"tau": 0.6, "alpha": 2 / 255}
    assert (config.eps, config.lr) == (8 / 255, 0.1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read .*No such file"),
        ("folder", "cannot read .*directory"),
        (b"", "holds no settings"),
        (b"- method\n", "holds no settings"),
        (b"sat-r2", "holds no settings"),
        (b"method: [1", "is not valid YAML"),
        (b"a: b: c", "is not valid YAML"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"x: !!python/object/apply:os.system ['exit 1']", "is not valid YAML"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, said):
    path = tmp_path / "run.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        run().epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("cls", [FitSettings, RunConfig])
def test_every_setting_is_described(cls):
    assert all(field.description for field in cls.model_fields.values())


def test_no_torch_is_imported():
    code = (
        "import sys, surestep.config, surestep.errors; "
        "print({'torch', 'numpy', 'accelerate'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_weights_are_selected_by_more_than_one_step():
    """A run that is selected by a weak attack selects what masks its gradients."""
    fields = FitSettings.model_fields
    assert fields["val_attacks"].default == ("fgsm", "pgd-20x2")
    assert fields["select"].default == "best"


def test_the_page_of_settings_is_up_to_date():
    script = Path(__file__).parents[1] / "docs" / "settings.py"
    page = script.with_name("settings.md").read_text("utf-8")
    assert page == runpy.run_path(str(script))["page"](), "run python docs/settings.py"
