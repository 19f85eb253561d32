"""Make transformers and PEFT know spectrim without importing them.

`import spectrim` must cost milliseconds (the command line answers `--help` from it), yet a later
`AutoModelForCausalLM.from_pretrained` must find our quantizer, whichever of the two packages was
imported first. If transformers' quantizer table is loaded already, we register at once. Otherwise
an import hook waits for exactly that one module, registers right after it was executed, and
removes itself. PEFT is told of compressed layers in the same way. Neither has entry points that
would make this unnecessary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

OURS = {
    "transformers.quantizers.auto": "spectrim.storage.quantizer",
    "peft.tuners.lora.model": "spectrim.refine.peft_layers",
}
"""A module of another library -> ours, which registers itself there when it is imported."""


def register() -> None:
    """Register where the other library is loaded already, else as soon as it is."""
    for theirs, ours in OURS.items():
        if theirs in sys.modules:
            # Importing the module registers; a second import does nothing.
            import_module(ours)
        elif not any(isinstance(f, _Await) and f.awaited == theirs for f in sys.meta_path):
            sys.meta_path.insert(0, _Await(theirs))


class _Await(MetaPathFinder):
    """Finds nothing itself; lets the other finders find a module and runs one step after it."""

    def __init__(self, awaited: str):
        self.awaited = awaited

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _run_after(spec, OURS[fullname])
                return spec
        return None


def _run_after(spec: ModuleSpec, ours: str) -> None:
    loader = spec.loader
    assert loader is not None
    execute = loader.exec_module

    def execute_then_register(module: ModuleType) -> None:
        execute(module)
        import_module(ours)

    # The loader object belongs to this one spec, so nothing else sees the replacement.
    loader.exec_module = execute_then_register  # type: ignore[method-assign]
