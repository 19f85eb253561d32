"""Laws of every number format: bytes, bounds of the error, and codes that come back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import ArtifactError
from spectrim.formats import FORMATS, format_of, formats_of
from spectrim.formats.affine4 import GROUP
from spectrim.formats.packing import packed_codes, unpacked_codes


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(m=st.integers(1, 9), n=st.integers(0, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_int8_is_within_half_a_step_and_keeps_the_largest(m, n, seed):
    W = draw(m, n, seed=seed)
    stored = format_of("int8").encode(W, dtype=torch.float32)
    error = (format_of("int8").decode(stored, n).double() - W).abs()
    assert (error <= stored["scale"][:, None].double() * 0.5001).all()
    if n:
        assert stored["codes"].abs().amax(dim=1).eq(127).all()


@given(m=st.integers(1, 9), n=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_int4_is_within_a_step_of_its_group(m, n, seed):
    W = draw(m, n, seed=seed) + 0.3
    row = format_of("int4")
    stored = row.encode(W, dtype=torch.float32)
    scale, zero = stored["scale"], stored["zero"]
    back = row.decode(stored, n).double()
    for j in range(n):
        step = scale[:, j // GROUP].double()
        # Half a step, and the rounding of bf16 scales and zeros themselves.
        assert ((back[:, j] - W[:, j]).abs() <= step * 0.6 + W.abs().amax() * 2**-7).all()
    every = row.unpack(stored["codes"], n).double()
    group = torch.arange(n) // GROUP
    assert torch.allclose(back, every * scale[:, group].double() + zero[:, group].double())


@given(m=st.integers(1, 9), n=st.integers(0, 70), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_fp8_is_torchs_own_cast_and_the_nearest_of_all_codes(m, n, seed):
    W = draw(m, n, seed=seed) * torch.exp(3 * draw(m, n, seed=seed + 1))
    row = format_of("fp8")
    stored = row.encode(W, dtype=torch.float32)
    scale = stored["scale"].double()[:, None]
    cast = (W / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(stored["codes"].view(torch.uint8), cast.view(torch.uint8))
    if n:
        assert stored["codes"].float().abs().amax(dim=1).eq(448).all()
    # Every byte, by what IEEE says of four bits of exponent and three behind the point.
    byte = torch.arange(127)
    power, rest = byte // 8, (byte % 8).double()
    every = torch.where(power > 0, (8 + rest) * 2.0 ** (power - 10), rest * 2.0**-9)
    every = torch.cat([every, -every])
    least = (W[..., None] - scale[..., None] * every).abs().amin(dim=2)
    assert torch.allclose((row.decode(stored, n).double() - W).abs(), least, rtol=1e-5, atol=1e-12)


def test_every_code_of_fp8_is_the_number_that_torch_reads():
    byte = torch.arange(256, dtype=torch.uint8).view(2, 128)[:, :127]  # the last is no number
    codes = byte.contiguous().view(torch.float8_e4m3fn)
    found, expected = format_of("fp8").unpack(codes, 127), codes.float()
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize(("m", "n"), [(5, 70), (16, 64), (3, 1), (4, 0)])
def test_bytes_and_shapes_are_those_of_what_is_stored(name, m, n):
    row = format_of(name)
    stored = row.encode(draw(m, n), dtype=torch.bfloat16)
    shapes = {key: tuple(t.shape) for key, t in stored.items()}
    assert shapes == {key: shape for key, (shape, _) in row.tensors(m, n).items()}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == row.bytes(m, n, 2)
    assert row.decode(stored, n).shape == (m, n)
    assert row.main in stored


@given(bits=st.integers(1, 4), rows=st.integers(1, 4), eights=st.integers(0, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_packed_codes_come_back_and_waste_nothing(bits, rows, eights, data):
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 8 * eights), generator=generator)
    stored = packed_codes(codes, bits)
    assert stored.dtype == torch.uint8
    assert stored.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpacked_codes(stored, bits).long(), codes)


def test_parts_have_their_own_formats_or_share_the_last():
    names = [
        [one.name for one in formats_of(w, 3)] for w in ("int8", "int4+int8", "int8+int4+int8")
    ]
    assert names == [["int8"] * 3, ["int4", "int8", "int8"], ["int8", "int4", "int8"]]
    with pytest.raises(ArtifactError, match="2 parts"):
        formats_of("int8+int8+int8", 2)
    with pytest.raises(ArtifactError, match="native, int8"):
        formats_of("int5", 1)
