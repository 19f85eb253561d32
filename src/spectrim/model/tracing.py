"""Find blocks, targets and input-sharing groups by running one window, never by model name.

Hooks write down which modules run, in which order, on which tensor. The blocks are the members
of that `nn.ModuleList` which are called once each, one after the other, and hold most linear
parameters. Linears of a block that receive the same tensor form a group. What cannot be a
target is reported with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectrim.errors import ModelError
from spectrim.model.anatomy import Anatomy, Block, Group, Target
from spectrim.model.forward import evaluating, run_window
from spectrim.model.routing import Choices
from spectrim.model.weights import get_module, is_linear, is_transposed, read_weight
from spectrim.tolerances import SAME_FUNCTION

__all__ = ["block_lists", "trace"]

_ROUTER = "router: something is chosen by the rank of its outputs (top-k)"


@dataclass(frozen=True)
class _Call:
    """One call of a linear: its input (None unless exactly one tensor) and that input's version.

    The tensor is kept alive, so that no later tensor can take over its memory and look the same.
    """

    module: nn.Module
    tensor: Tensor | None
    version: int

    def same_input(self, other: _Call) -> bool:
        """Same tensor, or another view that holds the same rows of the same memory."""
        x, y = self.tensor, other.tensor
        if x is None or y is None or self.version != other.version:
            return False
        if x is y:
            return True
        if x.data_ptr() != y.data_ptr() or x.dtype != y.dtype or x.shape[-1] != y.shape[-1]:
            return False
        if x.shape == y.shape:
            return x.stride() == y.stride()
        return x.numel() == y.numel() and x.is_contiguous() and y.is_contiguous()


@dataclass
class _Log:
    """What one forward pass did: entries and exits of list members, calls of linears."""

    members: dict[nn.Module, str]
    choices: Choices = field(default_factory=Choices)
    steps: list[tuple[nn.Module, bool]] = field(default_factory=list)
    calls: dict[nn.Module, list[_Call]] = field(default_factory=lambda: defaultdict(list))
    order: list[_Call] = field(default_factory=list)
    odd: set[nn.Module] = field(default_factory=set)

    def enter(self, module: nn.Module, _args: tuple) -> None:
        # Only now: the weights of a block may just have been loaded.
        self.choices.know(self.members[module], module)
        self.steps.append((module, True))

    def leave(self, module: nn.Module, _args: tuple, _output: object) -> None:
        self.steps.append((module, False))

    def call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        tensor = args[0] if alone else None
        # The version counts in-place changes: same tensor, other content, is another input.
        call = _Call(module, tensor, -1 if tensor is None else tensor._version)
        self.calls[module].append(call)
        self.order.append(call)

    def compare(self, module: nn.Module, args: tuple, output: object) -> None:
        """Whether a class of its own computes what a linear layer with its weight computes."""
        x, expected = args[0] if args else None, None
        if isinstance(x, Tensor) and x.shape[-1] == module.weight.shape[1]:  # type: ignore[index,union-attr]
            expected = nn.functional.linear(x, module.weight, module.bias)  # type: ignore[arg-type]
        same = (
            expected is not None
            and isinstance(output, Tensor)
            and output.shape == expected.shape
            and (output - expected).norm() <= SAME_FUNCTION * expected.norm()
        )
        if not same:
            self.odd.add(module)


@contextmanager
def _watching(log: _Log, linears: list[nn.Module]) -> Iterator[None]:
    handles = []
    try:
        for module in log.members:
            handles.append(module.register_forward_pre_hook(log.enter))
            handles.append(module.register_forward_hook(log.leave))
        for module in linears:
            handles.append(module.register_forward_pre_hook(log.call, with_kwargs=True))
            if type(module) not in (nn.Linear, Conv1D):
                handles.append(module.register_forward_hook(log.compare))
        with log.choices:
            yield
    finally:
        for handle in handles:
            handle.remove()


def _holds_linears(module: nn.Module) -> bool:
    return not is_linear(module) and any(is_linear(m) for m in module.modules())


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every list that could hold the blocks; outer lists come before the lists inside them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_holds_linears(m) for m in module)
    }


def _in_sequence(blocks: nn.ModuleList, log: _Log) -> bool:
    """Whether the members were called once each, in order, each after the one before ended."""
    members = set(blocks)
    steps = [step for step in log.steps if step[0] in members]
    return steps == [(block, entering) for block in blocks for entering in (True, False)]


def _linear_parameters(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if is_linear(m))  # type: ignore[operator]


def _choose_list(model: nn.Module, lists: dict[str, nn.ModuleList], log: _Log) -> str:
    fitting = [name for name, blocks in lists.items() if _in_sequence(blocks, log)]
    if not fitting:
        raise ModelError(
            f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers that are "
            f"called one after the other (lists with linear layers: {sorted(lists)})"
        )
    # `max` keeps the first of equals: an outer list wins over one that holds all its linears.
    return max(fitting, key=lambda name: _linear_parameters(lists[name]))


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter is known; more than one means tied."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def _routed(block: nn.Module, log: _Log, tokens: int) -> set[nn.Module]:
    """Linears of expert lists: lists of which some member saw only some tokens, or none.

    Which tokens an expert sees depends on the text, so no batch is sure to reach it.
    """
    routed: set[nn.Module] = set()
    for experts in block.modules():
        if isinstance(experts, nn.ModuleList) and len(experts) > 1:
            linears = [m for m in experts.modules() if is_linear(m)]
            seen = [call.tensor for m in linears for call in log.calls[m]]
            whole = [x is None or x.numel() == tokens * x.shape[-1] for x in seen]
            if not all(whole) or any(not log.calls[m] for m in linears):
                routed.update(linears)
    return routed


def _shape(module: nn.Module) -> tuple[int, int]:
    out_features, in_features = read_weight(module).shape
    return out_features, in_features


def _why_not(module: nn.Module, log: _Log, tied: list[str], routes: bool) -> str:
    """The reason why a linear outside expert lists is not a target; empty if it is one."""
    out_features, in_features = _shape(module)
    calls = log.calls[module]
    if not calls:
        return "never called on the traced window"
    if len(calls) > 1:
        return f"called {len(calls)} times in one forward pass, expected once"
    if calls[0].tensor is None:
        return "called with other arguments than one tensor"
    if len(tied) > 1:
        return f"its weight is shared: {', '.join(tied)}"
    if routes:
        return _ROUTER
    if module in log.odd:
        return f"a {type(module).__name__} computes something else than a linear layer"
    if out_features * in_features <= out_features + in_features:
        return f"{out_features}x{in_features} is too small: rank 1 would not save anything"
    return ""


def _group_calls(calls: list[_Call]) -> list[list[_Call]]:
    """Calls with the same input together; both levels in execution order."""
    groups: list[list[_Call]] = []
    for call in calls:
        home = next((g for g in groups if g[0].same_input(call)), None)
        if home is None:
            groups.append([call])
        else:
            home.append(call)
    return groups


def _read_block(
    index: int, name: str, block: nn.Module, log: _Log, owners: dict[int, list[str]], tokens: int
) -> tuple[Block, dict[str, str]]:
    """Targets and groups of one block, and what was left alone in it."""
    paths = {module: path for path, module in block.named_modules() if is_linear(module)}
    routers = log.choices.routers
    routed = _routed(block, log, tokens)
    left_alone: dict[str, str] = {}
    for module, path in paths.items():
        if module in routed:
            left_alone[f"{name}.{path}"] = "expert in a list that is routed by token"
            continue
        routes = f"{name}.{path}.weight" in routers
        reason = _why_not(module, log, owners[id(module.weight)], routes)
        if reason:
            left_alone[f"{name}.{path}"] = reason
    for path, parameter in block.named_parameters():
        owner = block.get_submodule(path.rpartition(".")[0])
        if parameter.ndim >= 2 and not is_linear(owner):
            kind = f"{parameter.ndim}-D parameter of {type(owner).__name__}, not a linear layer"
            left_alone[f"{name}.{path}"] = _ROUTER if f"{name}.{path}" in routers else kind
    chosen = [c for c in log.order if c.module in paths]
    chosen = [c for c in chosen if f"{name}.{paths[c.module]}" not in left_alone]
    groups = []
    for number, calls in enumerate(_group_calls(chosen)):
        targets = []
        for module in (call.module for call in calls):
            targets.append(
                Target(
                    name=f"{name}.{paths[module]}",
                    projection=paths[module],
                    block=index,
                    group=number,
                    out_features=_shape(module)[0],
                    in_features=_shape(module)[1],
                    bias=getattr(module, "bias", None) is not None,
                    transposed=is_transposed(module),
                )
            )
        groups.append(Group(index, number, targets[0].in_features, tuple(targets)))
    return Block(index, name, tuple(groups)), left_alone


def trace(model: nn.Module, input_ids: Tensor) -> Anatomy:
    """Find the blocks of a decoder, their targets, and which targets read the same input.

    Args:
        model: any decoder that takes `input_ids` and calls its blocks in sequence.
        input_ids: one window, shape (1, T), int64. A short one (8 tokens) is enough; the inputs
            of all linears are kept in memory until the pass ends.

    Returns:
        The anatomy; modules and parameters of blocks that are no targets are in `left_alone`.

    Raises:
        ModelError: if there is no list of blocks with linear layers, or no target in any block.
        ValueError: if `input_ids` is not one window.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected one window (1, T)"
        )
    lists = block_lists(model)
    if not lists:
        raise ModelError(
            f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers "
            "(nn.Linear or Conv1D); spectrim compresses the linear layers of decoder blocks"
        )
    log = _Log({m: f"{name}.{i}" for name, blocks in lists.items() for i, m in enumerate(blocks)})
    with evaluating(model), _watching(log, [m for m in model.modules() if is_linear(m)]):
        run_window(model, input_ids)
    chosen = _choose_list(model, lists, log)
    owners = _owners(model)
    blocks: list[Block] = []
    left_alone: dict[str, str] = {}
    for index in range(len(lists[chosen])):
        name = f"{chosen}.{index}"
        block, left = _read_block(
            index, name, get_module(model, name), log, owners, input_ids.shape[1]
        )
        blocks.append(block)
        left_alone |= left
    if not any(block.groups for block in blocks):
        raise ModelError(
            f"no linear layer of the blocks {chosen!r} of {type(model).__name__} can be "
            f"compressed; first reason: {next(iter(left_alone.items()), 'no linear layers')}"
        )
    return Anatomy(tuple(blocks), left_alone)
