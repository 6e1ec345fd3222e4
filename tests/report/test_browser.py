"""The page in a real browser: what is drawn, what happens on pointing, phone and dark."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 120_000  # milliseconds; a machine may be busy
DRAWN = "[...document.querySelectorAll('.plot')].every(p => p.dataset.drawn === 'yes')"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium: Any, full_html: str, tmp_path: Path) -> Iterator[Any]:
    """Return ``show(**context)``: open the full report and wait until it is drawn.

    At the end nothing may have been said on the console, and nothing asked of the network.
    """
    said: list[str] = []
    asked: list[str] = []
    contexts = []
    path = tmp_path / "report.html"
    path.write_text(full_html, encoding="utf-8")

    def open_page(**settings: Any) -> Any:
        settings = {"viewport": {"width": 1280, "height": 900}, **settings}
        context = chromium.new_context(**settings)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function(DRAWN)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}


def cell(page: Any, f: int, r: int) -> tuple[float, float]:
    """Return where on the screen a cell of the first surface's 5 x 5 map lies."""
    cells = page.locator("#plot-loss-surface-1 .mark-rect.role-mark path")
    assert cells.count() == 25
    box = cells.nth(5 * r + f).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def cross_section(page: Any) -> str:
    return page.locator("#plot-loss-surface-1 .mark-line path").get_attribute("d")


def wait_for_another(page: Any, before: str) -> None:
    """Wait until the cross-section is not what it was before."""
    page.wait_for_function(
        "before => document.querySelector('#plot-loss-surface-1 .mark-line path')"
        ".getAttribute('d') !== before",
        arg=before,
    )


def luminance(colour: str) -> float:
    red, green, blue = (int(v) for v in re.findall(r"\d+", colour)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255


def test_every_plot_is_drawn(show):
    page = show()
    plots = page.locator(".plot").all()
    assert len(plots) == 9
    for plot in plots:
        marks = "[class*=mark-line] path, .mark-symbol path, .mark-rect.role-mark path"
        assert plot.locator("svg.marks").count() == 1
        assert plot.locator(marks).count() > 0
        box = plot.locator("svg.marks").bounding_box()
        assert box["width"] > 300
        assert box["height"] > 150
        # Nothing of it is cut off.
        assert box["width"] <= plot.bounding_box()["width"] + 1
    lines = page.locator("#plot-accuracy-by-eps .mark-line path")
    assert lines.count() == 3
    assert len({line.evaluate("e => getComputedStyle(e).stroke") for line in lines.all()}) == 3


def test_what_a_reader_does(show):
    """One after the other on one page: to open it and draw nine plots takes longest."""
    page = show()
    a_tooltip_appears_on_pointing(page)
    pointing_at_the_surface_moves_the_cross_section(page)
    the_menu_shows_single_images(page)
    evidence_unfolds(page)


def a_tooltip_appears_on_pointing(page):
    tip = page.locator("#vg-tooltip-element")
    page.locator("#plot-accuracy-by-step").scroll_into_view_if_needed()
    points = page.locator("#plot-accuracy-by-step .mark-symbol path").all()
    box = points[-1].bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip.wait_for(state="visible")
    assert "pgd-50" in tip.inner_text()
    assert "88.0%" in tip.inner_text()


def pointing_at_the_surface_moves_the_cross_section(page):
    page.locator("#plot-loss-surface-1").scroll_into_view_if_needed()
    before = cross_section(page)
    page.mouse.move(*cell(page, f=3, r=0))
    wait_for_another(page, before)
    assert "random direction" in page.locator("#vg-tooltip-element").inner_text()


def the_menu_shows_single_images(page):
    before = cross_section(page)
    menu = page.locator("#plot-loss-surface-1 select")
    options = menu.locator("option").all_inner_texts()
    assert len(options) == 4
    assert options[0] == "mean of 3 images"
    menu.select_option(index=2)
    wait_for_another(page, before)
    assert page.locator("#plot-loss-surface-1 .mark-rect.role-mark path").count() == 25


def evidence_unfolds(page):
    words = page.get_by_text("share", exact=True)
    assert not words.is_visible()
    page.locator(".checks summary").first.click()
    assert words.is_visible()


def test_no_sideways_scrolling(show):
    page = show(viewport={"width": 768, "height": 844})
    for width in (768, 390, 320):
        page.set_viewport_size({"width": width, "height": 844})
        for is_open in ("false", "true"):
            for details in page.locator("details").all():
                details.evaluate(f"e => {{ e.open = {is_open}; }}")
            page.wait_for_function(
                "width => document.documentElement.scrollWidth === width", arg=width
            )
        # The plots are drawn again, narrower.
        page.wait_for_function(
            "width => [...document.querySelectorAll('.plot')].every("
            "p => p.querySelector('svg.marks')?.getBoundingClientRect().right <= width)",
            arg=width,
        )
        for plot in page.locator(".plot").all():
            svg = plot.locator("svg.marks").bounding_box()
            assert svg["x"] >= 0
            assert svg["x"] + svg["width"] <= width


def test_turning_the_phone_draws_again(show):
    page = show(viewport={"width": 390, "height": 844})
    narrow = page.locator("#plot-loss-surface-1 svg.marks").bounding_box()["width"]
    page.set_viewport_size({"width": 844, "height": 390})
    page.wait_for_function(
        "narrow => document.querySelector('#plot-loss-surface-1 svg.marks')"
        "?.getBoundingClientRect().width > narrow + 20",
        arg=narrow,
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 844


def colours(page: Any) -> dict[str, float]:
    """Return the luminance of the page, its text, and a chart's labels and paper."""
    style = "(e, name) => getComputedStyle(e)[name]"
    label = page.locator("#plot-accuracy-by-eps .role-axis-label text").first
    paper = page.locator("#plot-accuracy-by-eps svg.marks")
    assert "rgba(0, 0, 0, 0)" in paper.evaluate(style, "backgroundColor")
    return {
        "page": luminance(page.locator("body").evaluate(style, "backgroundColor")),
        "text": luminance(page.locator("h1").evaluate(style, "color")),
        "label": luminance(label.evaluate(style, "fill")),
    }


def test_light_and_dark(show):
    light = colours(show(color_scheme="light"))
    assert light["page"] > 0.9
    assert light["text"] < 0.2
    assert light["label"] < 0.5
    dark = colours(show(color_scheme="dark"))
    assert dark["page"] < 0.15
    assert dark["text"] > 0.8
    assert dark["label"] > 0.5


def test_a_change_of_scheme_draws_again(show):
    page = show(color_scheme="light")
    label = "#plot-accuracy-by-eps .role-axis-label text"
    fill = f"(document.querySelector('{label}') || document.body).getAttribute('fill')"
    before = page.evaluate(fill)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"before => ![null, before].includes({fill})", arg=before)
    assert colours(page)["label"] > 0.5


def test_the_screenshot_is_dark_all_over(show, tmp_path):
    from PIL import Image

    page = show(color_scheme="dark")
    page.screenshot(path=tmp_path / "dark.png")
    with Image.open(tmp_path / "dark.png") as picture:
        shades = sorted(picture.convert("L").tobytes())
    assert shades[int(0.9 * len(shades))] < 80
