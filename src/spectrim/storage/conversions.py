"""Tensors on disk against tensors in memory, by the conversions that transformers applies itself.

Many architectures are stored under other names than those of their modules, and some in other
pieces: experts one by one, several projections in one tensor. transformers knows how to get from
one form to the other and back; here the same is done for a part of a model at a time, so that a
model larger than memory can be read and written, and with shapes alone, so that what will happen
is known before it does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spectrim.storage.renaming import SpectrimRenaming


@dataclass
class _Group:
    """Stored tensors that become one or more tensors in memory together.

    Attributes:
        step: of transformers; None where a tensor is only renamed.
        members: (stored name, pattern of the step that it matches), in transformers' order.
    """

    step: Any
    members: list[tuple[str, str]] = field(default_factory=list)


class Conversions:
    """How the tensors of a checkpoint become those of a model.

    Args:
        model: in memory or on the meta device. It is told which conversions apply to this
            checkpoint, as loading would tell it, so that saving reverses them.
        stored: names of all tensors of the checkpoint.
        quantizer: whose own renamings apply as well.
    """

    def __init__(self, model: Any, stored: Iterable[str], quantizer: Any = None):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self._model = model
        known = model.state_dict()
        steps = get_model_conversion_mapping(model, None, quantizer)
        renamings = [s for s in steps if isinstance(s, WeightRenaming)]
        converters = [s for s in steps if isinstance(s, WeightConverter)]
        by_pattern = {pattern: s for s in converters for pattern in s.source_patterns}
        prefix = model.base_model_prefix
        self._groups: dict[str, _Group] = {}
        self.unused: list[str] = []
        for name in sorted(stored, key=dot_natural_key):
            first, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if first not in known and name in known:
                # A checkpoint in the form of memory already.
                first, pattern = rename_source_key(name, [], [], prefix, known)
            if first not in known:
                self.unused.append(name)
                continue
            step = None if pattern is None else by_pattern[pattern]
            group = self._groups.setdefault(first, _Group(step))
            group.members.append((name, name if pattern is None else pattern))
        if quantizer is None:
            model._weight_conversions = [s for s in steps if s.was_used()]

    def sources(self, prefix: str = "") -> list[str]:
        """Stored names of what becomes tensors whose names begin with `prefix`."""
        return [
            stored
            for first, group in self._groups.items()
            if first.startswith(prefix)
            for stored, _ in group.members
        ]

    def read(
        self, read: Callable[[str], Tensor], *, within: str = "", outside: tuple[str, ...] = ()
    ) -> dict[str, Tensor]:
        """Tensors of the model, made from stored ones.

        Args:
            read: gives a stored tensor; tensors on the meta device give shapes.
            within: only those whose names begin so.
            outside: but not those whose names begin with any of these.
        """
        found: dict[str, Tensor] = {}
        for first, group in self._groups.items():
            if first.startswith(within) and not first.startswith(outside or ("\0",)):
                found |= self._convert(first, group, read)
        return found

    def _convert(
        self, first: str, group: _Group, read: Callable[[str], Tensor]
    ) -> dict[str, Tensor]:
        if group.step is None:
            return {first: read(group.members[-1][0])}
        step = copy.deepcopy(group.step)
        for stored, pattern in group.members:
            step.add_tensor(first, stored, pattern, read(stored))
        made = step.convert(first, model=self._model, config=self._model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def to_disk(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model, or of a part of one that no conversion reaches across, as stored."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))


def own_conversions(model: Any) -> list[Any]:
    """The conversions that transformers would reverse to save this model if it were dense.

    Args:
        model: loaded or made in this process.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    known = getattr(model, "_weight_conversions", None)
    if known is None:
        # As transformers does for a model that was never loaded: no legacy names, and no change
        # of a prefix that nothing is known about.
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        known = [step for step in mapping if not isinstance(step, PrefixChange)]
    return [step for step in known if not isinstance(step, SpectrimRenaming)]


def whole_layers(steps: Iterable[Any], compressed: Iterable[str]) -> list[Any]:
    """Those conversions that leave the weights of compressed layers whole.

    Others put such a weight together from several stored tensors, or split one: its factors have
    no such parts, and are stored in the form they have in memory, together with whatever else the
    same conversion makes.

    Args:
        steps: of the architecture.
        compressed: module paths of compressed layers.
    """
    from transformers.core_model_loading import WeightRenaming

    weights = [f"{name}.weight" for name in compressed]

    def reaches(step: Any) -> bool:
        if isinstance(step, WeightRenaming):
            return False
        back = step.reverse_transform()
        return any(back.rename_source_key(name)[1] is not None for name in weights)

    return [step for step in steps if not reaches(step)]
