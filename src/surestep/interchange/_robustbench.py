"""RobustBench's ``model_info`` files: write one from an evaluation, read all their variants."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surestep.errors import UserError, unknown_name
from surestep.interchange._json import read_json, shorten
from surestep.interchange._schema import validate

KEYS = (
    *("link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue"),
    *("architecture", "eps", "clean_acc", "reported", "autoattack_acc"),
)
"""The keys of an entry, in RobustBench's order."""

TEST_SETS = {"mnist": 10_000, "cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
"""Number of test images by dataset; for ImageNet, of the subset that RobustBench uses."""

_NORMS = {"linf": "Linf", "l2": "L2"}
# What entries hold in place of a missing number.
_ABSENT = ("", "-", "--", "?", "n/a", "na", "nan", "none", "null", "unknown", "unaltered")
_ACCURACIES = ("clean_acc", "autoattack_acc", "AA", "reported", "external")


@dataclass(frozen=True)
class ModelInfo:
    """An entry of RobustBench. Accuracies are fractions in [0, 1], or None if the file has none.

    Attributes:
        link: to the paper.
        name: title of the paper.
        authors: in one line.
        additional_data: whether data besides the training set were used; None if not stated.
        number_forward_passes: per prediction; None if not stated.
        dataset: such as "cifar10".
        venue: where and when it was published.
        architecture: of the model.
        eps: radius of the threat model, pixels in [0, 1].
        clean_accuracy: on clean images.
        reported: robust accuracy by the authors' own evaluation.
        autoattack_accuracy: under AutoAttack.
        external: robust accuracy by a stronger evaluation; RobustBench ranks by it if there is one.
        footnote: shown on the leaderboard.
        unreliable: whether AutoAttack is thought to overestimate this model's robustness.
        norm: "linf" or "l2", from the folder it was read from; None for other folders.
    """

    link: str
    name: str
    authors: str
    additional_data: bool | None
    number_forward_passes: int | None
    dataset: str
    venue: str
    architecture: str
    eps: float | None
    clean_accuracy: float | None
    reported: float | None
    autoattack_accuracy: float | None
    external: float | None = None
    footnote: str = ""
    unreliable: bool = False
    norm: str | None = None


def format_eps(eps: float) -> str:
    """Return a radius as RobustBench writes it: "8/255" for 8/255, else a decimal.

    Where a radius has both spellings, the shorter is taken: 0.2 rather than 51/255.

    Args:
        eps: the radius, pixels in [0, 1]; it may have been rounded to float32.

    Raises:
        UserError: ``eps`` is not a finite number >= 0.
    """
    if not _is_number(eps) or not 0 <= eps < math.inf:
        raise UserError(f"eps {shorten(eps)} is not a radius: give a number >= 0, such as 8/255")
    decimal = repr(float(f"{eps:.7g}"))
    k = round(min(eps, 1e6) * 255)  # eps * 255 would overflow for the largest floats
    fraction = f"{k}/255"
    if math.isclose(eps, k / 255, rel_tol=1e-6) and len(fraction) < len(decimal):
        return fraction
    return decimal


def parse_eps(text: str) -> float:
    """Return the radius that ``format_eps`` or a person wrote: "8/255", "0.031".

    Raises:
        UserError: the text is not such a number, or the number is not finite and >= 0.
    """
    above, *below = text.split("/")
    try:
        eps = float(above) / (float(below[0]) if len(below) == 1 else 1.0)
    except (ValueError, ZeroDivisionError):
        eps = math.nan
    if len(below) > 1 or not 0 <= eps < math.inf:
        raise UserError(f"eps {shorten(text)} is not a radius: give one such as 8/255 or 0.5")
    return eps


def to_model_info(
    evaluation: dict[str, Any],
    *,
    name: str,
    authors: str,
    link: str,
    venue: str,
    architecture: str,
    dataset: str,
    additional_data: bool = False,
    number_forward_passes: int = 1,
    reported: float | None = None,
    test_set_size: int | None = None,
    allow_subset: bool = False,
    allow_doubts: bool = False,
) -> dict[str, Any]:
    """Return an evaluation as an entry of RobustBench.

    If AutoAttack ran only on the images that survived other attacks, its accuracy here is that
    under all of these attacks together: never above AutoAttack's own, at times below. If layers
    that mask gradients (MeanSparse) were attacked both as they are and with BPDA, the lower
    accuracy is taken.

    Args:
        evaluation: as from ``Evaluation.to_dict`` or ``load``, with attack "autoattack".
        name: title of the paper.
        authors: in one line, separated by commas.
        link: to the paper.
        venue: such as "ICML 2020" or "arXiv, Feb 2020".
        architecture: such as "ResNet-18".
        dataset: RobustBench knows cifar10, cifar100 and imagenet.
        additional_data: whether data besides the training set were used.
        number_forward_passes: per prediction.
        reported: robust accuracy in the paper, a fraction in [0, 1]; left empty by default.
        test_set_size: number of test images; known for mnist, cifar10, cifar100 and imagenet.
        allow_subset: accept an evaluation on fewer images than the whole test set.
        allow_doubts: accept an evaluation that says why its accuracy may be too high, or that was
            made with ``doubt=False``; the entry's footnote then says so.

    Raises:
        UserError: the evaluation is invalid, is not of the whole test set, lacks AutoAttack, has
            doubts or pixels outside [0, 1]; or an argument is not as described above.
    """
    dataset = _check_dataset_name(dataset)
    _check_evaluation(evaluation, dataset)
    _check_arguments(additional_data, number_forward_passes, reported)
    _check_size(evaluation["n"], dataset, test_set_size, allow_subset)
    accuracies = evaluation["robust_accuracy"]
    robust = min(accuracies[k] for k in ("autoattack", "autoattack-bpda") if k in accuracies)
    signs = evaluation.get("doubts", ["no sign of masking was looked for"])
    doubts = "; ".join(signs) if robust > 0 else ""
    if doubts and not allow_doubts:
        raise UserError(
            f"the evaluation's robust accuracy may be too high ({doubts}): audit the model, or "
            "give allow_doubts=True, which adds a footnote"
        )
    footnote = {"footnote": f"may be too high: {doubts}"} if doubts else {}
    return {
        "link": link,
        "name": name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": format_eps(evaluation["threat"]["eps"]),
        "clean_acc": _percent(evaluation["clean_accuracy"]),
        "reported": "" if reported is None else _percent(reported),
        "autoattack_acc": _percent(robust),
        **footnote,
    }


def _check_evaluation(evaluation: dict[str, Any], dataset: str) -> None:
    """Refuse an evaluation that is not comparable with RobustBench's on this data set.

    Raises:
        UserError: see ``to_model_info``.
    """
    validate(evaluation)
    if evaluation["format"] != "surestep-evaluation":
        raise UserError(f"a {evaluation['format']} has no RobustBench entry: give an evaluation")
    if (split := evaluation.get("split", "test")) != "test":
        raise UserError(
            f"the evaluation is of {split} images, by which training may have selected weights: "
            "evaluate on test images"
        )
    accuracies = evaluation["robust_accuracy"]
    if "autoattack" not in accuracies:
        raise UserError(
            f"the evaluation has no attack 'autoattack', only {', '.join(accuracies) or 'none'}: "
            "RobustBench's robust accuracy is AutoAttack's, so evaluate with it"
        )
    low, high = evaluation["threat"]["bounds"]
    if (low, high) != (0, 1):
        raise UserError(
            f"the evaluation's pixels are in [{low:g}, {high:g}], RobustBench's in [0, 1]: put the "
            "scaling into the model"
        )
    judged_on = evaluation.get("dataset", dataset).partition(":")[0]
    if judged_on in TEST_SETS and judged_on != dataset:
        raise UserError(
            f"the evaluation is of {judged_on}: give dataset={judged_on!r}, not {dataset!r}"
        )


def _check_arguments(
    additional_data: bool, number_forward_passes: int, reported: float | None
) -> None:
    if type(additional_data) is not bool:
        raise UserError(f"additional_data is {shorten(additional_data)}, expected True or False")
    if type(number_forward_passes) is not int or number_forward_passes < 1:
        raise UserError(
            f"number_forward_passes is {shorten(number_forward_passes)}, expected an integer >= 1"
        )
    if reported is not None and not (_is_number(reported) and 0 <= reported <= 1):
        raise UserError(
            f"reported is {shorten(reported)}, expected a fraction in [0, 1], such as 0.5"
        )


def _check_size(n: int, dataset: str, size: int | None, allow_subset: bool) -> None:
    size = TEST_SETS.get(dataset) if size is None else size
    if size is None:
        if not allow_subset:
            raise UserError(f"the size of {dataset}'s test set is unknown: give test_set_size")
    elif n > size:
        raise UserError(
            f"the evaluation has {n} images, {dataset}'s test set only {size}: evaluate on that"
        )
    elif n < size and not allow_subset:
        raise UserError(
            f"the evaluation has {n} of the {size} images of {dataset}'s test set: evaluate on "
            "all, or give allow_subset=True"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _check_dataset_name(dataset: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", dataset, re.ASCII):
        raise UserError(f"dataset {shorten(dataset)} is not a folder name: give one like 'cifar10'")
    return dataset


def model_info_path(dataset: str, norm: str, name: str, year: int, first_word: str) -> Path:
    """Return ``model_info/<dataset>/<Linf|L2>/<Name><Year><FirstWord>.json``.

    Args:
        dataset: such as "cifar10".
        norm: "linf" or "l2".
        name: surname of the first author; accents and spaces are removed.
        year: four digits.
        first_word: of the title; a variant's suffix may follow, as in "Fixing_R18".

    Raises:
        UserError: one of these cannot be part of such a path.
    """
    folder = _NORMS.get(norm.lower())
    if folder is None:
        raise unknown_name("norm", norm, _NORMS)
    if not 1900 <= year <= 9999:
        raise UserError(f"year {year} is not a year: give four digits")
    stem = f"{_file_name_word('name', name)}{year}{_file_name_word('first_word', first_word)}"
    return Path("model_info", _check_dataset_name(dataset), folder, f"{stem}.json")


def _file_name_word(what: str, text: str) -> str:
    """Return letters and digits without accents, the first in upper case."""
    plain = unicodedata.normalize("NFKD", text)
    word = re.sub(r"[^A-Za-z0-9_-]", "", plain).strip("-_")
    if not word:
        raise UserError(f"{what} {shorten(text)} has no letter for a file name: give another")
    return word[0].upper() + word[1:]


def write_model_info(
    info: Mapping[str, Any],
    folder: str | Path,
    *,
    norm: str,
    year: int | None = None,
    suffix: str = "",
    overwrite: bool = False,
) -> Path:
    """Write an entry to its place under a folder, such as a checkout of RobustBench.

    The file is named after the first author's surname (the last word before the first comma), the
    year and the first word of the title.

    Args:
        info: as from ``to_model_info``.
        folder: the folder that holds ``model_info``, or will.
        norm: "linf" or "l2", since an entry does not state it.
        year: of publication; by default the one in the venue.
        suffix: distinguishes models of one paper, such as "R18".
        overwrite: replace an existing file.

    Returns:
        The file.

    Raises:
        UserError: ``info`` is not such an entry or yields no file name, or the file exists or
            cannot be written.
    """
    # Imported only here, because it imports torch, which reading entries does not need.
    from surestep.files import make_folder, write_atomically

    missing = [key for key in KEYS if key not in info]
    if missing:
        raise UserError(f"the entry lacks {', '.join(missing)}")
    known = _Fields(info, "the entry").to_model_info()
    if year is None:
        years = re.findall(r"\b(?:19|20)\d\d\b", known.venue)
        if len(years) != 1:
            raise UserError(f"venue {shorten(known.venue)} does not name one year: give year")
        year = int(years[0])
    surname = (known.authors.split(",")[0].split() or [""])[-1]
    first = (known.name.split() or [""])[0]
    if suffix:
        first = f"{_file_name_word('name', first)}_{suffix}"
    path = Path(folder) / model_info_path(known.dataset, norm, surname, year, first)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: give a suffix for another model, or overwrite=True")
    make_folder(path.parent)
    write_atomically(path, json.dumps(dict(info), indent=2, ensure_ascii=False) + "\n")
    return path


def read_model_info(path: str | Path) -> ModelInfo:
    """Read an entry of RobustBench.

    Its files vary: keys are missing, null, empty or words such as "n/a"; AutoAttack's accuracy is
    "AA" in old ones. A string is in percent. A number is a fraction, as RobustBench's own
    ``benchmark`` writes it, unless an accuracy in the file is above 1: then all numbers are in
    percent. Unknown keys are ignored.

    Args:
        path: the file.

    Raises:
        UserError: the file is missing or not a JSON object, or a value cannot be understood.
    """
    path = Path(path)
    info = read_json(path)
    if not isinstance(info, dict):
        raise UserError(f"{path} is not a RobustBench entry: {shorten(info)} is not an object")
    norm = next((n for n, folder in _NORMS.items() if path.absolute().parent.name == folder), None)
    return _Fields(info, str(path)).to_model_info(norm)


class _Fields:
    """Reads the fields of an entry, as ``read_model_info`` describes them.

    A field that is absent or holds no value is read as None, a text as "".

    Args:
        info: the entry.
        what: its name in error messages.
    """

    def __init__(self, info: Mapping[str, Any], what: str) -> None:
        self.info, self.what = info, what
        numbers = [info[key] for key in _ACCURACIES if _is_number(info.get(key))]
        self.unit = 100 if any(number > 1 for number in numbers) else 1

    def to_model_info(self, norm: str | None = None) -> ModelInfo:
        """Read all fields.

        Raises:
            UserError: a value cannot be understood.
        """
        return ModelInfo(
            link=self.text("link"),
            name=self.text("name"),
            authors=self.text("authors"),
            additional_data=self.flag("additional_data"),
            number_forward_passes=self.count("number_forward_passes"),
            dataset=self.text("dataset"),
            venue=self.text("venue"),
            architecture=self.text("architecture"),
            eps=self.radius("eps"),
            clean_accuracy=self.accuracy("clean_acc"),
            reported=self.accuracy("reported"),
            autoattack_accuracy=self.accuracy(
                "autoattack_acc" if "autoattack_acc" in self.info else "AA"
            ),
            external=self.accuracy("external"),
            footnote=self.text("footnote"),
            unreliable=bool(self.flag("unreliable")),
            norm=norm,
        )

    def text(self, key: str) -> str:
        value = self.info.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._fail(key, "text")
        return " ".join(value.split())

    def accuracy(self, key: str) -> float | None:
        if self._absent(key):
            return None
        value = self.info[key]
        try:
            share = value / self.unit if _is_number(value) else float(value.rstrip("% \n")) / 100
        except (AttributeError, ValueError, OverflowError):
            share = math.nan
        if not 0 <= share <= 1:
            raise self._fail(key, "a percentage from 0 to 100")
        return share

    def radius(self, key: str) -> float | None:
        if self._absent(key):
            return None
        value = self.info[key]
        if not isinstance(value, str) and not (_is_number(value) and 0 <= value < math.inf):
            raise self._fail(key, 'a radius such as "8/255"')
        try:
            return parse_eps(value) if isinstance(value, str) else float(value)
        except UserError as e:
            raise self._fail(key, 'a radius such as "8/255"') from e

    def flag(self, key: str) -> bool | None:
        if self._absent(key):
            return None
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        found = known.get(str(self.info[key]).strip().lower())
        if found is None:
            raise self._fail(key, "true or false")
        return found

    def count(self, key: str) -> int | None:
        if self._absent(key):
            return None
        value = self.info[key]
        try:
            count = float(value)
        except (TypeError, ValueError, OverflowError):
            count = math.nan
        if isinstance(value, bool) or count < 1 or not count.is_integer():
            raise self._fail(key, "an integer >= 1")
        return int(count)

    def _absent(self, key: str) -> bool:
        value = self.info.get(key)
        return value is None or (isinstance(value, str) and value.strip().lower() in _ABSENT)

    def _fail(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.what}: {key} is {shorten(self.info[key])}, expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
