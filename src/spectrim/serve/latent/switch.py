"""Switch a model over to a latent key-value cache, and back.

Hooks only: modules, names and weights stay as they are, and a model that is switched over saves
like any other. The latents are caught where the up factors read them.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from spectrim.errors import ModelError
from spectrim.serve.latent.cache import Caught, LatentCache
from spectrim.serve.latent.sites import Site, find_sites

_MARK = "spectrim_latent_switch"
_PREPARE = "_prepare_cache_for_generation"


def latent_cache(model: Any) -> LatentSwitch:
    """Let a compressed model cache the latents of its key and value projections.

    From now on `model.generate(...)`, and every call that would make a `DynamicCache` of its own,
    make a `LatentCache`. Logits stay the same up to rounding. A cache that is passed in is used as
    it is, whatever its kind. The past goes through the up factors again for every new token, so
    memory is bought with time: `spectrim bench --latent-cache` measures both.

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
        # `generate` makes its cache itself; what its callers pass in must stay theirs.
        self._prepare = getattr(model, _PREPARE, None)
        if self._prepare is not None:
            setattr(model, _PREPARE, self._prepare_for_generation)
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
            if self._prepare is not None:
                delattr(self._model, _PREPARE)

    def _prepare_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, but for the kind of the cache."""
        assert self._prepare is not None
        given = inspect.signature(self._prepare).bind(*args, **kwargs).arguments
        before = given["model_kwargs"].get("past_key_values")
        result = self._prepare(*args, **kwargs)
        if before is None and _is_fresh(given["model_kwargs"].get("past_key_values")):
            given["model_kwargs"]["past_key_values"] = self.new_cache()
        return result

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("past_key_values")
        use = kwargs.get("use_cache")
        wanted = module.config.use_cache if use is None else use
        if given is None and wanted:
            given = self.new_cache()
        latent = isinstance(given, LatentCache)
        layers: list[Any] = given.layers if latent else []
        if any(layer.caught not in self._caught for layer in layers):
            raise ModelError("this latent cache belongs to another model, or was switched off")
        for caught in self._caught:
            caught.active = latent
        return args, kwargs | {"past_key_values": given}

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        for caught in self._caught:
            caught.active = False
            caught.take()


def _is_fresh(cache: Any) -> bool:
    """Whether it is the empty cache of full attention that `generate` starts with."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) is DynamicLayer for layer in cache.layers)
        and cache.get_seq_length() == 0
    )
