"""Which compressed layers make the keys and values that a model caches, found by running it.

Two products in a row, `B (A x)`, pass through k numbers per token. Where that is fewer than all key
heads have together, the cache may keep `A x` and multiply with `B` when the keys are needed. What
happens to keys between the projection and the cache (split into heads, a norm per head, rotary
embedding) has to happen then as well. Nothing is concluded from names: a few tokens run through
the model, and a projection is taken for the one of the keys if its output, treated in one of these
ways, is what the model hands to its cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from spectrim.errors import ModelError
from spectrim.layers.swap import compressed_layers
from spectrim.tolerances import LATENT_MATCH

PROBE_TOKENS = 5


@dataclass(frozen=True)
class Projection:
    """A compressed layer whose latents can be cached, and the way from its output to the heads.

    Attributes:
        layer: one with an `expander`, with `latent` and `expand`.
        heads: key-value heads in its output.
        norm: applied to every head, None where there is none.
        rotate: the architecture's rotary embedding, None where the output is not rotated.
    """

    layer: Any
    heads: int
    norm: nn.Module | None = None
    rotate: Callable[..., tuple[Tensor, Tensor]] | None = None

    def states(self, output: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """(batch, tokens, heads * size) -> (batch, heads, tokens, size), as it is cached."""
        heads = output.unflatten(-1, (self.heads, -1))
        if self.norm is not None:
            heads = self.norm(heads)
        heads = heads.transpose(1, 2)
        if self.rotate is None:
            return heads
        assert rotation is not None
        # The function rotates queries and keys together; no heads are asked for as queries.
        return self.rotate(heads[:, :0], heads, *rotation)[1]

    @property
    def reader(self) -> nn.Module:
        """The part whose input is the latent."""
        return self.layer.get_submodule(self.layer.expander)


@dataclass(frozen=True)
class Site:
    """The attention of one block: what of its cache can be latent.

    Attributes:
        attention: the module, which is given the rotary embedding's cosines and sines.
        key: None where whole keys are cached.
        value: None where whole values are cached.
        heads: key-value heads.
        sizes: numbers per head of a key and of a value.
        itemsize: bytes of a cached number.
    """

    attention: nn.Module | None
    key: Projection | None
    value: Projection | None
    heads: int
    sizes: tuple[int, int]
    itemsize: int

    @property
    def dense_bytes(self) -> int:
        """Bytes per token and sequence of whole heads."""
        return self.heads * sum(self.sizes) * self.itemsize

    @property
    def latent_bytes(self) -> int:
        """The same of what is cached, without the rotary embedding's cosines and sines."""
        widths = (
            size * self.heads if projection is None else projection.layer.rank
            for projection, size in zip((self.key, self.value), self.sizes, strict=True)
        )
        return sum(widths) * self.itemsize


@dataclass
class _Seen:
    """What one attention handed to the cache, and what ran since the one before."""

    keys: Tensor
    values: Tensor
    outputs: list[tuple[str, Any, Tensor]]
    rotations: dict[str, tuple[Tensor, Tensor]]


def find_sites(model: Any) -> list[Site]:
    """One site per layer of the model's cache, by running a few tokens.

    Raises:
        ModelError: a cache that is not made of whole-length layers of keys and values, or no
            projection whose latents are smaller; says what was found.
    """
    seen = _run(model)
    sites = [_site(model, one) for one in seen]
    if not any(site.key or site.value for site in sites):
        raise ModelError(_why_not(model, seen))
    return sites


def _run(model: Any) -> list[_Seen]:
    """Run the probe tokens through the model with a cache that writes down what it is given."""
    cache = DynamicCache(config=model.config)
    found = {type(layer) for layer in cache.layers}
    kinds = sorted(kind.__name__ for kind in found - {DynamicLayer})
    if kinds or not cache.layers:
        raise ModelError(
            f"{type(model).__name__} caches with {', '.join(kinds) or 'no fixed layers'}; a latent "
            "cache keeps all tokens of full attention and replaces nothing else"
        )
    seen: dict[int, _Seen] = {}
    outputs: list[tuple[str, Any, Tensor]] = []
    rotations: dict[str, tuple[Tensor, Tensor]] = {}

    def update(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        seen[layer_idx] = _Seen(keys, values, list(outputs), dict(rotations))
        outputs.clear()
        return keys, values

    cache.update = update  # type: ignore[method-assign]
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(2 * PROBE_TOKENS, device=device) % vocabulary).view(2, -1)
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack, torch.no_grad():
        stack.callback(_restore, modes)
        for handle in _hooks(model, outputs, rotations):
            stack.callback(handle.remove)
        model.eval()
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    if sorted(seen) != list(range(len(cache.layers))):
        raise ModelError(
            f"{type(model).__name__} filled layers {sorted(seen)} of a cache of "
            f"{len(cache.layers)}; a latent cache needs every attention to use transformers' cache"
        )
    return [seen[index] for index in range(len(seen))]


def _hooks(
    model: nn.Module,
    outputs: list[tuple[str, Any, Tensor]],
    rotations: dict[str, tuple[Tensor, Tensor]],
) -> Iterator[Any]:
    layers = compressed_layers(model)

    def after(name: str, layer: Any, output: Tensor) -> None:
        outputs.append((name, layer, output))

    def before(name: str, rotation: Any) -> None:
        if rotation is not None:
            rotations[name] = rotation

    for name, layer in layers.items():
        yield layer.register_forward_hook(lambda m, _, y, name=name: after(name, m, y))
    for parent in {name.rpartition(".")[0] for name in layers}:
        yield model.get_submodule(parent).register_forward_pre_hook(
            lambda m, _, kwargs, name=parent: before(name, kwargs.get("position_embeddings")),
            with_kwargs=True,
        )


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _site(model: nn.Module, seen: _Seen) -> Site:
    heads = seen.values.shape[1]
    attention = None
    found: dict[str, Projection | None] = {"key": None, "value": None}
    for role, states in (("value", seen.values), ("key", seen.keys)):
        for name, layer, output in seen.outputs:
            parent = name.rpartition(".")[0]
            rotation = seen.rotations.get(parent)
            module = model.get_submodule(parent)
            match = _match(module, layer, output, states, rotation, plain=role == "value")
            if match is None:
                continue
            if layer.rank < heads * states.shape[-1]:
                found[role] = match
                attention = module
            break
    sizes = (seen.keys.shape[-1], seen.values.shape[-1])
    return Site(attention, found["key"], found["value"], heads, sizes, seen.keys.element_size())


def _match(
    attention: nn.Module,
    layer: Any,
    output: Tensor,
    states: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    *,
    plain: bool,
) -> Projection | None:
    """The way from a layer's output to cached states, None if no known one leads there."""
    batch, heads, tokens, size = states.shape
    if output.shape != (batch, tokens, heads * size) or not _has_latents(layer):
        return None
    norms = [None, *(m for m in attention.children() if _is_norm(m, size))]
    rotary = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    ways = [None, rotary] if rotary is not None and rotation is not None else [None]
    for norm in [None] if plain else norms:
        for rotate in [None] if plain else ways:
            candidate = Projection(layer, heads, norm, rotate)
            difference = (candidate.states(output, rotation) - states).norm()
            if difference <= LATENT_MATCH * states.norm():
                return candidate
    return None


def _has_latents(layer: Any) -> bool:
    return bool(getattr(layer, "expander", ""))


def _is_norm(module: nn.Module, size: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (size,)


def _why_not(model: Any, seen: list[_Seen]) -> str:
    """What keeps every block of a model from caching latents."""
    first, name = seen[0], type(model).__name__
    width = first.keys.shape[1] * first.keys.shape[-1]
    near = [
        f"{n} (rank {layer.rank})"
        for n, layer, y in first.outputs
        if y.shape[-1] == width and _has_latents(layer)
    ]
    made = f"its first block caches keys and values of {width} numbers per token"
    if not near:
        return (
            f"{name} has no latents to cache: {made}, and no compressed layer puts out just these; "
            "keys and values that one layer makes together with the queries, or that dense layers "
            "make, are cached whole"
        )
    return (
        f"{name} has no latents to cache: {made}; the compressed layers of that width, "
        f"{', '.join(near)}, have no smaller rank, or their output reaches the cache in a way that "
        "is none of the known ones (heads, a norm per head, rotary embedding)"
    )
