"""What a GGUF file says besides weights: the shape of the network, and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrim.devices import HOST
from spectrim.errors import InputError
from spectrim.storage.json_file import read_json

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model types that the engines of this format run without anything being added to a weight, and
what they are called there."""

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
SPLITS = {
    _ENDINGS + _WORD % "{1,3}": "llama-bpe",
    _ENDINGS + _WORD % "": "qwen2",
}
"""How text is split before merges, and the engines' word for it."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens."""


def add_network(writer: Any, config: Any, *, name: str) -> None:
    """Sizes and constants of a decoder.

    Args:
        writer: of the `gguf` package.
        config: of the model, as transformers reads it.
        name: of the model, for people.
    """
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    width = _head_width(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _head_width(config: Any) -> int:
    stated = getattr(config, "head_dim", None)
    return stated or config.hidden_size // config.num_attention_heads


def rope_factors(config: Any, source: Path) -> Any:
    """By what the frequencies of the rotation are divided, (head width / 2,) fp32; None for 1.

    Raises:
        InputError: a scaling that is no constant factor per frequency.
    """
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{source} scales its rotations by {kind!r}, which is not written to GGUF")
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, HOST)
    width = _head_width(config)
    steps = torch.arange(0, width, 2, dtype=torch.float64) / width
    return (config.rope_parameters["rope_theta"] ** -steps / scaled.double()).float()


def add_tokenizer(writer: Any, source: Path, vocabulary: int) -> None:
    """Tokens, merges and special tokens of a byte-level BPE.

    Args:
        writer: of the `gguf` package.
        source: folder with `tokenizer.json`.
        vocabulary: rows of the embedding; more than there are tokens are filled up as unused.

    Raises:
        InputError: another kind of tokenizer.
    """
    if not (source / "tokenizer.json").exists():
        raise InputError(f"{source} has no tokenizer.json, which GGUF holds as well")
    stored = read_json(source / "tokenizer.json")
    model = stored["model"]
    split = _split(stored.get("pre_tokenizer") or {})
    if model.get("type") != "BPE" or model.get("byte_fallback") or split is None:
        raise InputError(
            f"the tokenizer of {source} is no byte-level BPE that GGUF engines know by name; "
            "export it --dense and convert it with the engine's own script"
        )
    tokens = [f"[UNUSED{i}]" for i in range(vocabulary)]
    kinds = [UNUSED] * vocabulary
    for token, place in model["vocab"].items():
        tokens[place], kinds[place] = token, NORMAL
    for added in stored.get("added_tokens", ()):
        kind = CONTROL if added["special"] else USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    _add_special(writer, source, tokens)


def _split(rule: Mapping[str, Any]) -> str | None:
    """The engines' word for how a tokenizer splits text, None if they have none."""
    steps = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return SPLITS.get(steps[0]["pattern"].get("Regex"))
    return None


def _add_special(writer: Any, source: Path, tokens: list[str]) -> None:
    """Which tokens begin, end and fill a text, and the chat template."""
    path = source / "tokenizer_config.json"
    stated = read_json(path) if path.exists() else {}
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        token = stated.get(key)
        token = token["content"] if isinstance(token, dict) else token
        if token in tokens:
            add(tokens.index(token))
    writer.add_add_bos_token(bool(stated.get("add_bos_token", False)))
    template = source / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    elif isinstance(stated.get("chat_template"), str):
        writer.add_chat_template(stated["chat_template"])
