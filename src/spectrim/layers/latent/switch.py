"""Switch a model over to a latent key-value cache, and back.

Hooks only: modules, names and weights stay as they are, and a model that is switched over saves
like any other. The latents are caught where the up factors read them.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from spectrim.errors import ModelError
from spectrim.layers.latent.cache import Caught, LatentCache
from spectrim.layers.latent.sites import Site, find_sites

__all__ = ["LatentSwitch", "latent_cache"]

_MARK = "spectrim_latent_switch"


def latent_cache(model: Any) -> LatentSwitch:
    """Let a compressed model cache the latents of its key and value projections.

    From now on `model.generate(...)` and every call that would start a new `DynamicCache` start a
    `LatentCache`. Logits stay the same up to rounding. A cache of another kind that is passed in
    (static, offloaded, one that is not empty) is used as it is. The past goes through the up
    factors again for every new token, so memory is bought with time: `spectrim bench
    --latent-cache` measures both.

    One forward at a time may run on a model that is switched over.

    Args:
        model: a causal language model with compressed key or value projections.

    Returns:
        The switch: bytes per token with and without, `off()`.

    Raises:
        ModelError: the model's cache cannot be latent, or is already; says why.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a latent cache needs a transformers model, not {type(model).__name__}")
    if hasattr(model, _MARK):
        raise ModelError("the model has a latent cache already; call off() on its switch first")
    return LatentSwitch(model, find_sites(model))


class LatentSwitch:
    """What `latent_cache` did to a model.

    Attributes:
        sites: of the model's attentions, in the order of its cache.
    """

    def __init__(self, model: PreTrainedModel, sites: list[Site]):
        self.sites = sites
        self._model: Any = model
        self._caught = [Caught(site) for site in sites]
        self._handles: list[Any] = []
        for caught in self._caught:
            self._listen(caught)
        self._handles.append(model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._after, always_call=True))
        setattr(model, _MARK, self)

    def _listen(self, caught: Caught) -> None:
        site = caught.site
        if site.key is not None:
            self._handles.append(site.key.reader.register_forward_pre_hook(caught.keep_key))
        if site.value is not None:
            self._handles.append(site.value.reader.register_forward_pre_hook(caught.keep_value))
        if site.attention is not None:
            hook = site.attention.register_forward_pre_hook(caught.keep_rotation, with_kwargs=True)
            self._handles.append(hook)

    @property
    def dense_bytes_per_token(self) -> int:
        """Bytes of whole keys and values of one token."""
        return sum(site.dense_bytes for site in self.sites)

    @property
    def latent_bytes_per_token(self) -> int:
        """Bytes of what is cached of one token instead, without the shared rotation."""
        return sum(site.latent_bytes for site in self.sites)

    def new_cache(self) -> LatentCache:
        """An empty cache, to be passed as `past_key_values`."""
        return LatentCache(self._caught)

    def off(self) -> None:
        """Give the model its ordinary cache back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(self._model, _MARK, None) is self:
            delattr(self._model, _MARK)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("past_key_values")
        use = kwargs.get("use_cache")
        wanted = module.config.use_cache if use is None else use
        if (given is None and wanted) or _is_fresh(given):
            given = self.new_cache()
        latent = isinstance(given, LatentCache)
        if latent and any(layer.caught not in self._caught for layer in given.layers):
            raise ModelError("this latent cache belongs to another model, or was switched off")
        for caught in self._caught:
            caught.active = latent
        return args, kwargs | {"past_key_values": given}

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        for caught in self._caught:
            caught.active = False
            caught.take()


def _is_fresh(cache: Any) -> bool:
    """Whether it is the empty cache that `generate` starts with, with nothing asked of it."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and cache.get_seq_length() == 0
    )
