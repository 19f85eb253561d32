"""Serve models compressed by spectrim with vLLM: the entry point, and nothing heavy.

vLLM calls `register` in each of its processes, whatever model is served. It imports vLLM itself
and never raises: a plugin that fails must not keep anybody's server from starting.
"""

from __future__ import annotations

import logging

__all__ = ["register"]

logger = logging.getLogger(__name__)

# What a vLLM that is absent, older or newer than the one this was written for can answer with.
_OTHER_VERSION = (ImportError, AttributeError, TypeError, ValueError)


def register() -> bool:
    """Make `quant_method: spectrim` known to vLLM.

    Returns:
        Whether it is known now. Where it is not, a warning says why, and vLLM refuses a compressed
        model with its own message.
    """
    try:
        from spectrim_vllm.quantization import register_once

        register_once()
    except _OTHER_VERSION as error:
        logger.warning(
            "models compressed by spectrim cannot be served: %s: %s; see the README of "
            "spectrim-vllm for the interface of vLLM that it needs",
            type(error).__name__,
            error,
        )
        return False
    return True
