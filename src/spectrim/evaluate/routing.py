"""How often two mixtures of experts send a token to the same experts.

Routers are left as they are, but they see other hidden states in a compressed model. A token agrees
at a router where both models choose the same set of k experts for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.model.experts.unfold import expert_stacks
from spectrim.model.experts.watching import candidates
from spectrim.model.pinning import same_choices


def is_mixture(model: nn.Module) -> bool:
    """Whether the model keeps experts, in one parameter or in single layers of one."""
    return bool(expert_stacks(model)) or any(p.shape[0] > 1 for p in candidates(model).values())


def routing_agreement(dense: Sequence[Tensor], compressed: Sequence[Tensor]) -> list[float]:
    """Share of the tokens of a batch with the same experts, by router in execution order.

    Args:
        dense: what the routers of the original chose, (..., k) each, as `Pins` writes it down.
        compressed: the same of the model that stands in for it.

    Raises:
        ModelError: the models choose a different number of times.
    """
    shapes = [[tuple(x.shape) for x in choices] for choices in (dense, compressed)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"the models choose experts {len(dense)} and {len(compressed)} times in one pass; "
            "compare a model with its own compressed form"
        )
    pairs: Any = zip(dense, compressed, strict=True)
    return [float(same_choices(a, b.to(a.device)).double().mean()) for a, b in pairs]
