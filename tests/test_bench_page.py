"""What a bench shows: golden files of its JSON, table and page (`python -m tests.bench_reports` writes them
anew); the page stands alone, is well-formed, and a browser finds no text of a plot outside of it."""

from __future__ import annotations

import re
from itertools import combinations
from xml.etree import ElementTree

import pytest

from flashtalk_cli.bench import plots
from flashtalk_cli.bench.page import page
from flashtalk_cli.bench.projection import Point
from tests.bench_reports import GOLDEN, golden, make
from tests.browser import Browser, find_browser

OUTSIDE = (
    "[...document.querySelectorAll('svg text')].filter(t => { const b = t.getBBox(),"
    " v = t.ownerSVGElement.viewBox.baseVal; return b.x < 0 || b.y < 0 ||"
    " b.x + b.width > v.width || b.y + b.height > v.height }).map(t => t.textContent)"
)
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return golden()


@pytest.mark.parametrize("name", ["report.json", "table.txt", "page.html"])
def test_what_is_shown_is_what_it_was(written, name):
    assert written[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_a_page_needs_nothing_else(written):
    text = written["page.html"]
    for sign in ("<script", "<link", "<img", "src=", "url(", "@import", "http:", "https:"):
        assert sign not in text, sign


def test_plots_are_well_formed_and_names_are_no_markup(written):
    found = SVG.findall(written["page.html"])
    assert len(found) == 4
    for svg in found:
        ElementTree.fromstring(svg)
    assert "Imaginary &lt;GPU&gt; &amp; Co" in written["page.html"]
    assert "<GPU>" not in written["page.html"]


def test_what_is_projected_is_never_shown_as_measured(written):
    [svg] = [svg for svg in SVG.findall(written["page.html"]) if "over GPUs" in svg]
    texts = [text.text or "" for text in ElementTree.fromstring(svg).iter("text")]
    assert sorted(text.split()[0] for text in texts if text.startswith(("measured", "projected"))) == [
        *("measured", "measured"),  # 1 and 2 GPUs
        *("projected", "projected"),  # 4 and 8
    ]
    assert any(text.startswith("Projection, not a result") for text in texts)


def test_a_cpus_report_has_no_plot_of_gpus():
    report = make()
    report["fingerprint"] = {**report["fingerprint"], "device_memory_gib": None}
    assert "over GPUs" not in page(report)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("setting", {"steps": 2}),
        ("setting", {"offload": True}),  # which a title does not say
        ("fingerprint", {"device": "Imaginary older GPU"}),
    ],
)
def test_reports_of_another_device_or_setting_are_left_out_and_that_is_said(place, change):
    other = make(2)
    other[place] = {**other[place], **change}
    text = page(make(), [other])
    assert "1 report of another device or setting left out" in text
    assert "measured 18" not in text
    assert "2 reports of another device or setting left out" in page(make(), [other, make(2), other])
    assert "left out" not in page(make(), [make(2, 4)]), "the number of chunks is no matter"


def test_beside_a_cpus_report_others_are_left_out_and_that_is_said():
    report = make()
    report["fingerprint"] = {**report["fingerprint"], "device_memory_gib": None}
    assert "1 report left out: only GPUs are drawn" in page(report, [make(2)])
    assert "left out" not in page(report)


def overlapping(svg: str) -> list[tuple[str, str]]:
    """Texts of a plot that touch: by the width of their letters, about, and with some room between lines."""
    boxes = []
    for text in ElementTree.fromstring(svg).iter("text"):
        words = text.text or ""
        width = len(words) * plots.LETTER
        shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.attrib["text-anchor"]]
        boxes.append((words, float(text.attrib["x"]) - shift * width, width, float(text.attrib["y"])))
    return [
        (a, b)
        for (a, x, width, y), (b, other_x, other_width, other_y) in combinations(boxes, 2)
        if x < other_x + other_width and other_x < x + width and abs(y - other_y) < 16
    ]


@pytest.mark.parametrize(
    "points",
    [
        [(1, 14.8), (2, 27.5), (4, 55.5), (8, 109.3)],  # the first is near the line
        [(1, 3.3), (2, 6.5), (4, 12.7), (8, 24.0)],  # and the last
        [(1, 24.0)],
    ],
)
def test_what_the_line_of_real_time_means_is_not_written_over_a_points_label(points):
    found = [Point(*point) for point in points]
    assert overlapping(plots.scaling(found, found, 25.0, "note")) == []


@pytest.mark.parametrize("limit", [0.0007, 0.9, 1.0, 3.3, 25, 117])
def test_ticks_are_round_and_reach_the_end(limit):
    found = plots.ticks(limit)
    assert found[0] == 0
    assert 3 <= len(found) <= 8
    assert limit - found[-1] < found[1]
    assert found[-1] <= limit * (1 + 1e-9)


@pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
def test_in_a_browser_no_text_of_a_plot_is_cut_off(tmp_path):
    """Also of a chunk that just holds, whose deadline is at the very right, and of one far from holding."""
    texts = [page(make(4, 20, noise=0.03), [make(1), make(2)]), page(make(1, 3, slower=20.0))]
    texts.append(page(make(8, 1), [make(1)]))
    paths = [tmp_path / f"page-{index}.html" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    with Browser("about:blank") as browser:
        for path in paths:
            browser.ask("Page.navigate", url=path.as_uri())
            ready = f"location.href.endsWith('{path.name}') && document.querySelectorAll('svg').length >= 4"
            assert browser.wait_for(ready, 20)
            assert browser.value(OUTSIDE) == []
            assert browser.value("document.body.scrollWidth <= window.innerWidth")


def test_points_of_one_count_stand_alone():
    ElementTree.fromstring(plots.scaling([Point(1, 9.0)], [], 25.0, "note"))
