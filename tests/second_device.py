"""A second device on a machine that has none: a tensor left on the wrong one fails as on a card.

    with second_device() as device:
        model.to(device)(ids)  # RuntimeError: aten::embedding: tensors on far:0 and cpu

`far` is registered with PyTorch as an accelerator of its own (the key that vendors of hardware
use), with one kernel for all operators: it computes on the CPU, and refuses tensors of both
devices as CUDA does. Moves, factories, autograd, views and in-place operators are PyTorch's own
and therefore right. A far tensor's memory is CPU memory that its storage refers to.

As on CUDA, numbers without dimensions may come from the CPU, as may the indices of `x[index]`;
random numbers need a generator of the device, and boolean masks, `nonzero` and `item` wait for it.

What it cannot see: operators or dtypes that a device lacks, streams and graphs, memory, speed,
that results differ in the last bits, copies by `copy.deepcopy` (they crash here), and code behind a
question for CUDA (`torch.cuda.*`). It computes with the CPU's kernels, so that one which refuses
bf16 there refuses it here.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from unittest import mock

import torch
from torch import Tensor
from torch.utils import backend_registration

__all__ = ["WAITS", "available", "second_device"]

NAME = "far"
CPU = torch.device("cpu")
METADATA = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""The CPU's kernels of `as_strided` and `set_` look at shapes only, whatever the device."""

AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
HALF_IN_AUTOCAST = ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention")

CROSSING = {"aten::index", "aten::_unsafe_index", "aten::index_put_", "aten::_index_put_impl_"}
"""Operators that take index tensors from the CPU."""

WAITS: collections.Counter[str] = collections.Counter()
"""How often an operator has made the host wait for the device, by name."""
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}

_PLAIN = torch.Generator
_generators: dict[int, torch.Generator] = {}
_libraries: tuple[torch.library.Library, ...] = ()
_present = False


def available() -> bool:
    """Whether this PyTorch can be given a device, and has no real one that would be displaced."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return False
    return bool(_libraries) or not torch.accelerator.is_available()


def _far(host: Tensor, into: Tensor | None = None) -> Tensor:
    """A far tensor over a CPU tensor's memory; `into` is one that shall lie there from now on."""
    memory = host.untyped_storage()
    storage = torch._C._construct_storage_from_data_pointer(
        memory.data_ptr(), torch.device(NAME, 0), memory.nbytes()
    )
    storage.memory = memory
    far = torch._C._acc.create_empty_tensor((0,), host.dtype) if into is None else into
    place = host.storage_offset(), host.shape, host.stride()
    set_ = torch.ops.aten.set_.source_Storage_storage_offset
    return set_.redispatch(METADATA, far, storage, *place)


def _near(far: Tensor) -> Tensor:
    """A CPU tensor over the same memory."""
    place = far.storage_offset(), far.shape, far.stride()
    return torch.empty(0, dtype=far.dtype).set_(far.untyped_storage().memory, *place)


def _copied(source: Tensor, target: Tensor) -> Tensor:
    near = [_near(t) if t.device.type == NAME else t for t in (source, target)]
    near[1].copy_(near[0])
    return target


def _mapped(change, x):
    """`change` applied to a value or to every one of a list."""
    return type(x)(map(change, x)) if isinstance(x, (list, tuple)) else change(x)


@functools.cache
def _tensor_places(op) -> tuple[int, ...]:
    kinds = [str(argument.type) for argument in op._schema.arguments]
    return tuple(i for i, kind in enumerate(kinds) if kind == "Tensor")


def _kernel(op, *args, **kwargs):
    """Any operator that meets a far tensor, or is to make one."""
    name = op._schema.name
    if name == "aten::_copy_from":
        if args[1].device.type != NAME:
            WAITS[name] += 1
        return _copied(*args[:2])
    if name == "aten::_fused_sdp_choice":
        return 0  # the plain product of matrices
    if name in WAITING:
        WAITS[name] += 1
    pairs: list[tuple[Tensor, Tensor]] = []
    strangers: list[Tensor] = []

    def bring(x):
        if isinstance(x, Tensor):
            if x.device.type == NAME:
                pairs.append((x, _near(x)))
                return pairs[-1][1]
            if x.dim():
                strangers.append(x)
        elif isinstance(x, torch.device) and x.type == NAME:
            return CPU
        elif isinstance(x, _PLAIN) and x._cdata not in _generators:
            raise RuntimeError(f"{name}: expected a generator of {NAME}, found one of the CPU")
        return x

    plain = [_mapped(bring, x) for x in args]
    named = {key: _mapped(bring, x) for key, x in kwargs.items()}
    if pairs and strangers and name not in CROSSING:
        raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME}:0 and cpu")
    # A Python number that was given for a tensor has come back as one: another overload takes it.
    bare = any(i < len(plain) and not isinstance(plain[i], Tensor) for i in _tensor_places(op))
    result = (op.overloadpacket if bare else op)(*plain, **named)
    for far, host in pairs:
        if (far.shape, far.stride()) != (host.shape, host.stride()):
            _far(host, into=far)  # an operator that fits its output to the result
    there = kwargs.get("device") or torch.device(NAME)

    def back(x):
        if not isinstance(x, Tensor) or there.type != NAME:
            return x
        for far, host in pairs:
            if x is host:
                return far
            if x.untyped_storage()._cdata == host.untyped_storage()._cdata:
                view = torch.ops.aten.as_strided.default
                return view.redispatch(METADATA, far, x.shape, x.stride(), x.storage_offset())
        return _far(x)

    return _mapped(back, result)


def _lowered(op):
    """An operator that autocast runs in half precision."""

    def lower(x):
        far = isinstance(x, Tensor) and x.device.type == NAME and x.dtype == torch.float32
        return x.to(torch.get_autocast_dtype(NAME)) if far else x

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return op(*map(lower, args), **{key: lower(x) for key, x in kwargs.items()})

    return kernel


def _register() -> None:
    """Once per process: PyTorch cannot forget a device, so that it is only made to look absent."""
    global _libraries
    if _libraries:
        return

    class Hook(torch._C._acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return _present

        def is_built(self) -> bool:
            return True

        def has_primary_context(self, _index) -> bool:
            return _present

    class Module(backend_registration._DummyBackendModule):
        def is_available(self) -> bool:
            return _present

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(
        NAME, backend_module=Module(), hook=Hook()
    )
    everything, aten = (torch.library.Library(name, "IMPL") for name in ("_", "aten"))
    everything.fallback(_kernel, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in HALF_IN_AUTOCAST:
        op = getattr(torch.ops.aten, name).default
        aten.impl(name, _lowered(op), "AutocastPrivateUse1")
    _libraries = everything, aten


class _Generator(_PLAIN):
    """Makes CPU generators, and remembers of which the second device was asked for."""

    def __new__(cls, device="cpu"):
        far = torch.device(device).type == NAME
        made = _PLAIN.__new__(_PLAIN, CPU if far else device)
        if far:
            _generators[made._cdata] = made
        return made


@contextlib.contextmanager
def second_device():
    """The second device; it looks absent to `auto` outside the context."""
    global _present
    _register()
    WAITS.clear()
    _present = True
    try:
        with mock.patch.object(torch, "Generator", _Generator):
            yield torch.device(NAME, 0)
    finally:
        _present = False
        _generators.clear()
