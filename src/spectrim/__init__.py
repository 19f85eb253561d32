"""spectrim: make large language models smaller by low-rank (SVD) compression.

Importing this package lets `transformers` load compressed models:

    import spectrim
    model = AutoModelForCausalLM.from_pretrained("compressed-folder")

The import itself loads neither torch nor transformers; the public names below are looked up when
they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spectrim.registration import register

if TYPE_CHECKING:
    from spectrim.api import (
        adapter,
        compress,
        elastic,
        evaluate,
        export,
        heal,
        inspect,
        load_elastic,
        plan,
        resize,
        survey,
    )
    from spectrim.recipe import Recipe
    from spectrim.refine.merging import merge_adapter
    from spectrim.serve.latent.switch import latent_cache
    from spectrim.serve.prepare import prepare

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "__version__",
    "adapter",
    "compress",
    "elastic",
    "evaluate",
    "export",
    "heal",
    "inspect",
    "latent_cache",
    "load_elastic",
    "merge_adapter",
    "plan",
    "prepare",
    "resize",
    "survey",
]

_HOMES = {
    "Recipe": "spectrim.recipe",
    "latent_cache": "spectrim.serve.latent.switch",
    "merge_adapter": "spectrim.refine.merging",
    "prepare": "spectrim.serve.prepare",
}
"""Of the names that do not live in `spectrim.api`."""


class _EvaluateRoom(ModuleType):
    """`spectrim.evaluate` is a room of the package and a public function; this makes it both."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("spectrim.api").evaluate(*args, **kwargs)


class _Package(ModuleType):
    """The import system sets a room as an attribute here, whoever imports it first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "evaluate" and isinstance(value, ModuleType):
            value.__class__ = _EvaluateRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

register()


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return import_module("spectrim.evaluate")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "spectrim.api")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
