"""The slider's server: sizes, streams, one request at a time, and nobody but its own page."""

from __future__ import annotations

import http.client
import json
import threading
import time

import pytest

from slider_cases import IDS, Elastic, tiny, words
from spectrim.data.windows import given_windows
from spectrim.errors import OutputError
from spectrim.evaluate.perplexity import perplexity
from spectrim.evaluate.samples import continuations
from spectrim.serve.slider.engine import Engine
from spectrim.serve.slider.server import SliderServer


@pytest.fixture
def served():
    engine = Engine(
        name="tiny <artifact>",
        dense=tiny(0),
        elastic=Elastic(),
        tokenizer=words(),
        smallest_keep=0.25,
        other_bytes=500,
        windows=given_windows(IDS),
        known={1.0: 4.0, 0.5: 16.0},
    )
    server = SliderServer(engine, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, path, body=None, headers=None):
    """Status and body; an answer in lines as a list."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    method = "GET" if body is None else "POST"
    data = None if body is None else json.dumps(body)
    connection.request(method, path, data, headers or {})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    if answer.getheader("Content-Type") == "application/x-ndjson":
        return answer.status, [json.loads(line) for line in text.splitlines()]
    return answer.status, json.loads(text) if "json" in answer.getheader("Content-Type") else text


def test_the_page_and_its_facts(served):
    status, page = ask(served, "/")
    assert status == 200
    assert "https://" not in page and "http://" not in page
    assert ask(served, "/facts")[1]["smallest_keep"] == 0.25
    assert ask(served, "/other")[0] == 404
    assert served.url.startswith("http://127.0.0.1:")


def test_a_size_has_bytes_an_estimate_and_a_measurement(served):
    status, size = ask(served, "/size", {"keep": 0.75})
    assert status == 200
    assert (size["bytes"], size["dense_bytes"]) == (1250, 1500)
    assert size["estimated"] == pytest.approx(8.0)  # half-way in the logarithm
    assert size["measured"] is None
    expected = perplexity(served.engine.elastic.model, IDS).perplexity
    assert ask(served, "/facts")[1]["curve"][-1] == {"keep": 1.0, "perplexity": 4.0}
    assert ask(served, "/measure", {"keep": 0.75})[1]["measured"] == pytest.approx(expected)
    size = ask(served, "/size", {"keep": 0.75})[1]
    assert size["measured"] == size["estimated"] == pytest.approx(expected)
    assert ask(served, "/size", {"keep": 0.4})[1]["estimated"] is None


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/size", {"keep": 0.2}, "smallest is 0.25"),
        ("/size", {"keep": 1.5}, "fraction"),
        ("/size", {"keep": "much"}, "fraction"),
        ("/size", {"keep": True}, "fraction"),
        ("/size", [1], "no JSON object"),
        ("/continue", {"prompt": " \n", "keep": 1.0}, "at least one word"),
        ("/continue", {"prompt": "w1", "keep": 0.1}, "smallest is 0.25"),
        ("/continue", {"prompt": "w1", "keep": 1.0, "tokens": 10**6}, "1 to 200"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_the_model_free(served, path, body, words):
    status, answer = ask(served, path, body)
    assert status == 400
    assert words in answer["error"]
    assert ask(served, "/size", {"keep": 0.5})[0] == 200


def test_the_stream_writes_what_both_models_write(served):
    status, events = ask(served, "/continue", {"prompt": "w3 w5", "keep": 0.5, "tokens": 9})
    assert status == 200
    assert events[0]["size"]["bytes"] == 1000
    engine = served.engine
    pair = {"dense": engine.dense, "compressed": engine.elastic.model}
    for sample in continuations(pair, words(), ["w3 w5"], new_tokens=9):
        mine = [event for event in events if event.get("model") == sample.model]
        assert "".join(event["text"] for event in mine) == sample.continuation
        assert mine[-1]["done"] and mine[-1]["tokens"] == 9
        assert mine[-1]["tokens_per_second"] > 0
        # The speed is told while the text is written, not only at its end.
        assert [event["tokens"] for event in mine] == list(range(1, 10))
    # Side by side, not one after the other.
    assert [event["model"] for event in events[1:5]] == ["dense", "compressed"] * 2


def test_a_very_long_prompt_is_cut_and_said_so(served):
    long = "w1 " * 5000
    status, events = ask(served, "/continue", {"prompt": long, "keep": 0.5, "tokens": 4})
    assert status == 200
    assert events[1] == {"note": "the prompt has 5000 tokens; its last 60 are used"}
    assert events[-1]["done"]


def test_a_request_of_megabytes_is_read_to_its_end_and_refused(served):
    # Closing early would cut the connection, and a browser would show no reason.
    status, answer = ask(served, "/continue", {"prompt": "w1 " * 700_000, "keep": 0.5})
    assert status == 400
    assert "at most 1048576" in answer["error"]
    assert ask(served, "/size", {"keep": 0.5})[0] == 200


def test_two_tabs_write_side_by_side_each_at_its_own_size(served):
    engine = served.engine
    models = {0.9: engine.elastic.large, 0.3: engine.elastic.small}
    streams = {keep: engine.continuations("w3 w5", keep, 9) for keep in models}
    heard = {keep: "" for keep in models}
    while streams:
        for keep, events in list(streams.items()):
            event = next(events, None)
            if event is None:
                del streams[keep]
            elif event.get("model") == "compressed":
                heard[keep] += event["text"]
            # Between two tokens a size is known at once, whoever is writing.
            assert ask(served, "/size", {"keep": 0.5})[0] == 200
    for keep, model in models.items():
        (alone,) = continuations({"it": model}, words(), ["w3 w5"], new_tokens=9)
        assert heard[keep] == alone.continuation


def test_a_measurement_is_waited_for_and_said_to_be_busy(served):
    with served.engine._at(0.5):
        status, answer = ask(served, "/measure", {"keep": 0.6})
        assert status == 409
        assert "busy" in answer["busy"]
    assert ask(served, "/measure", {"keep": 0.6})[0] == 200


def test_a_closed_tab_leaves_the_model_free(served):
    connection = http.client.HTTPConnection(*served.server_address, timeout=20)
    body = json.dumps({"prompt": "w1", "keep": 0.5, "tokens": 200})
    connection.request("POST", "/continue", body)
    connection.getresponse().readline()
    connection.close()  # in the middle of the stream
    deadline = time.monotonic() + 20
    while ask(served, "/measure", {"keep": 0.5})[0] == 409:
        assert time.monotonic() < deadline


def test_a_size_is_saved_where_the_server_says(served, tmp_path):
    assert ask(served, "/facts")[1]["saves"] is False
    assert "may not write" in ask(served, "/save", {"keep": 0.5})[1]["error"]
    asked = []
    served.engine.write = lambda keep: asked.append(keep) or tmp_path / "there"
    status, saved = ask(served, "/save", {"keep": 0.5, "folder": "/etc"})
    assert (status, saved["folder"], saved["bytes"]) == (200, str(tmp_path / "there"), 1000)
    assert asked == [0.5]
    assert ask(served, "/save", {"keep": 0.1})[0] == 400


def test_other_pages_and_other_names_are_refused(served):
    body = {"keep": 0.5}
    assert ask(served, "/size", body, {"Origin": "https://example.com"})[0] == 403
    assert ask(served, "/size", body, {"Host": "example.com"})[0] == 403
    own = served.url.rstrip("/")
    assert ask(served, "/size", body, {"Origin": own})[0] == 200


def test_a_taken_port_is_named(served):
    with pytest.raises(OutputError, match=r"cannot listen on 127\.0\.0\.1"):
        SliderServer(served.engine, port=served.server_address[1])
