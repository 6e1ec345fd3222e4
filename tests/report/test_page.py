from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from surestep import UserError, report
from surestep.report import Report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page: (tag, attributes) in order, its text, and whether tags match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.html = html
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}

    def specs(self) -> dict[str, dict]:
        found = re.search(r'<script type="application/json" id="specs">(.*?)</script>', self.html)
        assert found
        return json.loads(found[1])


@pytest.fixture
def page(full_html) -> Page:
    return Page(full_html)


def test_the_verdict_comes_first(page):
    text = page.text
    assert text.index("pseudo-robust") < text.index("Accuracy under attack")
    assert "It looks 95% robust, and a stronger attack leaves 1%." in text
    assert "A weak report claims 95.4% under fgsm alone · of 500 images" in text
    assert "This audit finds 1.2% 0.5–2.7 · most broken by pgd-50-margin · of 500 images" in text
    assert "Checks flagged 1 of 20" in text


def test_attacks_with_interval_and_seconds(page):
    assert "pgd-50 88.0% 86.0–90.0 12.5" in page.text
    assert "autoattack cumulative 85.0% 83.0–87.0 77.25" in page.text
    # Attacks of the audit, too.
    assert "pgd-50-margin 1.2% 0.6–2.6" in page.text


def test_every_check_is_there_flagged_ones_first(page):
    text = page.text
    for k in range(1, 21):
        assert f"{k} Check number {k} Sentence {k}." in text
    for k in (1, 3, 20):
        assert f"{k / 100:.4g} flagged if more than {k}" in text
    assert text.index("1 flagged") < text.index("18 passed") < text.index("1 skipped")
    assert "share 0.125 exact yes samples values 4 0.5 8 0.25" in text
    assert "bpda-pgd-50 zero gradients 2.0%" in text


def test_classes_costs_and_how_it_was_made(page):
    text = page.text
    assert "9 100 98.0% 81.0%" in text
    assert "Training 60 s Throughput 2,000 images/s Epochs 3 Evaluation 92.5 s Audit 95 s" in text
    assert "surestep evaluate runs/one --json result.json" in text
    assert "training 7 evaluation 3 audit 4" in text
    assert "torch 2.13.0" in text
    assert 'params {"lam": 5.0}' in text


def test_comparison(page):
    text = page.text
    assert "fgsm pseudo-robust 98.6 ± 1.0 94.8 ± 1.0 0.4 ± 1.0 – 0.0 ± 1.0 5 61 ± 1.5" in text
    assert "sat-r2 robust 97.8 93.5 89.2 87.0 86.8 10 98" in text
    # No row knows its memory.
    assert "Peak memory" not in text
    assert "over 3 seeds" in text
    (best,) = re.findall(r'class="num best">([\d.]+)', page.html)
    assert best == "86.8"


def test_notes_on_a_comparison(comparison):
    page = Page(Report("one", comparison=comparison, notes=[HOSTILE, "Two."]).to_html())
    assert page.text.count(HOSTILE) == 1
    assert page.text.index(HOSTILE) < page.text.index("Two.")
    assert Page(Report("one", comparison=comparison).to_html()).text.count("Two.") == 0


def test_seeds_and_verdicts_of_a_comparison(comparison):
    first, second = comparison
    first |= {"seeds": [0, 1, 2], "verdict_text": "pseudo-robust (1 of 3; robust 2)"}
    second |= {"seeds": [0], "worst_case_accuracy": {"mean": 0.868, "std": None, "n": 1}}
    text = Page(Report("one", comparison=comparison).to_html()).text
    assert "Method Verdict Seeds Clean" in text
    assert "fgsm pseudo-robust (1 of 3; robust 2) 3 98.6" in text
    assert "sat-r2 robust 1 97.8" in text
    assert "deviation over the seeds." in text


def test_one_seed_has_no_deviation(comparison):
    one = [{**comparison[1], "seeds": [0], "passes": {"mean": 10, "std": None, "n": 1}}]
    text = Page(Report("one", comparison=one).to_html()).text
    assert "Seeds" not in text
    assert "Mean ±" not in text


def test_plots_and_their_places(page):
    specs = page.specs()
    assert len(specs) == 9
    assert {f"plot-{name}" for name in specs} <= page.ids()
    # Colours and fonts are the page's.
    assert all("config" not in s["spec"] for s in specs.values())


def test_examples(page, gathered):
    pictures = [a["src"] for tag, a in page.elements if tag == "img"]
    assert pictures == [
        e[k] for e in gathered["examples"] for k in ("clean", "perturbation", "adversarial")
    ]
    factor = gathered["examples"][0]["factor"]
    assert f"magnified {factor:.4g} times" in page.text


def test_names_of_classes(full, gathered):
    names = [f"class-{k}" for k in "abcdefghij"]
    text = Page(full(classes=names).to_html()).text
    label = gathered["examples"][0]["label"]
    assert f"label class-{'abc'[label]}" in text
    assert "class-j 100 98.0% 81.0%" in text


def test_nothing_is_fetched(page):
    for tag, attributes in page.elements:
        assert tag != "link"
        for name in ("src", "href", "srcset", "data"):
            assert not (attributes.get(name) or "").startswith(("http", "//", "file"))
    style = re.findall(r"<style>(.*?)</style>", page.html, re.S)
    assert "url(" not in style[0]
    assert "@import" not in style[0]
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_small_enough_and_one_bundle(page):
    assert len(page.html.encode()) < 3_000_000
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert page.html.count("window.vegaEmbed=") == 1


def test_small_enough_with_full_surfaces_and_pictures_of_noise(full):
    """The largest there may be: five models, 21 x 21 points, sixteen colour pictures."""
    import torch

    from surestep.report import _png
    from surestep.report._plots import masked_surface

    noise = _png.data_uri(torch.rand(3, 96, 96))
    example = full().examples[0]
    example = {**example, "clean": noise, "perturbation": noise, "adversarial": noise}
    made = full(surfaces={f"model {k}": masked_surface() for k in range(5)}, examples=[example] * 8)
    assert len(made.to_html().encode()) < 3_000_000


HOSTILE = "<script>alert(1)</script>\"'&"


def test_names_are_escaped(full, evaluation, audit, comparison, history):
    evaluation["robust_accuracy"][HOSTILE] = 0.5
    evaluation["intervals"][HOSTILE] = [0.4, 0.6]
    evaluation["attacks"][1]["name"] = HOSTILE
    audit |= {"sentence": HOSTILE, "found_by": HOSTILE, "budget": HOSTILE}
    audit["checks"][0] |= {
        "title": HOSTILE,
        "sentence": HOSTILE,
        "source": HOSTILE,
        "threshold": HOSTILE,
        "evidence": {HOSTILE: HOSTILE, "rows": [{HOSTILE: HOSTILE}], "deep": {"a": [[HOSTILE]]}},
    }
    comparison[0]["method"] = HOSTILE
    comparison[0]["verdict"] = HOSTILE
    history[0][f"val_{HOSTILE}"] = 0.5
    made = full(
        title=HOSTILE,
        command=HOSTILE,
        versions={HOSTILE: HOSTILE},
        seeds={HOSTILE: HOSTILE},
        config={HOSTILE: HOSTILE},
        classes=[HOSTILE] * 10,
        surfaces={HOSTILE: full().surfaces["this model"]},
    )
    html = made.to_html()
    assert "<script>alert" not in html
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.elements) == 3
    assert page.text.count(HOSTILE) > 20
    # What charts show is not changed by being made harmless.
    assert HOSTILE in json.dumps(page.specs(), ensure_ascii=False).replace('\\"', '"')


def test_an_evaluation_alone_says_that_it_is_no_audit(evaluation):
    text = Page(Report("one", evaluation=evaluation).to_html()).text
    assert "not audited" in text
    assert "85.0% of 1,000 images remain correctly classified under all 3 attacks." in text
    assert "Checks" not in text


@pytest.mark.parametrize("n", [500, 1000])
def test_an_audit_of_fewer_images_than_the_evaluation(evaluation, audit, n):
    found = {**evaluation, "clean_accuracy": 0.961, "n": n}
    text = Page(Report("one", evaluation=found, audit=audit).to_html()).text
    assert "Clean accuracy 96.1%" in text
    assert ("most broken by pgd-50-margin · of 500 images" in text) == (n != 500)


def test_an_audit_alone(audit):
    page = Page(Report("one", audit=audit).to_html())
    assert "of 500 images" not in page.text
    assert set(page.specs()) == {
        "accuracy-by-eps",
        "accuracy-by-step",
        "accuracy-by-restart",
        "loss-along-fgsm",
    }
    assert "Worst case of all attacks" not in page.text


def test_an_audit_whose_checks_were_skipped(audit):
    for check in audit["checks"]:
        check |= {"status": "skipped", "value": None, "evidence": {}}
    page = Page(Report("one", audit=audit).to_html())
    assert "20 skipped" in page.text
    assert 'id="specs"' not in page.html


def test_a_history_alone(history):
    page = Page(Report("one", history=history).to_html())
    assert set(page.specs()) == {"training-accuracy", "training-loss"}
    assert "not judged" in page.text
    said = "40.0% (95% interval 37.0–43.1) of 1,000 held-out images remain correctly classified"
    assert said in page.text


@pytest.mark.parametrize("select", ["best", "last"])
def test_the_epoch_whose_weights_are_kept(history, select):
    rows = [{**history[0], "epoch": k, "val_worst_case": v} for k, v in ((1, 0.75), (2, 0.125))]
    page = Page(Report("one", history=rows, config={"select": select}).to_html())
    told = {"best": "In the best epoch (1), 75.0%", "last": "In the last epoch (2), 12.5%"}
    assert told[select] in page.text


def test_a_history_without_validation(history):
    rows = [{k: v for k, v in row.items() if not k.startswith("val_")} for row in history]
    assert "not judged" not in Page(Report("one", history=rows).to_html()).text


def test_a_comparison_alone(comparison):
    page = Page(Report("one", comparison=comparison).to_html())
    assert set(page.specs()) == {"pareto"}


@pytest.mark.parametrize("cost", [{"passes": 2}, {"seconds": 0}])
def test_a_comparison_that_cannot_be_drawn_has_no_chart(cost):
    one = {"method": "a", "worst_case_accuracy": 0.5, **cost}
    other = {"method": "b", "worst_case_accuracy": 0.4}
    html = Report("one", comparison=[one, other]).to_html()
    assert 'id="specs"' not in html


def test_nothing_at_all_is_a_small_page():
    html = Report("empty").to_html()
    assert "vegaEmbed" not in html
    assert len(html) < 20_000
    Page(html)


def test_nan_is_not_written(audit):
    audit["checks"][9]["evidence"]["accuracy"][0] = float("nan")
    audit["checks"][5]["value"] = float("inf")
    audit["checks"][5]["evidence"] = {"a": {"b": [float("nan"), {"c": 1}]}}
    Page(Report("one", audit=audit).to_html()).specs()


def test_many_classes(evaluation):
    evaluation["per_class"] = [
        {"label": k, "n": 5, "clean_accuracy": 1.0, "worst_case_accuracy": k / 1000}
        for k in range(1000)
    ]
    text = Page(Report("one", evaluation=evaluation).to_html()).text
    assert "The 30 of 1000 classes with the lowest worst case." in text
    assert "29 5 100.0% 2.9%" in text
    assert "30 5 100.0% 3.0%" not in text


def test_long_evidence_is_cut(audit):
    audit["checks"][0]["evidence"] = {"long": list(range(100_000)), "deep": {"a": [[1] * 100_000]}}
    html = Report("one", audit=audit).to_html()
    assert len(html) < 1_500_000
    assert "and 99940 more" in Page(html).text


def test_write_html_is_whole(full, full_html, tmp_path):
    path = tmp_path / "report.html"
    report.write_html(full(), path)
    assert path.read_text(encoding="utf-8") == full_html
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"evaluation": {}}, r"the evaluation has format and version \(None, None\), expected"),
        ({"audit": {"format": "other"}}, r"`surestep audit --json` wrote"),
        ({"evaluation": 3}, "'surestep-evaluation'"),
        ({"evaluation": {"format": "surestep-evaluation", "version": 2}}, "version .*, 2"),
        ({"audit": {"format": "surestep-audit"}}, "expected .'surestep-audit', 1"),
        ({"history": [1]}, "a row of the history is no dict"),
    ],
)
def test_bad_contents(parts, message):
    with pytest.raises(UserError, match=message) as raised:
        Report("one", **parts)
    assert "\n" not in str(raised.value)


def test_rows_of_ones_own_name_their_method():
    with pytest.raises(UserError, match="a row of the comparison has no method"):
        Report("one", comparison=[{"label": "one"}])
