"""Calibration that says too little is noted; enough of it is not."""

from dataclasses import replace

import pytest
import torch

from architectures import tiny
from spectrim.data.windows import given_windows
from spectrim.model.tracing import trace
from spectrim.run.thinness import distinct_share, thin_notes


@pytest.fixture(scope="module")
def anatomy():
    return trace(tiny("llama")[0], torch.arange(8)[None])


def ids(count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (count, length), generator=generator)


def notes(windows, anatomy, longest=None):
    return list(thin_notes(given_windows(windows), anatomy, longest))


def test_enough_new_tokens_need_no_note(anatomy):
    assert notes(ids(16, 24), anatomy, longest=24) == []


def test_fewer_tokens_than_channels_are_noted_with_the_widest_target(anatomy):
    widest = max(anatomy.targets, key=lambda t: t.in_features)
    tokens = widest.in_features - 1
    (note,) = notes(ids(1, tokens), anatomy)
    assert f"{tokens} calibration tokens are fewer" in note
    assert widest.name in note


@pytest.mark.parametrize(
    "repeated",
    [
        ids(1, 24).expand(32, 24),
        torch.full((32, 24), 7),
        torch.cat([ids(1, 24)] * 31 + [ids(1, 24, seed=1)]),
        ids(1, 40).flatten().unfold(0, 24, 1).repeat(2, 1),
    ],
    ids=["equal", "one-token", "nearly-equal", "shifted"],
)
def test_repeated_windows_are_noted_and_count_once(anatomy, repeated):
    first, second = notes(repeated, anatomy)
    assert "new text" in first
    assert "fewer than the input channels" in second


def test_distinct_share_counts_sequences():
    windows = ids(4, 30)
    assert distinct_share(windows) == 1
    assert distinct_share(torch.cat([windows, windows])) == 0.5
    assert distinct_share(torch.tensor([[1, 2], [1, 2]])) == 0.5


def test_a_text_shorter_than_what_is_asked_of_it_is_noted(anatomy):
    windows = replace(given_windows(ids(16, 24)), sources=("short.txt",), text_tokens=(300,))
    (note,) = thin_notes(windows, anatomy, None)
    assert "'short.txt' has 300 tokens, fewer than the 16 windows of 24" in note


def test_windows_beyond_the_models_positions_are_noted(anatomy):
    (note,) = notes(ids(16, 24), anatomy, longest=16)
    assert "24 tokens are longer than the model's 16 positions" in note
