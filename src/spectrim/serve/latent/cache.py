"""A cache of latents: `A x` of every token, multiplied out when attention reads it.

What attention gets is what it would get from a cache of heads, up to rounding: the latents of the
past go through the up factor, the norm of the heads and the rotary embedding of *their* positions,
whose cosines and sines are kept (once for all layers that share them), so that padding and
embeddings that change with the length come out right. The states of the tokens that are being read
are passed on as they are; a prompt costs nothing extra.

Every later token multiplies the latents of the whole past, in every layer: memory is paid for with
arithmetic that grows with the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from spectrim.errors import ModelError
from spectrim.serve.latent.sites import Projection, Site

Pair = tuple[Tensor, Tensor]


class Caught:
    """What one attention computed on the way to the cache; filled by hooks, emptied by reading.

    Attributes:
        site: the attention.
        active: whether the forward that runs uses a latent cache.
    """

    def __init__(self, site: Site):
        self.site = site
        self.active = False
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._rotation: Pair | None = None

    def keep_key(self, module: Any, args: tuple[Tensor, ...]) -> None:
        """Pre-forward hook of the part that reads the key's latent."""
        if self.active:
            self._key = args[0]

    def keep_value(self, module: Any, args: tuple[Tensor, ...]) -> None:
        """Pre-forward hook of the part that reads the value's latent."""
        if self.active:
            self._value = args[0]

    def keep_rotation(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Pre-forward hook of the attention."""
        if self.active:
            self._rotation = kwargs.get("position_embeddings")

    def take(self) -> tuple[Tensor | None, Tensor | None, Pair | None]:
        """Latents of keys and values, (batch, tokens, rank), and the rotation, handed out once."""
        found = (self._key, self._value, self._rotation)
        self._key = self._value = self._rotation = None
        return found


class Rotations:
    """Cosines and sines, (batch or 1, tokens, size), of all cached tokens."""

    def __init__(self) -> None:
        self.pair: Pair | None = None
        self.latest: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return 0 if self.pair is None else self.pair[0].shape[1]

    def extend(self, new: Pair) -> None:
        """Append the tokens that are being read; one row for all sequences grows to many."""
        self.latest = new[0]
        if self.pair is None:
            self.pair = new
            return
        rows = max(self.pair[0].shape[0], new[0].shape[0])
        old, added = ([t.expand(rows, -1, -1) for t in pair] for pair in (self.pair, new))
        cosines, sines = (torch.cat(two, dim=1) for two in zip(old, added, strict=True))
        self.pair = (cosines, sines)

    def first(self, tokens: int, device: torch.device) -> Pair:
        """The rotation of the first tokens."""
        assert self.pair is not None
        cosines, sines = (t[:, :tokens].to(device) for t in self.pair)
        return cosines, sines

    def change(self, fn: Callable[[Tensor], Tensor], *, rows: bool) -> None:
        """Apply `fn` to both; one that picks rows passes over a single row for all sequences."""
        if self.pair is not None and not (rows and self.pair[0].shape[0] == 1):
            cosines, sines = (fn(t) for t in self.pair)
            self.pair = (cosines, sines)


class LatentLayer(DynamicLayer):
    """One layer of the cache.

    `keys` and `values` hold latents as one head of size rank, (batch, 1, tokens, rank), so that
    everything transformers does to a cache along batch and tokens works on them unchanged.
    """

    def __init__(self, caught: Caught, tracks: list[Rotations]):
        super().__init__()
        self.caught = caught
        self._tracks = tracks
        self._track: Rotations | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Cache the latents of the new tokens; whole keys and values of all tokens."""
        site = self.caught.site
        past, new = self.get_seq_length(), key_states.shape[-2]
        key, value, rotation = self.caught.take()
        if site.key is not None and site.key.rotate is not None:
            self._rotate(rotation, past, new)
        super().update(
            _as_head(key, key_states, site.key), _as_head(value, value_states, site.value)
        )
        if not past:
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        return (
            self._whole(site.key, self.keys, past, key_states),
            self._whole(site.value, self.values, past, value_states),
        )

    def _rotate(self, rotation: Pair | None, past: int, new: int) -> None:
        """Note the rotation of the new tokens, unless another layer did."""
        if rotation is None:
            raise ModelError("an attention with rotated keys was called without its embedding")
        if self._track is None:
            shared = [t for t in self._tracks if t.latest is rotation[0]]
            self._track = shared[0] if shared else Rotations()
            if not shared:
                self._tracks.append(self._track)
        if self._track.length < past + new:
            self._track.extend(rotation)

    def _whole(
        self, projection: Projection | None, cached: Tensor, past: int, new: Tensor
    ) -> Tensor:
        """States of all tokens, (batch, heads, tokens, size)."""
        if projection is None:
            return cached
        output = projection.layer.expand(cached[:, 0, :past])
        rotation = None
        if projection.rotate is not None:
            assert self._track is not None
            rotation = self._track.first(past, output.device)
        return torch.cat([projection.states(output, rotation), new], dim=-2)

    def reset(self) -> None:
        """Forget everything; the rotations are dropped by the cache."""
        super().reset()
        self._track = None


class LatentCache(Cache):
    """A cache for one model, one latent layer per attention.

    Args:
        caught: of every attention in order; the hooks that fill it are in place.
    """

    def __init__(self, caught: list[Caught]):
        self.tracks: list[Rotations] = []
        super().__init__(layers=[LatentLayer(one, self.tracks) for one in caught])

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        layers: list[Any] = self.layers  # all of them ours
        kept = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
        kept += [t for track in self.tracks if track.pair is not None for t in track.pair]
        return sum(t.numel() * t.element_size() for t in kept)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tracks.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Let sequences take over the past of others (beam search)."""
        super().reorder_cache(beam_idx)
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)), rows=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; negative, as transformers wants it."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._change(lambda t: t[:, :tokens_to_remove], rows=False)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda t: t.repeat_interleave(repeats, dim=0), rows=True)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        self._change(lambda t: t[indices], rows=True)

    def _change(self, fn: Callable[[Tensor], Tensor], *, rows: bool) -> None:
        for track in self.tracks:
            track.change(fn, rows=rows)


def _as_head(latent: Tensor | None, states: Tensor, projection: Projection | None) -> Tensor:
    """What is cached of new states: themselves, or the latent as one head."""
    if projection is None:
        return states
    if latent is None or latent.shape[:2] != (states.shape[0], states.shape[2]):
        found = "none" if latent is None else f"one of shape {tuple(latent.shape)}"
        raise ModelError(
            f"an attention cached {states.shape[2]} tokens of {states.shape[0]} sequences and its "
            f"compressed projection passed on {found}: the layers were replaced after "
            "latent_cache(); switch it off, change the model, and switch it on again"
        )
    return latent.unsqueeze(1)
