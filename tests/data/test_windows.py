"""Windows are the text's own tokens at the recorded positions, and their hash is their identity."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from spectrim.data.text import Text
from spectrim.data.tokens import PART_CHARACTERS, tokenize, tokenizer_hash
from spectrim.data.windows import (
    calibration_windows,
    evaluation_windows,
    given_windows,
    longest_window,
    share_out,
)
from spectrim.errors import TextError


def word_tokenizer(vocabulary: dict[str, int], *, bos: str | None = "<s>"):
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, unk_token="<u>")


VOCABULARY = {"<u>": 0, "<s>": 1, **{f"w{i}": 70_000 + i for i in range(500)}}
TOKENIZER = word_tokenizer(VOCABULARY)


def numbered(count: int, *, name: str = "numbered", first: int = 0) -> Text:
    words = " ".join(f"w{(first + i) % 500}" for i in range(count))
    return Text.from_documents([words], name=name)


def test_ids_are_int64_and_survive_above_65535():
    ids = tokenize(numbered(10).content, TOKENIZER)
    assert ids.dtype == torch.int64
    assert ids.tolist() == list(range(70_000, 70_010))


def test_starts_follow_the_published_protocol():
    text, length = numbered(400), 16
    windows = calibration_windows(text, TOKENIZER, windows=30, window_length=length, seed=5)
    generator = torch.Generator().manual_seed(5)
    expected = torch.randint(0, 400 - 17, (30,), generator=generator)
    assert torch.equal(windows.starts, expected)
    for row, start in zip(windows.ids, windows.starts, strict=True):
        assert row.tolist() == [70_000 + int(start) + i for i in range(length)]


def test_parts_are_tokenized_one_by_one_and_joined():
    # Few long words, so that a million characters are tokenised at once.
    content = " ".join(["w1", "x" * (PART_CHARACTERS - 5), "w23", "w4"])
    parts = [content[:PART_CHARACTERS], content[PART_CHARACTERS:]]
    assert (parts[0][-2:], parts[1]) == (" w", "23 w4")
    expected = [i for part in parts for i in TOKENIZER(part)["input_ids"]]
    assert tokenize(content, TOKENIZER).tolist() == expected == [70_001, 0, 0, 0, 70_004]


def test_same_seed_same_windows_other_seed_other_windows():
    make = lambda seed: calibration_windows(  # noqa: E731
        numbered(400), TOKENIZER, windows=8, window_length=16, seed=seed
    )
    assert make(1).fingerprint() == make(1).fingerprint()
    assert torch.equal(make(1).ids, make(1).ids)
    assert make(1).fingerprint() != make(2).fingerprint()


def test_fingerprint_depends_on_tokenizer_text_bos_and_ids_but_not_on_names():
    options = {"windows": 4, "window_length": 8, "seed": 0}
    base = calibration_windows(numbered(100), TOKENIZER, **options)
    renamed = calibration_windows(numbered(100, name="other"), TOKENIZER, **options)
    bos = calibration_windows(numbered(100), TOKENIZER, **options, bos="each")
    longer = calibration_windows(numbered(101), TOKENIZER, **options)
    # The same ids under another vocabulary: an unused word more.
    other = word_tokenizer({**VOCABULARY, "unused": 2})
    other_tokenizer = calibration_windows(numbered(100), other, **options)
    assert torch.equal(base.ids, other_tokenizer.ids)
    assert renamed.fingerprint() == base.fingerprint()
    distinct = {w.fingerprint() for w in (base, bos, longer, other_tokenizer)}
    assert len(distinct) == 4


def test_tokenizer_hash_ignores_the_padding_that_calls_leave_behind():
    tokenizer = word_tokenizer(VOCABULARY)
    before = tokenizer_hash(tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=7)
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert tokenizer_hash(tokenizer) == before


def test_sources_share_windows_equally_and_alternate():
    texts = [numbered(300, name="a"), numbered(200, name="b", first=7)]
    windows = calibration_windows(texts, TOKENIZER, windows=7, window_length=8, seed=0)
    assert windows.sources == ("a", "b")
    assert windows.source_index.tolist() == [0, 1, 0, 1, 0, 1, 0]
    for row, start, owner in zip(windows.ids, windows.starts, windows.source_index, strict=True):
        first = int(start) + (7 if owner else 0)
        assert row.tolist() == [70_000 + first + i for i in range(8)]
    assert windows.take(4).source_index.tolist() == [0, 1, 0, 1]


def test_shares_give_windows_in_proportion_and_every_prefix_keeps_them():
    texts = [numbered(300, name="a"), numbered(200, name="b", first=7)]
    options = {"windows": 10, "window_length": 8}
    windows = calibration_windows(texts, TOKENIZER, **options, shares=(0.7, 0.3))
    assert windows.source_index.bincount().tolist() == [7, 3]
    for count in (4, 7):
        assert abs(int((windows.take(count).source_index == 1).sum()) - 0.3 * count) <= 1
    equal = calibration_windows(texts, TOKENIZER, **options, shares=(2, 2))
    assert equal.fingerprint() == calibration_windows(texts, TOKENIZER, **options).fingerprint()
    with pytest.raises(TextError, match="each has one"):
        calibration_windows(texts, TOKENIZER, **options, shares=(0.99, 0.01))


@pytest.mark.parametrize("count", [1, 7, 30])
def test_whole_shares_add_up_and_none_is_off_by_one(count):
    shares = (0.5, 0.25, 0.15, 0.1)
    found = share_out(count, shares)
    assert sum(found) == count
    assert all(abs(n - count * share) < 1 for n, share in zip(found, shares, strict=True))


@pytest.mark.parametrize("count", [2, 6, 12])
def test_spare_windows_overlap_neither_the_calibration_nor_each_other(count):
    texts = [numbered(300, name="a"), numbered(200, name="b", first=7)]
    windows = calibration_windows(texts, TOKENIZER, windows=count, window_length=16)
    assert windows.spare is not None
    for index, total in enumerate((300, 200)):
        read = windows.starts[windows.source_index == index].tolist()
        spare = windows.spare.starts[windows.spare.source_index == index].tolist()
        taken = [set(range(start, start + 16)) for start in spare]
        assert all(0 <= start <= total - 16 for start in spare)
        assert len(set().union(*taken)) == 16 * len(spare)
        assert not set().union(*taken) & {i for s in read for i in range(s, s + 16)}
    first = windows.spare.ids[0]
    offset = 7 if int(windows.spare.source_index[0]) else 0
    assert first.tolist() == [70_000 + int(windows.spare.starts[0]) + offset + i for i in range(16)]
    assert calibration_windows(numbered(40), TOKENIZER, windows=9, window_length=30).spare is None


@pytest.mark.parametrize(("bos", "rows"), [("each", [0, 1, 2, 3]), ("half", [0, 2])])
def test_bos_replaces_the_first_token_only(bos, rows):
    options = {"windows": 4, "window_length": 8, "seed": 3}
    plain = calibration_windows(numbered(100), TOKENIZER, **options)
    with_bos = calibration_windows(numbered(100), TOKENIZER, **options, bos=bos)
    expected = plain.ids.clone()
    expected[rows, 0] = 1
    assert torch.equal(with_bos.ids, expected)


def test_half_bos_holds_within_every_source():
    texts = [numbered(100, name="a"), numbered(100, name="b")]
    windows = calibration_windows(texts, TOKENIZER, windows=8, window_length=8, bos="half")
    for owner in (0, 1):
        assert int((windows.ids[windows.source_index == owner, 0] == 1).sum()) == 2


def test_evaluation_windows_tile_the_text():
    windows = evaluation_windows(numbered(105), TOKENIZER, window_length=10, max_tokens=99)
    assert windows.ids.flatten().tolist() == list(range(70_000, 70_090))
    assert windows.starts.tolist() == list(range(0, 90, 10))
    assert windows.text_tokens == (105,)


def test_evaluation_bos_at_the_start_shifts_the_text_by_one():
    windows = evaluation_windows(numbered(105), TOKENIZER, window_length=10, bos="start")
    assert windows.ids.flatten().tolist() == [1, *range(70_000, 70_099)]
    assert windows.starts.tolist() == list(range(-1, 99, 10))


def test_window_length_max_is_the_models_own():
    config = LlamaConfig(max_position_embeddings=32)
    assert longest_window(config) == 32
    windows = evaluation_windows(numbered(100), TOKENIZER, window_length="max", config=config)
    assert windows.ids.shape == (3, 32)
    with pytest.raises(TextError, match=r"33 tokens.*32 positions"):
        evaluation_windows(numbered(100), TOKENIZER, window_length=33, config=config)
    with pytest.raises(TextError, match="max_position_embeddings"):
        evaluation_windows(numbered(100), TOKENIZER, window_length="max")


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed():
    with pytest.raises(TextError, match=r"has 9 tokens.*at least 10"):
        calibration_windows(numbered(9), TOKENIZER, windows=1, window_length=8)
    assert len(calibration_windows(numbered(10), TOKENIZER, windows=3, window_length=8)) == 3
    with pytest.raises(TextError, match=r"has 7 tokens.*needs 8"):
        evaluation_windows(numbered(7), TOKENIZER, window_length=8)


def test_overlap_of_many_windows_is_logged(caplog):
    calibration_windows(numbered(20), TOKENIZER, windows=5, window_length=8)
    assert "overlap" in caplog.text


def test_a_tokenizer_without_bos_is_refused_only_when_bos_is_asked_for():
    tokenizer = word_tokenizer(VOCABULARY, bos=None)
    calibration_windows(numbered(50), tokenizer, windows=1, window_length=8)
    with pytest.raises(TextError, match="no BOS"):
        calibration_windows(numbered(50), tokenizer, windows=1, window_length=8, bos="each")


def test_a_tensor_is_taken_row_by_row_and_copied():
    ids = torch.randint(0, 100_000, (5, 6), generator=torch.Generator().manual_seed(0))
    windows = calibration_windows(ids.to(torch.int32), windows=1, window_length=2)
    assert windows.ids.dtype == torch.int64
    assert torch.equal(windows.ids, ids)
    assert windows.starts.tolist() == [-1] * 5
    held = given_windows(ids)
    ids[0, 0] += 1
    assert held.ids[0, 0] == ids[0, 0] - 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4), r"\(4,\)"),
        (torch.zeros(2, 3), "float32"),
        (torch.zeros(0, 3, dtype=torch.long), r"\(0, 3\)"),
        (torch.zeros(3, 1, dtype=torch.long), r"\(3, 1\)"),
        (torch.tensor([[1, -2]]), "-2"),
    ],
)
def test_malformed_tensors_are_named(ids, message):
    with pytest.raises(TextError, match=message):
        given_windows(ids)


def test_ids_beyond_the_vocabulary_are_named():
    with pytest.raises(TextError, match=r"70007.*5000 embeddings"):
        evaluation_windows(numbered(8), TOKENIZER, window_length=8).check_vocabulary(5000)


def test_record_is_json_ready():
    import json

    record = evaluation_windows(numbered(20), TOKENIZER, window_length=8).record()
    assert json.loads(json.dumps(record)) == record
