"""One product instead of several where compressed layers read the same input.

q, k, v (and gate, up) start with `A_q x, A_k x, A_v x`. Stacked, `[A_q; A_k; A_v] x` is a single
product that every member takes its rows from: fewer, larger products, and `x` is read once. The
same holds for the basis of a packed layer that is pivoted on its out-side; a packed layer of the
in-side gathers its input first and is left as it is, and so is a dense layer.

The members keep their class and their place. Only the child that reads the input is replaced, by a
`FusedSlice` with the same `weight`, so that dense weights, state dicts and saving see what they
saw before. The first member that meets an input computes the stacked product, the others take
their slice of it (`once`). `fuse` traces the model and joins only layers that really met one
unchanged tensor.

Permutations of packed layers are not folded into their neighbours; docs/storage.md says why, with
numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.layers.swap import compressed_layers
from spectrim.serve.once import OncePerInput


class FusedDown(nn.Module):
    """The stacked first factors (sum of ranks, in) of layers that share an input."""

    def __init__(self, weights: Sequence[Tensor], *, requires_grad: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.cat(tuple(weights)), requires_grad=requires_grad)
        self._once = OncePerInput(len(weights))

    def take(self, x: Tensor, member: int) -> Tensor:
        """The stacked product for `x`, (..., sum of ranks), computed by the first who asks."""
        return self._once.take(
            x, member, lambda x: nn.functional.linear(x, self.weight), self.weight
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: every slice saves its own rows under the name they had before."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: every slice loads its own rows."""


class FusedSlice(nn.Module):
    """Stands in for the `nn.Linear` (rank, in) whose rows `start:stop` of the stack are.

    Attributes:
        shared: the stack; the same module in every member of the group.
        member: index of this member in the group.
    """

    def __init__(self, shared: FusedDown, member: int, start: int, stop: int):
        super().__init__()
        self.shared = shared
        self.member = member
        self.start, self.stop = start, stop
        self.in_features = shared.weight.shape[1]
        self.out_features = stop - start
        self.bias = None

    @property
    def weight(self) -> Tensor:
        """The member's own rows, a view of the stack."""
        return self.shared.weight[self.start : self.stop]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., rank)."""
        return self.shared.take(x, self.member)[..., self.start : self.stop]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A copy, because file formats refuse tensors that share memory.
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach().clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *told: Any) -> None:
        # Local metadata, strictness, then lists: missing keys, unexpected keys, errors.
        missing_keys, _, error_msgs = told[2:]
        rows = state_dict.get(f"{prefix}weight")
        if rows is None:
            missing_keys.append(f"{prefix}weight")
        elif rows.shape != self.weight.shape:
            error_msgs.append(
                f"{prefix}weight has shape {tuple(rows.shape)}, expected {tuple(self.weight.shape)}"
            )
        else:
            with torch.no_grad():
                self.weight.copy_(rows)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rows={self.start}:{self.stop}"


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did.

    Attributes:
        groups: module paths of the layers that now share one product.
        left: module path -> why a compressed layer with company was left as it is.
    """

    groups: tuple[tuple[str, ...], ...]
    left: dict[str, str]


def fuse(model: nn.Module, groups: Iterable[Sequence[str]] | None = None) -> Fusion:
    """Stack the first factors of compressed layers that read the same input, in place.

    Args:
        model: holds compressed layers; a causal language model if `groups` is None.
        groups: module paths of layers that share an input; None finds them by tracing two tokens.

    Returns:
        The groups that were joined, and which layers were left and why.

    Raises:
        ModelError: a path in `groups` does not name a compressed layer.
    """
    layers = compressed_layers(model)
    found, left = [], {}
    for names in shared_inputs(model) if groups is None else groups:
        joinable: dict[Any, list[str]] = {}
        for name in names:
            if name not in layers:
                raise ModelError(f"{name} is not a compressed layer, it cannot be fused")
            reason = _obstacle(layers[name])
            if reason is None:
                weight = _reader(layers[name]).weight
                kind = (weight.dtype, weight.device, weight.requires_grad)
                joinable.setdefault(kind, []).append(name)
            else:
                left[name] = reason
        for members in joinable.values():
            if len(members) > 1:
                _join([layers[name] for name in members])
                found.append(tuple(members))
            else:
                left[members[0]] = "no other layer of its group can be joined with it"
    return Fusion(tuple(found), left)


def shared_inputs(model: nn.Module) -> list[tuple[str, ...]]:
    """Compressed layers that read one and the same tensor, found by running two tokens.

    Returns:
        Groups of two or more module paths, in execution order. A layer that ran more than once
        is in no group.
    """
    inputs: list[Tensor] = []  # kept alive, so that no address is used twice
    groups: dict[tuple[int, int], list[str]] = {}
    calls: dict[str, int] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            groups.setdefault((id(args[0]), args[0]._version), []).append(name)
            calls[name] = calls.get(name, 0) + 1

        return record

    layers = compressed_layers(model)
    handles = [m.register_forward_pre_hook(recorder(name)) for name, m in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
            model(input_ids=tokens, use_cache=False)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    return [tuple(g) for g in groups.values() if len(g) > 1 and all(calls[n] == 1 for n in g)]


def _reader_name(layer: Any) -> str:
    """The child that reads the layer's input."""
    return layer.reader[0]


def _reader(layer: nn.Module) -> Any:
    return getattr(layer, _reader_name(layer))


def _obstacle(layer: Any) -> str | None:
    """Why the layer cannot be joined, None if it can."""
    if not hasattr(layer, "reader"):
        return f"a {type(layer).__name__} is not known to start with a plain product"
    if layer.reader[1]:
        return layer.reader[1]
    reader = _reader(layer)
    if isinstance(reader, FusedSlice):
        return "already fused"
    if type(reader) is not nn.Linear or type(reader.weight) is not nn.Parameter:
        return f"its first factor is a {type(reader).__name__} of {type(reader.weight).__name__}"
    return None


def _join(layers: Sequence[nn.Module]) -> None:
    readers = [_reader(layer) for layer in layers]
    weights = [reader.weight.detach() for reader in readers]
    shared = FusedDown(weights, requires_grad=readers[0].weight.requires_grad)
    start = 0
    for member, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        stop = start + weight.shape[0]
        piece = FusedSlice(shared.train(layer.training), member, start, stop)
        setattr(layer, _reader_name(layer), piece.train(layer.training))
        start = stop
