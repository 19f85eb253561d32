"""Load a checkpoint from names, shapes and dtypes alone, with transformers' own loading.

A model on the meta device is filled with tensors on the meta device. What transformers would
report after it has read all weights (tensors it misses, tensors it has no use for, shapes that do
not fit) is known in a moment, and before anything is downloaded into memory or worked on.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

COMPUTED = re.compile(r"(inv_freq|position_ids|\b(attn|attention|self_attn)\.(masked_)?bias)$")
"""Buffers that older versions of transformers saved and every version computes."""


@dataclass(frozen=True)
class DryLoad:
    """What loading finds out; each list in the order of names.

    Attributes:
        model: with every weight on the meta device.
        missing: parameters for which there is no tensor: they would be random numbers.
        unused: stored tensors that the model has no place for.
        ignored: those of them that the model's class says it ignores, such as extra heads.
        mismatched: (name, stored shape, shape in the model).
    """

    model: Any
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    ignored: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


def dry_load(model_class: Any, config: Any, stored: Mapping[str, Tensor]) -> DryLoad:
    """Load a checkpoint without its numbers.

    Args:
        model_class: of transformers.
        config: of the model; a copy is used.
        stored: names on disk -> tensors on the meta device.
    """
    with _quiet():
        # Without a name or path, weights come from the state alone.
        model, info = model_class.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=dict(stored),
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    patterns = [re.compile(p) for p in model_class._keys_to_ignore_on_load_unexpected or ()]
    known = model.state_dict().keys()
    ignored = [n for n in stored if n not in known and any(p.search(n) for p in patterns)]
    unused = {n for n in info["unexpected_keys"] if not COMPUTED.search(n)}
    return DryLoad(
        model,
        missing=tuple(sorted(info["missing_keys"])),
        unused=tuple(sorted(unused)),
        ignored=tuple(sorted(n for n in ignored if not COMPUTED.search(n))),
        mismatched=tuple(
            sorted((n, tuple(found), tuple(own)) for n, found, own in info["mismatched_keys"])
        ),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and tables that transformers prints when it loads."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
