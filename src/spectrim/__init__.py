"""spectrim: make large language models smaller by low-rank (SVD) compression.

Importing this package lets `transformers` load compressed models:

    import spectrim
    model = AutoModelForCausalLM.from_pretrained("compressed-folder")

The import itself loads neither torch nor transformers; the public names below are looked up when
they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectrim.registration import register_with_transformers

if TYPE_CHECKING:
    from spectrim.api import compress, evaluate, load_elastic, plan, resize, survey
    from spectrim.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "__version__",
    "compress",
    "evaluate",
    "load_elastic",
    "plan",
    "resize",
    "survey",
]

_HOMES = dict.fromkeys(
    ("compress", "evaluate", "load_elastic", "plan", "resize", "survey"), "spectrim.api"
) | {"Recipe": "spectrim.recipe"}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
