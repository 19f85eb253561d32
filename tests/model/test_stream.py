"""A stream gives back what was written, in memory and on disk alike."""

import errno

import pytest
import torch

from spectrim.errors import OutputError
from spectrim.model import stream as stream_module
from spectrim.model.stream import Stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mapped_equals_in_memory(tmp_path, dtype):
    states = torch.randn(7, 3, 5)
    memory = Stream.empty(7, 3, 5, dtype)
    mapped = Stream.empty(7, 3, 5, dtype, tmp_path / "deep" / "folder")
    for stream in (memory, mapped):
        for rows in stream.batches(3):
            stream.write(rows, states[rows])
    assert mapped.path.stat().st_size == 7 * 3 * 5 * dtype.itemsize
    assert (mapped.shape, mapped.dtype, len(mapped)) == (memory.shape, dtype, 7)
    assert torch.equal(mapped.read(slice(0, 7)), memory.read(slice(0, 7)))
    assert torch.equal(mapped.read(slice(2, 4)), states[2:4].to(dtype))


def test_batches_cover_every_window_once():
    stream = Stream.empty(7, 1, 1, torch.float32)
    assert [(s.start, s.stop) for s in stream.batches(3)] == [(0, 3), (3, 6), (6, 7)]
    with pytest.raises(ValueError, match="at least 1"):
        list(stream.batches(0))


def test_reading_gives_a_copy_and_duplicates_are_independent(tmp_path):
    stream = Stream(torch.zeros(2, 2, 2))
    stream.read(slice(0, 2)).add_(1)
    other = stream.duplicate(tmp_path)
    other.write(slice(0, 1), torch.ones(1, 2, 2))
    assert stream.read(slice(0, 2)).abs().sum() == 0
    assert other.read(slice(0, 2)).sum() == 4


def test_files_go_when_the_stream_goes(tmp_path):
    one = Stream.empty(2, 2, 2, torch.float32, tmp_path)
    two = Stream.empty(2, 2, 2, torch.float32, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    one.close()
    assert list(tmp_path.iterdir()) == [two.path]
    del two
    assert list(tmp_path.iterdir()) == []


def test_wrong_shapes_are_refused():
    stream = Stream.empty(2, 3, 4, torch.float32)
    with pytest.raises(ValueError, match=r"\(1, 3, 5\), expected \(1, 3, 4\)"):
        stream.write(slice(0, 1), torch.zeros(1, 3, 5))
    with pytest.raises(ValueError, match=r"\(N, T, d\)"):
        Stream(torch.zeros(2, 3))


def test_a_full_disk_is_named_and_leaves_no_file(tmp_path, monkeypatch):
    def full(_descriptor, _size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream_module, "_reserve", full)
    with pytest.raises(OutputError, match=f"96 bytes in {tmp_path}: No space left.*fewer windows"):
        Stream.empty(2, 3, 4, torch.float32, tmp_path)
    assert not list(tmp_path.iterdir())
