"""The end of a run, rehearsed before its beginning: save and load again, with shapes alone.

A result that cannot be loaded is found out about now and not after hours. A twin of the model is
built from its configuration on the meta device, every target gets a compressed layer of rank 1,
and the twin is saved and loaded by transformers' own code, without a number in it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from spectrim.errors import ArtifactError, ModelError
from spectrim.layers.quantized import skeleton
from spectrim.layers.swap import swap_in
from spectrim.model.anatomy import Anatomy
from spectrim.model.experts.unfold import expert_stacks, unfold
from spectrim.model.weights import get_module
from spectrim.storage.assemble import saved_state
from spectrim.storage.attach import attach
from spectrim.storage.conversions import to_disk
from spectrim.storage.dry_load import dry_load

_WAY_OUT = "give the folder it was loaded from, or the model as it was loaded"


def check_class(model: nn.Module) -> None:
    """Refuse objects that are wrapped around a model or changed by another library.

    Raises:
        ModelError: says what to give instead.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            where = f": {name!r} is a {type(module).__name__}" if name else ""
            raise ModelError(
                f"{kind} holds adapters of PEFT{where}; merge them first "
                "(model = model.merge_and_unload()) and compress what that returns"
            )
    inner = [n for n, m in model.named_modules() if n and isinstance(m, PreTrainedModel)]
    if inner and not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{kind} is a wrapper around a {type(get_module(model, inner[0])).__name__}; give the "
            f"model inside it (.{inner[0]}), which can be saved by itself"
        )


def rehearse(model: nn.Module, anatomy: Anatomy) -> None:
    """Refuse a model whose compressed form could not be loaded again; the model stays as it is.

    Args:
        model: to be compressed; one that is no `PreTrainedModel` cannot be saved, and passes.
        anatomy: its targets.

    Raises:
        ModelError: names the first tensor that would be lost, and why.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    twin = _twin(model)
    _check_same(model, twin)
    for target in anatomy.targets:
        layer = skeleton(
            "factored",
            "native",
            (target.out_features, target.in_features),
            1,
            bias=target.bias,
            dtype=torch.float32,
        )
        swap_in(twin, target.name, layer)
    try:
        attach(twin)
        twin.hf_quantizer.get_state_dict_and_metadata(twin)
        stored = to_disk(twin, saved_state(twin))
        # As it comes out of a file.
        twin.config.quantization_config = twin.config.quantization_config.to_dict()
        found = dry_load(type(model), twin.config, stored)
    except ArtifactError as error:
        raise _unloadable(model, str(error)) from error
    if found.missing:
        raise _unloadable(model, f"the tensor {found.missing[0]!r} would be missing")
    if found.unused:
        raise _unloadable(model, f"nothing would take up the stored tensor {found.unused[0]!r}")
    if found.mismatched:
        name, stored_shape, own = found.mismatched[0]
        raise _unloadable(model, f"{name!r} would be {stored_shape} on disk, expected {own}")


def _unloadable(model: nn.Module, reason: str) -> ModelError:
    return ModelError(
        f"a compressed {type(model).__name__} could not be loaded again ({reason}); nothing was "
        "computed. Please report it with the model's name and the version of transformers"
    )


def _twin(model: Any) -> Any:
    """The model that its configuration describes, on the meta device, its experts taken apart."""
    try:
        with torch.device("meta"):
            twin = type(model)(copy.deepcopy(model.config))
    # Classes of users and of checkpoints may want other arguments, or values of tensors.
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be built from its configuration alone "
            f"({' '.join(str(error).split())}), so a compressed one could not be loaded again"
        ) from error
    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        twin._weight_conversions = list(known)
    shapes = {name: tuple(p.shape) for name, p in twin.named_parameters()}
    layouts = {name: stack.layout for name, stack in expert_stacks(model).items()}
    # What is not there or of another shape is a difference, which is looked for later.
    unfold(twin, {n: x for n, x in layouts.items() if shapes.get(n) == x.shape})
    return twin


def _check_same(model: Any, twin: Any) -> None:
    """Refuse a model object that is not what its configuration makes: its folder would not be it.

    Raises:
        ModelError: names the first difference.
    """
    kind, own, expected = type(model).__name__, model.state_dict(), twin.state_dict()
    odd = sorted(own.keys() ^ expected.keys())
    if odd:
        words = "has a tensor" if odd[0] in own else "lacks the tensor"
        raise ModelError(
            f"this {kind} was changed after it was made: it {words} {odd[0]!r}, other than its "
            f"configuration says ({len(odd)} differ); {_WAY_OUT}"
        )
    for name, tensor in own.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"this {kind} was changed after it was made: {name!r} is {tuple(tensor.shape)}, "
                f"its configuration says {tuple(expected[name].shape)}; {_WAY_OUT}"
            )
    known = _shared(twin)
    for names in _shared(model):
        if not any(names <= others for others in known):
            first, second = sorted(names)[:2]
            raise ModelError(
                f"{first!r} and {second!r} of this {kind} are one tensor, which its configuration "
                f"does not say: a folder would hold it once, and loading would not share it; "
                f"{_WAY_OUT}"
            )


def _shared(model: nn.Module) -> list[frozenset[str]]:
    """Sets of names that are one and the same parameter."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return [frozenset(group) for group in names.values() if len(group) > 1]
