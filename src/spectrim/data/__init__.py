"""Text sources and token windows: recorded, reproducible, keyed by tokenizer, source and seed."""

from spectrim.data.self_text import sample_windows, write_self_text
from spectrim.data.text import SELF, Text, read_text
from spectrim.data.tokens import tokenizer_hash
from spectrim.data.windows import (
    Windows,
    calibration_windows,
    evaluation_windows,
    given_windows,
    longest_window,
)

__all__ = [
    "SELF",
    "Text",
    "Windows",
    "calibration_windows",
    "evaluation_windows",
    "given_windows",
    "longest_window",
    "read_text",
    "sample_windows",
    "tokenizer_hash",
    "write_self_text",
]
