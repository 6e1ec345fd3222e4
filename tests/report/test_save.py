from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from surestep import UserError, report
from surestep.report import charts


@pytest.fixture
def chart(evaluation):
    return charts.accuracy_by_eps(evaluation["curve"])


def test_png(chart, tmp_path):
    report.save_chart(chart, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.width > 2 * charts.WIDTH
        # White paper, and lines of more than one colour on it.
        colours = {c for _, c in picture.convert("RGB").getcolors(1 << 24)}
    assert (255, 255, 255) in colours
    assert {(0x25, 0x63, 0xA8), (0xC2, 0x57, 0x1A)} <= colours


def test_svg(chart, tmp_path):
    report.save_chart(chart, str(tmp_path / "a.svg"))
    svg = ET.parse(tmp_path / "a.svg").getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    words = "".join(svg.itertext())
    assert "worst case" in words
    assert "eps" in words


def test_another_ending(chart, tmp_path):
    with pytest.raises(UserError, match=r"cannot save a chart as a\.gif: use \.png or \.svg"):
        report.save_chart(chart, tmp_path / "a.gif")


def test_a_folder_that_is_not_there(chart, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        report.save_chart(chart, tmp_path / "none" / "a.svg")


def test_save_plots(full, tmp_path):
    paths = report.save_plots(full(), tmp_path / "new" / "plots")
    names = {p.stem for p in paths}
    assert names == {
        "accuracy-by-eps",
        "accuracy-by-step",
        "accuracy-by-restart",
        "loss-along-fgsm",
        "loss-surface-1",
        "loss-surface-masked",
        "training-accuracy",
        "training-loss",
        "pareto",
    }
    assert {p.suffix for p in paths} == {".png", ".svg"}
    assert len(paths) == 2 * len(names)
    for path in paths:
        if path.suffix == ".svg":
            ET.parse(path)
        else:
            with Image.open(path) as picture:
                picture.verify()


def test_a_folder_that_cannot_be_made(full, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        report.save_plots(full(), tmp_path / "file")


MISSING = "the report needs altair, vl-convert-python and jinja2: pip install 'surestep[report]'"


@pytest.mark.parametrize("package", ["altair", "vl_convert", "jinja2"])
def test_a_missing_package_is_one_line(full, tmp_path, monkeypatch, package):
    from surestep.report import _page

    _page._bundle.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as raised:
        report.write_html(full(), tmp_path / "report.html")
    assert str(raised.value) == MISSING
    assert not list(tmp_path.iterdir())
