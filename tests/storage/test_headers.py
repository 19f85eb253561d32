import contextlib
import json
import struct
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spectrim.errors import ArtifactError
from spectrim.storage.headers import DTYPE_BITS, read_header
from spectrim.storage.json_file import read_json
from spectrim.storage.table import parse_table

BOUNDED = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def written(path, header, data=b"", *, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def valid():
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }


@BOUNDED
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool]),
)
def test_the_header_says_what_safetensors_wrote(tmp_path, shapes, dtype):
    tensors = {f"t{i}": torch.zeros(shape, dtype=dtype) for i, shape in enumerate(shapes)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    entries = read_header(path)
    assert {n: e.shape for n, e in entries.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {e.bytes for e in entries.values()} == {
        prod(t.shape) * t.element_size() for t in tensors.values()
    }
    assert all(DTYPE_BITS[e.dtype] == 8 * dtype.itemsize for e in entries.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["b"].update(dtype="X9"), "'b' has the unknown dtype 'X9'"),
        (lambda h: h["b"].update(shape=[-4]), "'b' has no valid shape"),
        (lambda h: h["b"].update(shape=[True] * 4), "'b' has no valid shape"),
        (lambda h: h["b"].update(shape=[1] * 40), "'b' has no valid shape"),
        (lambda h: h["b"].update(shape=[2**62, 2**62]), "'b' of shape"),
        (lambda h: h["b"].update(shape=[5]), "needs 10 bytes, its data_offsets span 8"),
        (lambda h: h["b"].update(data_offsets=[32, 24]), "'b' has no valid data_offsets"),
        (lambda h: h["b"].update(data_offsets=[16, 24]), "'b' starts at byte 16"),
        (lambda h: h["b"].update(data_offsets=[32, 40]), "'b' starts at byte 32"),
        (lambda h: h["b"].update(shape=[8], data_offsets=[24, 40]), "'b' ends at byte 40"),
        (lambda h: h.pop("b"), "8 bytes at its end belong to no tensor"),
        (lambda h: h.update(b=3), "'b' has no description"),
    ],
)
def test_a_damaged_header_names_file_and_tensor(tmp_path, change, message):
    header = valid()
    change(header)
    path = written(tmp_path / "model-00001-of-00002.safetensors", header, bytes(32))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_header(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "length"),
    [
        (b"", None),
        (b"{}", 2**63),
        (b"{}", 3),
        (b"[" * 200_000, None),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b'{"a": ' + b"1" * 9000 + b"}", None),
        (b'{"a": {}, "a": {}}', None),
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, raw, length):
    with pytest.raises(ArtifactError):
        read_header(written(tmp_path / "x.safetensors", raw, length=length))


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        read_header(tmp_path / "x.safetensors")


@BOUNDED
@given(cut=st.integers(0, 10_000))
def test_every_truncation_is_refused(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(ArtifactError):
        read_header(path)


@BOUNDED
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1))
def test_flipped_bytes_never_escape_as_another_error(tmp_path, flips):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7)}, path)
    raw = bytearray(path.read_bytes())
    for position, mask in flips:
        raw[position % len(raw)] ^= mask
    path.write_bytes(raw)
    try:
        entries = read_header(path)
    except ArtifactError:
        return
    assert sum(e.bytes for e in entries.values()) <= len(raw)


@BOUNDED
@given(raw=st.binary(max_size=200))
def test_arbitrary_bytes_never_escape_as_another_error(tmp_path, raw):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with contextlib.suppress(ArtifactError):
        assert read_header(path) == {}
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with contextlib.suppress(ArtifactError):
        assert read_header(path) == {}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@BOUNDED
@given(fields=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON))
def test_arbitrary_descriptions_never_escape_as_another_error(tmp_path, fields):
    path = written(tmp_path / "x.safetensors", {"a": fields}, bytes(8))
    with contextlib.suppress(ArtifactError):
        assert read_header(path)["a"].bytes == 8


@BOUNDED
@given(
    table=st.fixed_dictionaries(
        {},
        optional={
            "format_version": JSON,
            "layers": JSON | st.dictionaries(st.text(max_size=5), JSON, max_size=3),
            "left_dense": JSON,
            "provenance": JSON,
            "dequantize": JSON,
        },
    )
)
def test_arbitrary_tables_never_escape_as_another_error(table):
    try:
        parsed = parse_table(table, source="fuzz")
    except ArtifactError:
        return
    assert parse_table(parsed.to_json(), source="again") == parsed


def test_json_files_are_bounded_and_objects(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    for text in ("[1]", "{", "[" * 100_000, "\x00"):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"x\.json"):
            read_json(path)
    path.write_text(json.dumps({"a": "b" * 100}))
    assert read_json(path) == {"a": "b" * 100}
    monkeypatch.setattr("spectrim.storage.json_file.JSON_LIMIT", 50)
    with pytest.raises(ArtifactError, match="larger than the 50 bytes"):
        read_json(path)
