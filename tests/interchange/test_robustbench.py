from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surestep import UserError, interchange
from surestep.interchange import ModelInfo, format_eps, parse_eps

PAPER = {
    "name": "Single-step Adversarial training with Regularization",
    "authors": "B. S. Vivek, R. Venkatesh Babu",
    "link": "https://arxiv.org/abs/2002.00614",
    "venue": "CVPR 2020",
    "architecture": "ResNet-18",
    "dataset": "cifar10",
}


def entry(evaluation: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return interchange.to_model_info(evaluation, **{**PAPER, **changes})


def refused(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Radii


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (4 / 255, "4/255"),
        (128 / 255, "128/255"),
        (0.3, "0.3"),
        (0.5, "0.5"),
        (0.031, "0.031"),
        (0.2, "0.2"),  # 51/255
        (1, "1.0"),  # 255/255
        (0, "0.0"),
        (1.5, "1.5"),
        (300 / 255, "300/255"),
        (0.03137255087494850158691, "8/255"),  # after float32
        (0.300000011920928955078125, "0.3"),
        (8.01 / 255, "0.03141176"),
    ],
)
def test_format_eps(eps: float, text: str) -> None:
    assert format_eps(eps) == text


@given(st.integers(1, 255).filter(lambda k: k % 51))
def test_every_grey_level_comes_back_to_the_bit(k: int) -> None:
    single = struct.unpack("f", struct.pack("f", k / 255))[0]
    assert format_eps(k / 255) == format_eps(single) == f"{k}/255"
    assert parse_eps(format_eps(single)) == k / 255


@given(st.floats(0, allow_nan=False, allow_infinity=False, exclude_min=False))
def test_every_radius_comes_back(eps: float) -> None:
    back = parse_eps(format_eps(eps))
    assert math.isclose(back, eps, rel_tol=1e-6, abs_tol=1e-320)
    assert parse_eps(format_eps(back)) == back


@pytest.mark.parametrize("eps", [-1, math.nan, math.inf, "8/255", True, None])
def test_format_eps_refuses(eps: Any) -> None:
    assert "is not a radius" in refused(format_eps, eps)


def test_parse_eps() -> None:
    assert parse_eps(" 8 / 255 ") == 8 / 255
    for text in ("", "8/0", "8/255/2", "-1", "nan", "inf", "1e999", "x", "8/", "0/-1x"):
        assert "is not a radius" in refused(parse_eps, text)


# Entries


def test_an_entry_has_exactly_robustbenchs_keys(evaluation: dict[str, Any]) -> None:
    info = entry(evaluation, additional_data=True, number_forward_passes=2, reported=0.5)
    assert info == {
        "link": PAPER["link"],
        "name": PAPER["name"],
        "authors": PAPER["authors"],
        "additional_data": True,
        "number_forward_passes": 2,
        "dataset": "cifar10",
        "venue": "CVPR 2020",
        "architecture": "ResNet-18",
        "eps": "8/255",
        "clean_acc": "82.36",
        "reported": "50.00",
        "autoattack_acc": "50.49",
    }
    assert [*entry(evaluation)] == [*info]
    assert entry(evaluation)["reported"] == ""


def test_what_was_selected_by_is_no_test(evaluation: dict[str, Any]) -> None:
    assert entry({**evaluation, "split": "test", "dataset": "cifar10"})
    said = refused(entry, {**evaluation, "split": "validation"})
    assert "is of validation images, by which training may have selected weights" in said


def test_the_data_set_is_the_one_that_was_judged_on(evaluation: dict[str, Any]) -> None:
    said = refused(entry, {**evaluation, "dataset": "cifar100:data"})
    assert "is of cifar100: give dataset='cifar100', not 'cifar10'" in said
    assert entry({**evaluation, "dataset": "folder:cifar10"})["dataset"] == "cifar10"


def test_only_autoattack_counts(evaluation: dict[str, Any]) -> None:
    del evaluation["robust_accuracy"]["autoattack"]
    message = refused(entry, evaluation)
    assert message.startswith("the evaluation has no attack 'autoattack', only fgsm, pgd-100")
    evaluation["robust_accuracy"]["autoattack"] = 0
    assert entry(evaluation)["autoattack_acc"] == "0.00"


def test_autoattack_through_layers_that_mask(evaluation: dict[str, Any]) -> None:
    evaluation["robust_accuracy"] |= {"autoattack": 0.6, "autoattack-bpda": 0.25}
    assert entry(evaluation)["autoattack_acc"] == "25.00"


def test_doubts_are_refused_or_told(evaluation: dict[str, Any]) -> None:
    doubtful = {**evaluation, "doubts": ["the model is random", "no gradient"]}
    message = refused(entry, doubtful)
    assert "may be too high (the model is random; no gradient)" in message
    assert "allow_doubts=True" in message
    told = {"footnote": "may be too high: the model is random; no gradient"}
    assert entry(doubtful, allow_doubts=True) == entry(evaluation) | told
    # Made with doubt=False.
    unseen = {k: v for k, v in evaluation.items() if k != "doubts"}
    assert "(no sign of masking was looked for)" in refused(entry, unseen)
    assert "was looked for" in entry(unseen, allow_doubts=True)["footnote"]
    # 0 cannot be too high.
    doubtful["robust_accuracy"] = {"autoattack": 0.0}
    assert "footnote" not in entry(doubtful)


def test_the_whole_test_set_counts(evaluation: dict[str, Any]) -> None:
    some = {**evaluation, "n": 1000}
    assert "has 1000 of the 10000 images of cifar10's test set" in refused(entry, some)
    assert entry(some, allow_subset=True)["clean_acc"] == "82.36"
    assert entry(some, test_set_size=1000)["clean_acc"] == "82.36"
    more = {**evaluation, "n": 60_000}
    for allow in (False, True):
        message = refused(entry, more, allow_subset=allow)
        assert "60000 images, cifar10's test set only 10000" in message
    assert entry({**evaluation, "n": 5000}, dataset="imagenet")["dataset"] == "imagenet"
    assert "give test_set_size" in refused(entry, evaluation, dataset="flowers")
    assert entry(evaluation, dataset="flowers", test_set_size=10_000)["dataset"] == "flowers"
    assert entry(evaluation, dataset="flowers", allow_subset=True)["dataset"] == "flowers"


def test_what_makes_no_entry(evaluation: dict[str, Any], audit: dict[str, Any]) -> None:
    scaled = {**evaluation, "threat": {"norm": "linf", "eps": 8.0, "bounds": [0.0, 255.0]}}
    assert "pixels are in [0, 255], RobustBench's in [0, 1]" in refused(entry, scaled)
    assert "give an evaluation" in refused(entry, audit)
    assert "$.n: 0 is less" in refused(entry, {**evaluation, "n": 0})
    for key, value in {
        "reported": 54.2,
        "additional_data": "no",
        "number_forward_passes": 0,
        "dataset": "../up",
    }.items():
        assert refused(entry, evaluation, **{key: value}).startswith(f"{key} {value!r}") or (
            refused(entry, evaluation, **{key: value}).startswith(f"{key} is {value!r}")
        )
    assert "reported" in refused(entry, evaluation, reported=True)
    assert "reported" in refused(entry, evaluation, reported=math.nan)


# Places


@pytest.mark.parametrize(
    ("parts", "path"),
    [
        (("cifar10", "linf", "Rice", 2020, "Overfitting"), "cifar10/Linf/Rice2020Overfitting"),
        (("cifar100", "L2", "rice", 2020, "overfitting"), "cifar100/L2/Rice2020Overfitting"),
        (
            ("cifar10", "Linf", "Moosavi-Dezfooli", 2019, "Robustness"),
            "cifar10/Linf/Moosavi-Dezfooli2019Robustness",
        ),
        (("mnist", "l2", "Muñoz", 2024, "Fixing_R18:"), "mnist/L2/Munoz2024Fixing_R18"),
        (("mnist", "l2", "de Jorge", 2022, "(Make"), "mnist/L2/DeJorge2022Make"),
    ],
)
def test_model_info_path(parts: Any, path: str) -> None:
    assert interchange.model_info_path(*parts) == Path(f"model_info/{path}.json")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("../x", "l2", "Rice", 2020, "A"), "dataset '../x' is not a folder name"),
        (("", "l2", "Rice", 2020, "A"), "dataset ''"),
        (("cifar10", "l1", "Rice", 2020, "A"), "unknown norm 'l1': did you mean 'l2'?"),
        (("cifar10", "l2", "Rice", 20, "A"), "year 20 is not a year"),
        (("cifar10", "l2", "../", 2020, "A"), "name '../' has no letter"),
        (("cifar10", "l2", "Rice", 2020, ""), "first_word '' has no letter"),
    ],
)
def test_model_info_path_refuses(parts: Any, message: str) -> None:
    assert refused(interchange.model_info_path, *parts).startswith(message)


# Round trip


def test_written_and_read_again(evaluation: dict[str, Any], tmp_path: Path) -> None:
    info = entry(evaluation, reported=0.4789, authors="Adrián Muñoz, B. S. Vivek")
    path = interchange.write_model_info(info, tmp_path, norm="linf")
    assert path == tmp_path / "model_info/cifar10/Linf/Munoz2020Single-step.json"
    assert json.loads(path.read_text("utf-8")) == info
    assert "Adrián Muñoz" in path.read_text("utf-8")
    assert interchange.read_model_info(path) == ModelInfo(
        link=PAPER["link"],
        name=PAPER["name"],
        authors="Adrián Muñoz, B. S. Vivek",
        additional_data=False,
        number_forward_passes=1,
        dataset="cifar10",
        venue="CVPR 2020",
        architecture="ResNet-18",
        eps=8 / 255,
        clean_accuracy=pytest.approx(0.8236, abs=1e-12),
        reported=pytest.approx(0.4789, abs=1e-12),
        autoattack_accuracy=pytest.approx(0.5049, abs=1e-12),
        norm="linf",
    )


@given(right=st.integers(0, 10_000), clean=st.integers(0, 10_000))
def test_accuracies_on_a_test_set_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, right: int, clean: int
) -> None:
    info = dict.fromkeys(interchange._robustbench.KEYS, "")
    info["clean_acc"] = interchange._robustbench._percent(clean / 10_000)
    info["autoattack_acc"] = interchange._robustbench._percent(right / 10_000)
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(info))
    found = interchange.read_model_info(path)
    assert found.clean_accuracy is not None
    assert found.autoattack_accuracy is not None
    assert round(found.clean_accuracy * 10_000, 6) == clean
    assert round(found.autoattack_accuracy * 10_000, 6) == right
    assert found.eps is None


def test_models_of_one_paper_do_not_meet(evaluation: dict[str, Any], tmp_path: Path) -> None:
    info = entry(evaluation)
    write = interchange.write_model_info
    first = write(info, tmp_path, norm="l2", year=2021)
    assert first.name == "Vivek2021Single-step.json"
    assert "exists: give a suffix" in refused(write, info, tmp_path, norm="l2", year=2021)
    assert write(info, tmp_path, norm="l2", year=2021, overwrite=True) == first
    second = write(info, tmp_path, norm="l2", suffix="SAT-R1")
    assert second.name == "Vivek2020Single-step_SAT-R1.json"
    assert interchange.read_model_info(second).norm == "l2"
    assert sorted(p.name for p in first.parent.iterdir()) == sorted([first.name, second.name])


def test_what_cannot_be_written(evaluation: dict[str, Any], tmp_path: Path) -> None:
    write, info = interchange.write_model_info, entry(evaluation)
    assert "give year" in refused(write, {**info, "venue": "N/A"}, tmp_path, norm="l2")
    two = {**info, "venue": "ICML 2020, JMLR 2021"}
    assert "give year" in refused(write, two, tmp_path, norm="l2")
    assert "has no letter" in refused(write, {**info, "authors": ""}, tmp_path, norm="l2")
    assert "has no letter" in refused(write, {**info, "name": " "}, tmp_path, norm="l2")
    assert "the entry: clean_acc is 'x'" in refused(
        write, {**info, "clean_acc": "x"}, tmp_path, norm="l2"
    )
    del info["eps"]
    assert refused(write, info, tmp_path, norm="l2") == "the entry lacks eps"
    (tmp_path / "file").write_text("")
    message = refused(write, entry(evaluation), tmp_path / "file", norm="l2")
    assert message.startswith("cannot make ")


# The variants of RobustBench's own files


def read(tmp_path: Path, **info: Any) -> ModelInfo:
    path = tmp_path / "entry.json"
    path.write_text(json.dumps(info))
    return interchange.read_model_info(path)


def test_an_entry_as_of_today(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        link="https://arxiv.org/abs/2110.12976",
        name=" Stable Neural ODE\n",
        additional_data=True,
        number_forward_passes=1,
        eps="8/255",
        clean_acc="93.73",
        reported="71.28",
        autoattack_acc="71.28",
        external="64.20",
        footnote="It is based on another model.",
        unreliable=True,
        modelzoo_id="Kang2021Stable",
    )
    assert found.name == "Stable Neural ODE"
    assert found.external == pytest.approx(0.642)
    assert found.unreliable is True
    assert found.footnote.startswith("It is")
    assert found.authors == ""
    assert found.norm is None


def test_percent_in_text_and_shares_in_numbers(tmp_path: Path) -> None:
    # An undefended model in text, and what benchmark(to_disk=True) writes.
    assert read(tmp_path, autoattack_acc="0.26").autoattack_accuracy == pytest.approx(0.0026)
    blank = dict.fromkeys(["link", "name", "authors", "venue", "architecture", "reported"])
    blank |= {"additional_data": None, "number_forward_passes": None}
    found = read(tmp_path, **blank, dataset="cifar10", eps=0.5, clean_acc=1.0, AA=0.25)
    assert (found.clean_accuracy, found.autoattack_accuracy, found.eps) == (1.0, 0.25, 0.5)
    assert found.additional_data is found.number_forward_passes is found.reported is None
    # One accuracy above 1 tells that all are in percent.
    found = read(tmp_path, clean_acc=93.79, autoattack_acc=0.26, eps=0.031, reported="15.5")
    assert found.clean_accuracy == pytest.approx(0.9379)
    assert found.autoattack_accuracy == pytest.approx(0.0026)
    assert found.reported == pytest.approx(0.155)
    assert found.eps == 0.031


def test_old_names(tmp_path: Path) -> None:
    found = read(tmp_path, AA="49.40", **{"AA+": "49.06"})
    assert found.autoattack_accuracy == pytest.approx(0.494)
    assert read(tmp_path, AA="49.40", autoattack_acc="40").autoattack_accuracy == 0.4


@pytest.mark.parametrize("absent", [None, "", " ", "N/A", "unaltered", "-", "None"])
def test_words_for_no_number(tmp_path: Path, absent: Any) -> None:
    keys = ["eps", "clean_acc", "reported", "autoattack_acc", "external", "unreliable"]
    keys += ["additional_data", "number_forward_passes"]
    nothing = read(tmp_path, **dict.fromkeys(keys, absent))
    assert nothing == read(tmp_path)
    assert nothing.clean_accuracy is nothing.eps is nothing.autoattack_accuracy is None


def test_other_spellings(tmp_path: Path) -> None:
    found = read(tmp_path, additional_data="True", number_forward_passes="2", clean_acc="85.34%")
    assert (found.additional_data, found.number_forward_passes) == (True, 2)
    assert found.clean_accuracy == pytest.approx(0.8534)
    assert read(tmp_path, additional_data=0).additional_data is False


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clean_acc", "85,34"),
        ("clean_acc", "101"),
        ("clean_acc", -0.5),
        ("autoattack_acc", True),
        ("autoattack_acc", ["50"]),
        ("reported", 10**400),
        ("eps", "eight"),
        ("eps", -1),
        ("eps", [8]),
        ("eps", True),
        ("name", 3),
        ("additional_data", "perhaps"),
        ("number_forward_passes", 0),
        ("number_forward_passes", 1.5),
        ("number_forward_passes", True),
        ("number_forward_passes", [1]),
    ],
)
def test_what_is_no_value_is_named(tmp_path: Path, key: str, value: Any) -> None:
    message = refused(read, tmp_path, **{key: value})
    assert f"entry.json: {key} is {value!r}"[:60] in message
    assert "expected" in message


def test_what_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "entry.json"
    assert "does not exist" in refused(interchange.read_model_info, path)
    path.write_text("[1]")
    assert "is not a RobustBench entry" in refused(interchange.read_model_info, path)
    path.write_text("{")
    assert "is not JSON" in refused(interchange.read_model_info, path)
