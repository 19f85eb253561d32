"""The page holds what it was given, escaped, with figures, and reaches for nothing outside."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from spectrim.errors import ArtifactError
from spectrim.evaluate.distortion import BLOCK, Distortion
from spectrim.evaluate.points import CurvePoint
from spectrim.evaluate.samples import Sample
from spectrim.report.content import (
    PageContent,
    block_and_projection,
    read_curve_file,
    read_result,
)
from spectrim.report.drawing import new_figure, series_styles
from spectrim.report.figures import draw_curve
from spectrim.report.page import render_page
from spectrim.storage.paths import without_folders

NASTY = "<script>alert('1')</script>&\"$x^2$"


def target(block, projection, kept):
    return {
        "name": f"model.layers.{block}.{projection}",
        "shape": [40, 54],
        "rank": 7,
        "storage": "factored",
        "weights": "native",
        "bytes": int(4320 * kept),
        "dense_bytes": 4320,
        "kept": kept,
        "predicted_error": 0.1 * kept,
        "measured_error": 0.11 * kept,
        "damping": 0.0,
    }


def report(name="a model"):
    projections = ("self_attn.q_proj", "mlp.up_proj")
    return {
        "model": name,
        "recipe": {"name": name, "hash": "0" * 64},
        "keep": {
            "asked": 0.6,
            "achieved": 0.5987,
            "whole_model": 0.7,
            "target_bytes": {"dense": 17280, "stored": 10368},
            "model_bytes": {"dense": 30000, "stored": 23000},
        },
        "rule": "uniform",
        "predicted_loss": None,
        "targets": [target(b, p, 0.4 + 0.2 * b) for b in range(3) for p in projections],
        "blocks": {},
        "notes": [name],
        "seconds": {"compress": 2.5},
        "environment": {"torch": "2"},
        "left_alone": {"model.layers.0.router": name},
        "calibration": {"windows": 4, "sources": [name]},
        "peak_memory_bytes": 10**9,
    }


def point(recipe, bits):
    return CurvePoint(
        recipe=recipe,
        keep=bits / 16,
        achieved=bits / 16,
        target_bytes=1000,
        model_bytes=2000,
        bits_per_weight=bits,
        nll=3.0,
        perplexity=20.0,
        excess=1 / bits,
        excess_low=0.9 / bits,
        excess_high=1.1 / bits,
        kl=1 / bits,
        kl_error=0.01,
        top1=0.8,
        seconds=1.0,
    )


def full(name="a model"):
    return PageContent(
        report=report(name),
        recipe_yaml=f"name: {name}\n",
        curve=[point(recipe, bits) for recipe in (name, "other") for bits in (4.0, 8.0, 12.0)],
        spectra={t["name"]: [1 / (k + 1) ** 2 for k in range(40)] for t in report()["targets"]},
        depth=[
            Distortion(m, b, p, 0.1 * (b + 1), 0.2, 0.01)
            for m in (name, "other")
            for b in range(3)
            for p in ("mlp.up_proj", BLOCK)
        ],
        evaluations=[
            {
                "model": name,
                "parameters": 12345,
                "perplexity": {
                    "text": {
                        "perplexity": 20.5,
                        "standard_error": None,
                        "nll": 3.0,
                        "protocol": {"windows": 3},
                    }
                },
            }
        ],
        samples=[Sample("dense", name, name, ()), Sample("compressed", name, "words", ())],
    )


class Reader(HTMLParser):
    """Collects tags, ids, text and every address that the page would load."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "data", "srcset"):
                self.links.append(value)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_complete_and_loads_nothing():
    html = render_page(full())
    page = Reader(html)
    assert page.tags.count("figure") == page.tags.count("svg") == 7
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)|@import", html)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "prefers-color-scheme: dark" in html
    words = " ".join(page.text)
    for expected in ("0.5987", "20.5", "model.layers.2.mlp.up_proj", "1.00 GB", "name: a model"):
        assert expected in words


def test_what_comes_from_files_is_escaped():
    page = Reader(render_page(full(NASTY)))
    assert "script" not in page.tags
    assert any(NASTY in text for text in page.text)


def test_a_bare_report_is_enough():
    html = render_page(PageContent(report=report()))
    assert Reader(html).tags.count("svg") == 2


def measured(**changes):
    def perplexity(value):
        return {"perplexity": value, "nll": 3.0, "standard_error": 0.5}

    text = {
        "text": "heldout.txt",
        "kind": "other",
        "what": "another text than the run was calibrated on",
        "windows": 12,
        "window_length": 256,
        "dense": perplexity(41.43),
        "compressed": perplexity(45.52),
        "difference": {"nll": 0.094, "nll_standard_error": 0.01},
    }
    return {"texts": [{**text, **changes}], "why_not": None}


def test_the_page_begins_with_one_sentence_and_two_bars():
    content = PageContent(report={**report(), "measured": measured()})
    html = render_page(content)
    assert "<h1>30 % smaller, perplexity 41.4 → 45.5</h1>" in html
    widths = [float(w) for w in re.findall(r"calc\(\(100% - 6rem\) \* ([\d.]+)\)", html)]
    assert widths == pytest.approx([1, 23 / 30, 41.43 / 45.52, 1], abs=1e-4)
    places = [html.index(word) for word in ("<h1>", 'class="bars"', 'id="layers"', 'id="details"')]
    assert places == sorted(places)


def test_a_predicted_loss_stands_beside_the_measured_one():
    told = {**report(), "predicted_loss": 0.04, "predicted_loss_unit": "nats per token"}
    said = "0.04 nats per token; measured +0.094 ± 0.01 on heldout.txt, 2.4 times as much"
    assert said in render_page(PageContent(report={**told, "measured": measured()}))
    assert "such predictions were off" in render_page(PageContent(report=told))


def test_without_a_measurement_the_page_says_why():
    absent = {"texts": [], "why_not": "the recipe reads no text"}
    html = render_page(PageContent(report={**report(), "measured": absent}))
    assert "<h1>30 % smaller</h1>" in html
    assert "Quality was not measured: the recipe reads no text." in html


def test_no_folder_of_this_machine_is_on_the_page():
    told = report() | {"model": "/home/me/models/llama"}
    told["notes"] = ["see /home/me/notes.txt and C:\\Users\\me\\x.txt"]
    told["calibration"]["sources"] = ["/home/me/text.txt"]
    content = PageContent(told, recipe_yaml="text: /home/me/a.txt\nurl: https://a.org/b/c\n")
    html = render_page(content)
    assert "/home" not in html and "Users" not in html
    for kept in ("notes.txt", "x.txt", "text.txt", "a.txt", "https://a.org/b/c", "llama"):
        assert kept in html


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("/a/b/c.txt", "c.txt"),
        ("text: ~/data/x.jsonl:0.7", "text: x.jsonl:0.7"),
        ("either/or, 3/4, a/b-model", "either/or, 3/4, a/b-model"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        (
            "[url](https://github.com/spectrim/spectrim)",
            "[url](https://github.com/spectrim/spectrim)",
        ),
        ("'./out/model' and '../x'", "'model' and 'x'"),
    ],
)
def test_paths_lose_their_folders_and_nothing_else_does(text, without):
    assert without_folders(text) == without


def test_no_two_series_share_color_and_line():
    styles = [(s["color"], s["linestyle"]) for s in series_styles(36)]
    assert len(set(styles)) == 36


def test_equal_content_gives_equal_bytes():
    assert render_page(full()) == render_page(full())


def test_a_folder_is_read_and_damage_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="is no result of `spectrim compress`"):
        read_result(tmp_path)
    (tmp_path / "spectrim_report.json").write_text(json.dumps(report()))
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    content = read_result(tmp_path)
    assert content.recipe_yaml == "name: x\n"
    broken = report()
    broken["targets"][1]["kept"] = "much"
    (tmp_path / "spectrim_report.json").write_text(json.dumps(broken))
    with pytest.raises(ArtifactError, match=r"targets\.1\.kept: .*valid number"):
        read_result(tmp_path)
    del broken["keep"]["achieved"]
    (tmp_path / "spectrim_report.json").write_text(json.dumps(broken))
    with pytest.raises(ArtifactError, match=r"keep\.achieved: .*required"):
        read_result(tmp_path)


def test_a_curve_file_is_read_and_others_are_refused(tmp_path):
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({"points": [point("a", 4.0).record()]}))
    assert read_curve_file(tmp_path) == read_curve_file(path) == [point("a", 4.0)]
    path.write_text(json.dumps({"points": 3}))
    with pytest.raises(ArtifactError, match="list of points"):
        read_curve_file(path)


def test_names_become_places():
    assert block_and_projection("model.layers.3.mlp.experts.2.up") == (3, "mlp.experts.2.up")
    assert block_and_projection("lm_head") == (0, "lm_head")


def drawn_lines(points, **options):
    with new_figure() as (figure, axes):
        draw_curve(axes, points, **options)
        figure.canvas.draw()
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        return lines, axes.get_yscale(), axes.get_ylim(), axes.get_xlabel()


def test_the_hull_is_drawn_as_chords_and_dense_formats_stand_alone():
    points = [point("a", 4.0), point("a", 12.0), replace(point("dense int8", 8.1), excess=1e-3)]
    points.append(replace(point("a", 14.0), excess=1e-4))
    lines, scale, _, label = drawn_lines(points)
    assert scale == "log" and "lower edge" not in label
    assert lines["dense int8"] == [[8.1, 1e-3]]
    assert [x for x, _ in lines["a"][::40]] == [4.0, 12.0, 14.0]
    hull = lines["lower convex hull"]
    # Straight in nats on every piece, which is a curve on this axis.
    ends = [(4.0, 0.25), (8.1, 1e-3), (14.0, 1e-4)]
    for x, y in hull:
        (x1, y1), (x2, y2) = ends[:2] if x <= 8.1 else ends[1:]
        assert y == pytest.approx(y1 + (x - x1) / (x2 - x1) * (y2 - y1))
    assert len(hull) > 20
    # Nowhere above what is drawn: neither the points nor the lines between them.
    for drawn in (lines["a"], lines["dense int8"]):
        for x, y in drawn:
            below = [v for h, v in hull if h <= x][-1:] or [math.inf]
            above = [v for h, v in hull if h >= x][:1] or [0.0]
            assert y >= min(below[0], above[0]) * (1 - 1e-9)


def test_a_loss_below_zero_stands_on_the_edge_of_a_logarithmic_axis():
    points = [point("a", 4.0), replace(point("a", 12.0), excess=1e-3)]
    points.append(replace(point("dense int8", 8.1), excess=-1e-5, excess_low=-1e-4))
    lines, scale, (bottom, _), label = drawn_lines(points)
    assert scale == "log" and "no loss could be measured" in label
    ((_, shown),) = lines["dense int8"]
    assert bottom < shown < 1e-3
