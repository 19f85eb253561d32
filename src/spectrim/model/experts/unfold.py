"""Linear layers in the place of a model's 3-D parameters of experts, and the parameters back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.model.experts.layout import ExpertLayout
from spectrim.model.experts.stack import ExpertStack
from spectrim.model.weights import get_module


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Name of a parameter that was unfolded -> what stands in its place."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertStack)}


def unfold(model: nn.Module, layouts: Mapping[str, ExpertLayout]) -> None:
    """Replace parameters by linear layers, in place; one parameter at a time is in memory twice.

    Raises:
        ModelError: a name is no parameter, or its shape is not the layout's.
    """
    for name, layout in layouts.items():
        path, _, leaf = name.rpartition(".")
        owner = get_module(model, path)
        parameter = owner._parameters.get(leaf)
        if parameter is None or tuple(parameter.shape) != layout.shape:
            found = "nothing" if parameter is None else tuple(parameter.shape)
            raise ModelError(f"{name} is {found}, expected a parameter of shape {layout.shape}")
        del owner._parameters[leaf]
        owner.add_module(leaf, ExpertStack.of(parameter, layout))


def fold(model: nn.Module) -> None:
    """Put all parameters back, in place.

    Raises:
        ModelError: an expert is compressed.
    """
    for name, stack in expert_stacks(model).items():
        path, _, leaf = name.rpartition(".")
        owner = get_module(model, path)
        parameter = stack.folded()
        del owner._modules[leaf]
        owner.register_parameter(leaf, parameter)


def unfold_tensors(
    tensors: Mapping[str, Tensor], layouts: Mapping[str, ExpertLayout]
) -> dict[str, Tensor]:
    """A state dictionary with the weights of linear layers in the place of folded parameters.

    One parameter at a time is in memory twice, where nobody else holds them.
    """
    found: dict[str, Any] = dict(tensors)
    del tensors
    for name, layout in layouts.items():
        parameter = found.pop(name)
        for expert in range(layout.experts):
            matrices = layout.split(parameter, expert)
            inner = layout.matrices or ("",)
            for part, W in zip(inner, matrices, strict=True):
                key = ".".join(x for x in (name, str(expert), part, "weight") if x)
                found[key] = W.clone(memory_format=torch.contiguous_format)
            del matrices
        del parameter
    return found
