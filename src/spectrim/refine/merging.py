"""Merge the adapters of a PEFT model into its layers, compressed ones included."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from spectrim.refine.lora import require_peft

logger = logging.getLogger(__name__)


def merge_adapter(model: Any, *, grow: bool = False) -> tuple[Any, dict[str, float]]:
    """The model without adapters, which are part of its layers.

    A compressed layer takes an adapter in at its own rank, or with `grow` at rank k + r. Its
    factors on their own (`target_modules="all-linear"`) are linear layers and lose nothing.

    Args:
        model: a `PeftModel`; the model it wraps is changed.
        grow: hold all of every adapter, in r (m + n) more numbers per layer.

    Returns:
        The wrapped model, and what was lost of every compressed layer's adapter, rounding
        included: `‖lost‖ / ‖B A‖`, by module path.

    Raises:
        MissingExtraError: PEFT is not installed.
        ModelError: a layer with coded weights has an adapter; nothing is merged.
    """
    require_peft("merging adapters")
    from spectrim.refine.peft_layers import LoraCompressed

    inner = model.get_base_model()
    ours = {n: m for n, m in inner.named_modules() if isinstance(m, LoraCompressed)}
    for name, layer in ours.items():
        layer.check_mergeable(name)
        layer.grow = grow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what is lost is said below
        merged = model.merge_and_unload()
    lost = {name: max(layer.lost.values(), default=0.0) for name, layer in ours.items()}
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        logger.info(
            "adapters of %d compressed layers were merged at %s; %s lost most, %.2g of its adapter",
            *(len(lost), "rank k + r" if grow else "the layers' own rank", worst, lost[worst]),
        )
    return merged, lost
