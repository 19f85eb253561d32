"""Damage that a file can come with, by chance or by intent, for hypothesis to draw from."""

import copy
import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

BOUNDED = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NESTED = json.loads("[" * 200 + "]" * 200)
ODD = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, -1e308,
        float("inf"), float("nan"), "", "5", "../../etc/passwd", "/etc/passwd", "a/../b", "..",
        "C:\\x", "a\x00b", "\ud800", "<script>alert(1)</script>", "__class__", "x" * 5000,
        "{{7*7}}",
        [], {}, [[]], {"a": {"b": []}}, [1] * 3, NESTED, {"../x": 1}, [None] * 100,
    ]
)  # fmt: skip


def places(data, path=()):
    """Every path to a value inside JSON data, outermost first."""
    found = [path]
    inner = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in inner:
        found += places(value, (*path, key)) if isinstance(value, dict | list) else [(*path, key)]
    return found


@st.composite
def damaged_json(draw, data):
    """JSON text of `data` with one to three values replaced, removed, renamed or repeated."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        choices = [path for path in places(data) if path]
        if not choices:
            break
        path = draw(st.sampled_from(choices))
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename", "repeat"]))
        if kind == "replace":
            parent[path[-1]] = copy.deepcopy(draw(ODD))
        elif kind == "remove":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            name = draw(st.sampled_from(["../up", "/abs", "", "a.b", "x" * 2000, "\x00", "<b>"]))
            value = parent.pop(path[-1]) if kind == "rename" else parent[path[-1]]
            parent[name] = copy.deepcopy(value)
    return json.dumps(data).encode()


@st.composite
def damaged_bytes(draw, raw):
    """`raw` with bytes flipped, cut off, repeated or put in between; headers more often."""
    raw = bytearray(raw)
    end = draw(st.sampled_from([16, 200, len(raw)]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(end, len(raw)) - 1)))
        kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "repeat"]))
        if kind == "flip" and raw:
            raw[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del raw[at:]
        elif kind == "insert":
            raw[at:at] = draw(st.binary(min_size=1, max_size=12))
        else:
            raw += raw[at : at + 50]
    return bytes(raw)


def everything_in(folder):
    """Path -> content of all files below, to see that nothing was written."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
