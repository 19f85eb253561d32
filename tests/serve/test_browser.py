"""The slider's page in a real browser: sizes, texts, prompts, busy models, closed tabs."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from slider_cases import IDS, Elastic, tiny, words
from spectrim.data.windows import given_windows
from spectrim.evaluate.perplexity import perplexity
from spectrim.evaluate.samples import continuations
from spectrim.serve.slider.engine import Engine
from spectrim.serve.slider.server import SliderServer

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-sync"),
)


@pytest.fixture(scope="module")
def engine():
    windows = given_windows(IDS)
    dense = tiny(0)
    return Engine(
        name="tiny <artifact>",
        dense=dense,
        elastic=Elastic(),
        tokenizer=words(),
        smallest_keep=0.25,
        other_bytes=500,
        model_name="tiny <model>",
        write=lambda keep: Path(f"tiny-{keep:.2f}"),
        windows=windows,
        measured={1.0: perplexity(dense, windows).perplexity, 0.25: 64.0},
    )


@pytest.fixture(scope="module")
def server(engine):
    server = SliderServer(engine, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs the browser chromium")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def tabs(browser, server):
    """Opens tabs of one window; a message in a tab's console fails the test."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    said = []

    def open_tab():
        tab = context.new_page()
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.goto(server.url)
        until(tab, "bytes", lambda text: text == "1.5 kB")
        return tab

    yield open_tab
    context.close()
    assert not said


def until(tab, place, right, seconds=30):
    """The text of a place of the page, once it is right."""
    deadline = time.monotonic() + seconds
    while not right(text := tab.text_content(f"#{place}")):
        assert time.monotonic() < deadline, f"{place} says {text!r}"
        tab.wait_for_timeout(20)
    return text


def position(tab, place):
    """Left and upper edge of what is drawn there now: read at once, as the curve is drawn anew."""
    box = f"document.querySelector({place!r}).getBoundingClientRect()"
    return tab.evaluate(f"[{box}.x, {box}.y]")


def move(tab, keep):
    tab.locator("#keep").fill(str(keep))


def written(engine, model, prompt, tokens=32):
    # Half of the 64 positions at most: what the engine leaves for the answer.
    found = continuations({"it": model}, words(), [prompt], new_tokens=tokens)
    return found[0].continuation.strip()


def test_moving_the_slider_changes_size_prediction_measurement_and_text(engine, tabs):
    tab = tabs()
    assert tab.title() == "tiny <model> · spectrim slider"
    assert tab.text_content("#model") == "tiny <model>"
    assert "tiny <artifact>" in tab.text_content("#name")
    tab.fill("#prompt", "w3 w5")
    tab.click("#go")
    dense = written(engine, engine.dense, "w3 w5")
    until(tab, "text-dense", lambda text: text == dense)
    large = written(engine, engine.elastic.large, "w3 w5")
    until(tab, "text-compressed", lambda text: text == large)
    until(tab, "speed-compressed", lambda text: text.startswith("32 tokens, "))
    assert "tokens/s" in tab.text_content("#speed-dense")

    move(tab, 0.4)
    until(tab, "bytes", lambda text: text == "900 B")
    assert tab.text_content("#shown") == "40 %"
    assert tab.text_content("#share") == "60 %"
    small = written(engine, engine.elastic.small, "w3 w5")
    assert small != large
    until(tab, "text-compressed", lambda text: text == small)
    before = perplexity(engine.dense, IDS).perplexity
    predicted = before**0.2 * 64**0.8  # straight in the logarithm between 1 and 0.25
    assert float(tab.text_content("#estimated")) == pytest.approx(predicted, rel=0.01)
    expected = perplexity(engine.elastic.small, IDS).perplexity
    until(tab, "measured", lambda text: text == f"{float(f'{expected:.3g}'):g}")


def test_the_dot_moves_along_the_curve_and_the_dense_model_is_its_reference(tabs):
    tab = tabs()
    heights = {}
    for keep, size in ((1, "1.5 kB"), (0.6, "1.1 kB"), (0.25, "750 B")):
        move(tab, keep)
        until(tab, "bytes", lambda text, size=size: text == size)
        heights[keep] = position(tab, "#curve .dot")
    assert heights[1][0] > heights[0.6][0] > heights[0.25][0]
    assert heights[1][1] != heights[0.25][1]
    line = position(tab, "#curve .dense")
    assert abs(line[1] - heights[1][1] - 7) < 3  # the dot of the dense size lies on it
    assert "dense" in tab.text_content("#curve")


def test_a_size_that_writes_nothing_sensible_does_not_flatten_the_curve(engine, tabs, monkeypatch):
    dense = engine.facts()["curve"][-1]["perplexity"]
    heights = {}
    for last in (64.0, 1e6):
        monkeypatch.setattr(engine, "measured", {1.0: dense, 0.5: 2 * dense, 0.25: last})
        tab = tabs()
        until(tab, "curve", bool)
        points = tab.locator("#curve .point").all()
        heights[last] = abs(points[0].bounding_box()["y"] - points[-1].bounding_box()["y"])
        top = tab.evaluate("document.querySelector('#curve .axis + .axis').getBBox().y")
        assert all(float(p.get_attribute("cy")) >= top for p in points)
    assert heights[1e6] > 50


def test_this_size_is_saved(tabs):
    tab = tabs()
    move(tab, 0.4)
    until(tab, "bytes", lambda text: text == "900 B")
    tab.click("#save")
    until(tab, "message", lambda text: text == "saved 900 B to tiny-0.40")


def test_no_size_below_the_end_can_be_chosen(tabs):
    tab = tabs()
    tab.evaluate("(() => { document.getElementById('keep').value = 0.01; })()")
    assert tab.input_value("#keep") == "0.25"


def test_strange_prompts_are_answered_in_words(tabs):
    tab = tabs()
    for prompt, answer in ((" \n ", "at least one word"), ("w1 " * 5000, "its last 32 are used")):
        tab.fill("#prompt", prompt)
        tab.click("#go")
        until(tab, "message", lambda text, answer=answer: answer in text)
    until(tab, "text-dense", bool)


def test_a_second_tab_writes_while_the_first_does(engine, tabs):
    first, second = tabs(), tabs()
    move(second, 0.3)
    until(second, "bytes", lambda text: text == "800 B")
    for tab in (first, second):
        tab.fill("#prompt", "w3 w5")
        tab.click("#go")
    for tab, model in ((first, engine.elastic.large), (second, engine.elastic.small)):
        text = written(engine, model, "w3 w5")
        until(tab, "text-compressed", lambda found, text=text: found == text)
    second.click("#go")
    second.close()
    first.click("#go")
    until(first, "speed-dense", lambda text: text.startswith("32 tokens"))


def test_without_a_text_no_room_is_left_for_a_curve_and_the_page_says_how_to_get_one(
    engine, tabs, monkeypatch
):
    shown, hidden = tabs(), "document.getElementById('{}').getBoundingClientRect().height === 0"
    assert not shown.evaluate(hidden.format("curve")) and shown.evaluate(hidden.format("without"))
    monkeypatch.setattr(engine, "windows", None)
    facts = {**engine.facts(), "curve": []}
    monkeypatch.setattr(engine, "facts", lambda: facts)
    bare = tabs()
    assert bare.evaluate(hidden.format("curve")) and not bare.evaluate(hidden.format("without"))
    assert "--evaluation-text" in bare.text_content("#without")


def test_nothing_overflows_or_overlaps(tabs):
    tab = tabs()
    tab.click("#go")
    until(tab, "speed-compressed", lambda text: text.startswith("32 tokens"))
    for width in (400, 1400):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        places = tab.locator("dl div, article, textarea, button").all()
        boxes = [place.bounding_box() for place in places]
        boxes = [(b["x"], b["y"], b["x"] + b["width"], b["y"] + b["height"]) for b in boxes]
        for i, a in enumerate(boxes):
            assert a[0] >= 0 and a[2] <= width
            for b in boxes[:i]:
                assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
