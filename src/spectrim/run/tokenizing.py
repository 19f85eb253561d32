"""The tokenizer of a checkpoint, and what transformers raises over files that it cannot use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from spectrim.errors import ModelError
from spectrim.run.admitting import one_line
from spectrim.run.restoring import gguf_words

# What transformers raises for a configuration of wrong types, beside what it raises on purpose.
BAD_CONFIGURATION = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    StrictDataclassError,
)

_BAD_TOKENIZER = (*BAD_CONFIGURATION, ImportError, RuntimeError)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""Any of them says that a checkpoint is meant to have a tokenizer."""


def refuse_remote_code(name: str, error: BaseException) -> None:
    """Transformers says "no" to code with a long text; say what to do in one line."""
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        raise ModelError(
            f"{name!r} needs Python code that comes with it (auto_map), which could do anything; "
            "pass --trust-remote-code (trust_remote_code=True) only if you trust its author"
        ) from error


def load_tokenizer(name: str, trust_remote_code: bool) -> tuple[Any, str | None]:
    """The tokenizer, or None and a note where the checkpoint has none.

    Raises:
        ModelError: its files are there and cannot be used; gives the reason.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not _tokenizer_files(name):
        return None, "the model has no tokenizer, and neither has the result"
    words = gguf_words(name) or {"pretrained_model_name_or_path": name}
    try:
        return AutoTokenizer.from_pretrained(**words, trust_remote_code=trust_remote_code), None
    except Exception as error:
        refuse_remote_code(name, error)
        # The tokenizers package raises bare `Exception` for a damaged file.
        if type(error) is not Exception and not isinstance(error, _BAD_TOKENIZER):
            raise
        present = _tokenizer_files(name)
        if not present:
            return None, "the model has no tokenizer, and neither has the result"
        raise ModelError(
            f"the tokenizer of {name!r} ({', '.join(present[:3])}) cannot be loaded: "
            f"{one_line(error)}; install what it needs, mend the file, or pass the tokenizer "
            "yourself (tokenizer=...)"
        ) from error


def _tokenizer_files(name: str) -> list[str]:
    """Those that a folder has, or that were downloaded; a .gguf file holds its own."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_file():
        return [Path(name).name]
    if Path(name).is_dir():
        return [file for file in TOKENIZER_FILES if (Path(name) / file).is_file()]
    found = {file: try_to_load_from_cache(name, file) for file in TOKENIZER_FILES}
    return [file for file, path in found.items() if isinstance(path, str)]
