"""Make transformers know spectrim without importing transformers.

`import spectrim` must cost milliseconds (the command line answers `--help` from it), yet a later
`AutoModelForCausalLM.from_pretrained` must find our quantizer, whichever of the two packages was
imported first. If transformers' quantizer table is loaded already, we register at once. Otherwise
an import hook waits for exactly that one module, registers right after it was executed, and
removes itself. transformers has no entry-point discovery that would make this unnecessary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_with_transformers"]

TABLE_MODULE = "transformers.quantizers.auto"
QUANTIZER_MODULE = "spectrim.storage.quantizer"


def register_with_transformers() -> None:
    """Register now if transformers' quantizer table is loaded, else as soon as it is."""
    if TABLE_MODULE in sys.modules:
        # Importing the module registers its two classes; a second import does nothing.
        import_module(QUANTIZER_MODULE)
    elif not any(isinstance(finder, _AwaitTable) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AwaitTable())


class _AwaitTable(MetaPathFinder):
    """Finds nothing itself; lets the other finders find the table and runs one step after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE_MODULE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _run_after(spec)
                return spec
        return None


def _run_after(spec: ModuleSpec) -> None:
    loader = spec.loader
    assert loader is not None
    execute = loader.exec_module

    def execute_then_register(module: ModuleType) -> None:
        execute(module)
        import_module(QUANTIZER_MODULE)

    # The loader object belongs to this one spec, so nothing else sees the replacement.
    loader.exec_module = execute_then_register  # type: ignore[method-assign]
