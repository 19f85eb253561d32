"""Conversations become what the model's own template writes, whatever shape their rows have."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from spectrim.data.text import read_text
from spectrim.errors import TextError

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'judge' %}{{ raise_exception('no judges') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
)


def tokenizer(template=TEMPLATE):
    found = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    found.chat_template = template
    return found


def written(tmp_path, *rows):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
ROWS = {
    "messages": {"messages": TURNS, "id": 3},
    "conversations": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    },
    "conversations by role": {"conversations": TURNS},
    "instruction": {"instruction": "Hi", "input": "", "output": "Yes"},
    "prompt": {"prompt": "Hi", "completion": "Yes"},
    "question": {"question": "Hi", "answer": "Yes"},
}


@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_is_written_by_the_template(shape, tmp_path):
    path = written(tmp_path, ROWS[shape], ROWS[shape])
    text = read_text(path, tokenizer=tokenizer())
    expected = tokenizer().apply_chat_template(TURNS, tokenize=False)
    assert expected == "<user>Hi</><assistant>Yes</>"
    assert text.content == expected * 2
    assert text.name == "chat.jsonl (chat template)"


def test_input_and_system_columns_are_part_of_the_conversation(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    text = read_text(written(tmp_path, row), tokenizer=tokenizer())
    assert text.content == "<system>Be brief.</><user>Add.\n\n1 2</><assistant>3</>"


def test_what_cannot_be_written_is_named(tmp_path):
    path = written(tmp_path, ROWS["messages"])
    for absent in (None, tokenizer(None)):
        with pytest.raises(TextError, match=r"chat\.jsonl, line 1 .*no chat template"):
            read_text(path, tokenizer=absent)
    judge = {"messages": [{"role": "judge", "content": "x"}]}
    with pytest.raises(TextError, match=r"line 2.*refuses turns of judge: no judges"):
        read_text(written(tmp_path, ROWS["messages"], judge), tokenizer=tokenizer())
    with pytest.raises(TextError, match="mixes 1 conversations with 1 rows"):
        read_text(written(tmp_path, ROWS["messages"], {"text": "a"}), tokenizer=tokenizer())
    for broken in ({"messages": []}, {"messages": [{"role": "user"}]}, {"prompt": "Hi"}):
        with pytest.raises(TextError, match="'messages' or 'conversations'"):
            read_text(written(tmp_path, broken), tokenizer=tokenizer())
