from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surestep
from surestep import UserError, interchange, verdicts

EXTRAS = {"run": "runs/one", "command": "surestep audit runs/one", "versions": {"torch": "2.13"}}


def line(document: Any) -> str:
    """Return the one line with which a document is refused."""
    with pytest.raises(UserError) as caught:
        interchange.validate(document)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def put(document: dict[str, Any], path: list[Any], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    at: Any = changed
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    return changed


@pytest.mark.parametrize("format", ["surestep-evaluation", "surestep-audit"])
def test_a_schema_is_a_schema_and_describes_each_key(format: str) -> None:
    schema = interchange.schema(format)
    jsonschema.Draft202012Validator.check_schema(schema)
    parts = [schema, *schema["$defs"].values()]
    for part in parts:
        for key, rule in part.get("properties", {}).items():
            assert "description" in rule or "$ref" in rule, key
        if "properties" in part:
            assert part["additionalProperties"] is False
    assert schema["properties"]["format"]["const"] == format


@pytest.mark.parametrize("kind", ["evaluation", "audit"])
def test_what_the_rooms_write_passes(kind: str, request: pytest.FixtureRequest) -> None:
    document = request.getfixturevalue(kind)
    interchange.validate(document)
    interchange.validate({**document, **EXTRAS})
    interchange.validate(json.loads(json.dumps(document)))


@pytest.mark.parametrize("kind", ["evaluation", "audit"])
def test_each_key_is_needed_and_no_other_is_known(
    kind: str, request: pytest.FixtureRequest
) -> None:
    document = request.getfixturevalue(kind)

    strict = {
        "evaluation": ["", "threat", "attacks", "per_class", "curve"],
        "audit": ["", "threat", "escalation", "checks"],
    }
    for name in strict[kind]:
        changed = copy.deepcopy(document)
        at = changed[name] if name else changed
        at = at[0] if isinstance(at, list) else at
        for key in list(at):
            kept = at.pop(key)
            if key == "doubts":  # nobody looked for any
                interchange.validate(changed)
            else:
                refused = line(changed)
                assert f"'{key}'" in refused
                assert "lacks" in refused or "is a required property" in refused
            at[f"{key}x"] = kept
            if key not in ("format", "version"):  # without these there is no schema to go by
                assert f"'{key}x' was unexpected" in line(changed)
            del at[f"{key}x"]
            at[key] = kept
        interchange.validate(changed)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["n"], 0, "$.n: 0 is less than"),
        (["n"], 1.5, "$.n: 1.5 is not of type 'integer'"),
        (["n"], True, "$.n: True is not of type 'integer'"),
        (["seconds"], -1, "$.seconds: -1 "),
        (["clean_accuracy"], 98.2, "$.clean_accuracy: 98.2 is greater than"),
        (["clean_accuracy"], "0.9", "$.clean_accuracy: '0.9' is not of type 'number'"),
        (["clean_accuracy"], float("nan"), "$.clean_accuracy: nan is not of type 'number'"),
        (["seconds"], float("inf"), "$.seconds: inf is not of type 'number'"),
        (["robust_accuracy", "pgd-100"], -0.5, "$.robust_accuracy"),
        (["intervals", "worst case"], [0.1], "$.intervals['worst case']: [0.1] "),
        (["intervals", "clean"], [0, 0, 1], "$.intervals.clean: [0, 0, 1] "),
        (["intervals"], {"clean": [0, 1]}, "$.intervals: 'worst case' is a required"),
        (["threat", "norm"], "Linf", "$.threat.norm: 'Linf' is not one of ['linf', 'l2']"),
        (["threat", "eps"], -1, "$.threat.eps: -1 "),
        (["attacks", 1, "by_step", 0], 2, "$.attacks[1].by_step[0]: 2 "),
        (["attacks", 1, "by_step"], "no", "$.attacks[1].by_step: 'no' "),
        (["attacks", 0, "scope"], "some", "$.attacks[0].scope: 'some' "),
        (["attacks", 0, "name"], "", "$.attacks[0].name: '' "),
        (["per_class", 0, "label"], -1, "$.per_class[0].label: -1 "),
        (["curve", 0, "n"], None, "$.curve[0].n: None "),
        (["versions"], {"torch": 2}, "$.versions.torch: 2 "),
        (["per_class"], None, "$.per_class: None "),
        (["threat"], [1] * 100, "$.threat: [1, 1, 1, 1, 1, 1,"),
    ],
)
def test_an_evaluation_is_refused_by_one_line(
    evaluation: dict[str, Any], path: list[Any], value: Any, message: str
) -> None:
    found = line(put(evaluation, path, value))
    assert found.startswith(message)
    assert len(found) <= 200


def test_a_long_value_hides_neither_the_place_nor_what_was_expected(
    evaluation: dict[str, Any],
) -> None:
    found = line(put(evaluation, ["threat"], list(range(1000))))
    assert found.startswith("$.threat: [0, 1, ")
    assert found.endswith(" is not of type 'object'")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["verdict"], "fine", "$.verdict: 'fine' is not one of ['robust', 'pseudo-robust', "),
        (["budget"], "huge", "$.budget: 'huge' is not one of ['quick', 'standard', 'thorough']"),
        (["checks"], [], "$.checks: [] "),
        (["checks", 0, "status"], "ok", "$.checks[0].status: 'ok' "),
        (["checks", 0, "value"], "1", "$.checks[0].value: '1' "),
        (
            ["checks", 0, "evidence", "by", "name", 0],
            float("nan"),
            "$.checks[0].evidence.by.name[0]: nan ",
        ),
        (["escalation", 0, "accuracy"], 2, "$.escalation[0].accuracy: 2 "),
        (["found_interval", 1], 1.1, "$.found_interval[1]: 1.1 "),
        (["claims", "a\nb"], 2, "$.claims['a b']: 2 "),
    ],
)
def test_an_audit_is_refused_by_one_line(
    audit: dict[str, Any], path: list[Any], value: Any, message: str
) -> None:
    assert line(put(audit, path, value)).startswith(message)


def test_the_outermost_mistake_is_told_first(evaluation: dict[str, Any]) -> None:
    del evaluation["attacks"][0]["name"]
    evaluation["sed"] = evaluation.pop("seed")
    assert line(evaluation).startswith("$: Additional properties are not allowed ('sed' ")


@pytest.mark.parametrize("version", [2, 0, "1", None, True, [1]])
def test_an_unknown_version_says_which_are_known(evaluation: dict[str, Any], version: Any) -> None:
    message = line({**evaluation, "version": version})
    assert message == f"unknown version {version!r} of surestep-evaluation: known are 1"


def test_formats(evaluation: dict[str, Any]) -> None:
    assert "did you mean 'surestep-evaluation'?" in line({**evaluation, "format": "evaluation"})
    assert line({**evaluation, "format": ["a"]}).startswith("format is ['a'], expected")
    assert line({"n": 3}).startswith("the document lacks 'format'")
    assert line({"format": "surestep-audit"}).startswith("the document lacks 'version'")
    assert line([1, 2]) == "the document is [1, 2], expected an object"


def test_tuples_count_as_lists(audit: dict[str, Any]) -> None:
    audit["checks"][0]["evidence"] = {"eps": (0.0, 0.1)}
    interchange.validate(audit)
    audit["checks"][0]["evidence"] = {"eps": (0.0, float("inf"))}
    assert "evidence.eps[1]: inf" in line(audit)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=60)
@given(document=JSON, key=st.sampled_from(["format", "version", "threat", "checks", "n"]))
def test_nothing_but_one_line_ever(document: Any, key: str) -> None:
    head = {"format": "surestep-audit", "version": 1}
    for candidate in (document, {**head, key: document}):
        assert line(candidate)


def test_load(evaluation: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**evaluation, **EXTRAS}), "utf-8-sig")
    assert interchange.load(path) == {**evaluation, **EXTRAS}
    assert interchange.load(str(path))["n"] == 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON: "),
        ("", "is not JSON: "),
        ("[" * 100_000, "is not JSON: "),
        (b"\xff\xfe\x00", "is not JSON: "),
        ('{"format": NaN}', "is not JSON: NaN is not a JSON number"),
        ("[]", ": the document is [], expected an object"),
        ('{"link": ""}', ": the document lacks 'format'"),
        ('{"format": "x", "version": 1}', ": unknown format 'x': known are"),
        ('{"format": "surestep-audit", "version": 7}', ": unknown version 7 of surestep-audit"),
    ],
)
def test_load_refuses_by_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        interchange.load(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_load_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json does not exist$"):
        interchange.load(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"^cannot read .*irectory"):
        interchange.load(tmp_path)


def test_without_jsonschema_one_line_says_what_to_install(evaluation: dict[str, Any]) -> None:
    code = (
        "import sys, json; sys.modules['jsonschema'] = None\n"
        "from surestep import interchange\n"
        "try: interchange.validate(json.loads(sys.argv[1]))\n"
        "except ValueError as e: print(e)\n"
        "print('torch' in sys.modules)"
    )
    run = [sys.executable, "-W", "error", "-c", code, json.dumps(evaluation)]
    ended = subprocess.run(run, capture_output=True, text=True, check=True)
    said, torch_too = ended.stdout.splitlines()
    assert said == "checking documents needs jsonschema: pip install 'surestep[interchange]'"
    assert torch_too == "False"  # what reads results needs no torch


@pytest.fixture
def linear() -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.rand(24, 1, 8, 8)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), x


def test_a_true_evaluation_passes(linear: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = linear
    y = model(x).argmax(1)
    found = surestep.evaluate(
        model,
        (x, y),
        surestep.Linf(8 / 255),
        attacks=["fgsm", "pgd-2", "square-5"],
        eps=[1 / 255],
    )
    interchange.validate(found.to_dict())
    interchange.validate(json.loads(json.dumps(found.to_dict())))


@pytest.mark.usefixtures("small_budget")
@pytest.mark.parametrize("right", [0, 1])
def test_a_true_audit_passes(linear: tuple[nn.Module, torch.Tensor], right: int) -> None:
    model, x = linear
    y = (model(x).argmax(1) + 1 - right) % 3  # with no image right, checks have no value
    found = surestep.audit(model, (x, y), surestep.Linf(8 / 255), budget="quick")
    interchange.validate(found.to_dict())
    interchange.validate(json.loads(json.dumps(found.to_dict())))


def test_the_schema_knows_every_verdict() -> None:
    schema = Path(interchange.__file__).with_name("schemas") / "audit-1.json"
    known = json.loads(schema.read_text("utf-8"))["properties"]["verdict"]["enum"]
    assert sorted(known) == sorted(verdicts.SEVERITY)
