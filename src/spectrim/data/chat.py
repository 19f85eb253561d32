"""Conversations as text: rows of a chat data set through the model's own chat template.

Three shapes are read, those that published data sets have: `messages` with `role` and `content`,
`conversations` with `from` and `value` (ShareGPT), and instruction columns (Alpaca and its kin).
The template writes the markers of turns and ends, so conversations follow each other without
anything between them.
"""

from __future__ import annotations

from typing import Any

from spectrim.errors import MissingExtraError, TextError

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}

_QUESTIONS = ("instruction", "prompt", "question")
_ANSWERS = ("output", "response", "completion", "answer")

SHAPES = (
    "'text'; 'messages' or 'conversations', a list of turns; or an instruction column "
    f"({', '.join(_QUESTIONS)}) with an answer column ({', '.join(_ANSWERS)})"
)
"""What a row of a .jsonl file may hold, for error messages."""


def is_chat(row: dict[str, Any]) -> bool:
    """Whether a row holds a conversation and no plain text."""
    return "text" not in row and turns_of(row) is not None


def turns_of(row: dict[str, Any]) -> list[dict[str, str]] | None:
    """The turns of a row as `role` and `content`; None where it has none of the known shapes."""
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list) and turns:
        found = [_turn(turn) for turn in turns]
        return [turn for turn in found if turn is not None] if None not in found else None
    question = next((row[key] for key in _QUESTIONS if isinstance(row.get(key), str)), None)
    answer = next((row[key] for key in _ANSWERS if isinstance(row.get(key), str)), None)
    if question is None or answer is None:
        return None
    if isinstance(row.get("input"), str) and row["input"].strip():
        question = f"{question}\n\n{row['input']}"
    found = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if isinstance(row.get("system"), str) and row["system"].strip():
        found.insert(0, {"role": "system", "content": row["system"]})
    return found


def _turn(turn: Any) -> dict[str, str] | None:
    if not isinstance(turn, dict):
        return None
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {"role": _ROLES.get(role, role), "content": content}


def render_chat(row: dict[str, Any], tokenizer: Any, *, where: str) -> str:
    """One conversation as the text that the model was trained to read.

    Args:
        row: for which `is_chat` holds.
        tokenizer: with a chat template.
        where: file and line, for messages.

    Raises:
        TextError: no tokenizer or no template, or a conversation that the template refuses.
    """
    try:
        from jinja2 import TemplateError
    except ImportError as error:
        raise MissingExtraError("jinja2", "plot", "writing conversations") from error
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{where} is a conversation, and the model's tokenizer has no chat template to write "
            "it with; use an instruction-tuned model, or rows with a field 'text'"
        )
    turns = turns_of(row)
    assert turns is not None  # `is_chat` has looked
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise TextError(
            f"{where}: the model's chat template refuses turns of {roles}: {error}"
        ) from error
