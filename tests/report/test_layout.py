"""The page in a real browser: nothing overlaps, overflows or is empty, at 400 and 1400 pixels."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spectrim.report.page import render_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (400, 1400)

PROBE = """
const box = (e) => {
  const r = e.getBoundingClientRect();
  return [r.left, r.top, r.right, r.bottom];
};
const found = [...document.querySelectorAll("iframe")].map((frame) => {
  const page = frame.contentDocument;
  const marks = (svg) => [...svg.querySelectorAll("path,use")].map(box);
  return {
    width: frame.clientWidth,
    overflow: page.documentElement.scrollWidth - frame.clientWidth,
    figures: [...page.querySelectorAll("figure")].map(box),
    svgs: [...page.querySelectorAll("svg")].map((svg) => ({ box: box(svg), marks: marks(svg) })),
    scale: [...page.querySelectorAll("svg")].map(
      (svg) => svg.clientWidth / svg.viewBox.baseVal.width),
    ink: getComputedStyle(page.body).color,
    drawn: getComputedStyle(page.querySelector("svg")).color,
  };
});
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
"""


def content():
    path = Path(__file__).with_name("test_page.py")
    spec = importlib.util.spec_from_file_location("page_cases", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.full()


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs the browser chromium")
    folder = tmp_path_factory.mktemp("layout")
    page = html.escape(render_page(content()), quote=True)
    frames = "".join(
        f'<iframe srcdoc="{page}" style="width:{w}px;height:900px;border:0"></iframe>'
        for w in WIDTHS
    )
    outer = folder / "outer.html"
    script = f"<script>addEventListener('load', () => {{ {PROBE} }})</script>"
    outer.write_text(f"<!doctype html><body>{frames}{script}</body>", encoding="utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000"),
            *(f"--user-data-dir={folder}/profile", "--virtual-time-budget=4000", "--dump-dom"),
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert text is not None, done.stderr[-2000:]
    return json.loads(html.unescape(text[1]))


def overlap(a, b):
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1


def test_the_page_fits_its_width(layouts):
    assert [layout["width"] for layout in layouts] == list(WIDTHS)
    assert all(layout["overflow"] <= 0 for layout in layouts)


def test_figures_are_seen_and_do_not_overlap(layouts):
    for layout in layouts:
        figures = layout["figures"]
        assert len(figures) == 7
        assert not any(overlap(a, b) for i, a in enumerate(figures) for b in figures[:i])
        assert all(0 <= left < right <= layout["width"] for left, _, right, _ in figures)


def test_every_picture_is_drawn_inside_its_frame(layouts):
    for layout in layouts:
        for svg in layout["svgs"]:
            left, top, right, bottom = svg["box"]
            assert right - left > 250 and bottom - top > 100
            seen = [m for m in svg["marks"] if m[2] > m[0] or m[3] > m[1]]
            assert len(seen) > 20
            inside = [
                m[0] >= left - 1 and m[2] <= right + 1 and m[1] >= top - 1 and m[3] <= bottom + 1
                for m in seen
            ]
            assert all(inside)


def test_the_smallest_text_of_a_picture_is_legible(layouts):
    smallest = 9.0  # points, of cells and legends
    for layout in layouts:
        assert min(layout["scale"]) * smallest >= 9.5


def test_pictures_are_drawn_in_the_ink_of_the_page(layouts):
    assert all(layout["ink"] == layout["drawn"] for layout in layouts)


def test_one_column_on_a_phone_and_three_on_a_desk(layouts):
    columns = [len({figure[0] for figure in layout["figures"]}) for layout in layouts]
    assert columns == [1, 3]
