"""Find blocks, targets and input-sharing groups by running one window, never by model name.

Hooks write down which modules run, in which order, on which tensor. The blocks are the members
of that `nn.ModuleList` which are called once each, one after the other, and hold most linear
parameters. Linears of a block that receive the same tensor form a group. What cannot be a
target is reported with the reason.
"""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.model.anatomy import Anatomy, Block, Expert, Group, Target
from spectrim.model.call_log import CallLog, grouped, odd_class, watching
from spectrim.model.forward import evaluating, run_window
from spectrim.model.joins import Joins
from spectrim.model.mixtures import Mixture, mixtures
from spectrim.model.weights import get_module, is_linear, is_transposed, read_weight

ROUTER = "router: something is chosen by the rank of its outputs (top-k)"
"""Why a router is no target: the choice of experts is not approximated."""


def _holds_linears(module: nn.Module) -> bool:
    return not is_linear(module) and any(is_linear(m) for m in module.modules())


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Every list that could hold the blocks; outer lists come before the lists inside them."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(_holds_linears(m) for m in module)
    }


def _in_sequence(blocks: nn.ModuleList, log: CallLog) -> bool:
    """Whether the members were called once each, in order, each after the one before ended."""
    members = set(blocks)
    steps = [step for step in log.steps if step[0] in members]
    return steps == [(block, entering) for block in blocks for entering in (True, False)]


def _linear_parameters(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if is_linear(m))  # type: ignore[operator]


def _choose_list(model: nn.Module, lists: dict[str, nn.ModuleList], log: CallLog) -> str:
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


def _shape(module: nn.Module) -> tuple[int, int]:
    out_features, in_features = read_weight(module).shape
    return out_features, in_features


def _why_not(module: nn.Module, log: CallLog, tied: list[str], routes: bool) -> str:
    """The reason why a linear outside expert lists is not a target; empty if it is one."""
    calls = log.calls[module]
    if not calls:
        return "never called on the traced window"
    if len(calls) > 1:
        return f"called {len(calls)} times in one forward pass, expected once"
    if calls[0].tensor is None:
        return "called with other arguments than one tensor"
    return _unfit(module, log, tied, routes)


def _unfit(module: nn.Module, log: CallLog, tied: list[str], routes: bool) -> str:
    """The reason why a linear that is called as it should be is not a target."""
    out_features, in_features = _shape(module)
    if len(tied) > 1:
        return f"its weight is shared: {', '.join(tied)}"
    if routes:
        return ROUTER
    if module in log.odd:
        return odd_class(module)
    if out_features * in_features <= out_features + in_features:
        return f"{out_features}x{in_features} is too small: rank 1 would not save anything"
    return ""


def _read_block(
    index: int,
    name: str,
    block: nn.Module,
    log: CallLog,
    owners: dict[int, list[str]],
    tokens: int,
    joins: Joins,
) -> tuple[Block, dict[str, str]]:
    """Targets and groups of one block, and what was left alone in it."""
    paths = {module: path for path, module in block.named_modules() if is_linear(module)}
    routers = log.choices.routers
    found = mixtures(block, log, tokens)
    routed = {module: mixture for mixture in found for module in mixture.linears}
    left_alone: dict[str, str] = {}
    for module, path in paths.items():
        routes = f"{name}.{path}.weight" in routers
        tied = owners[id(module.weight)]
        if module in routed:
            reason = routed[module].reason or _unfit(module, log, tied, routes)
        else:
            reason = _why_not(module, log, tied, routes)
        if reason:
            left_alone[f"{name}.{path}"] = reason
    for path, parameter in block.named_parameters():
        owner = block.get_submodule(path.rpartition(".")[0])
        if parameter.ndim >= 2 and not is_linear(owner):
            kind = f"{parameter.ndim}-D parameter of {type(owner).__name__}, not a linear layer"
            left_alone[f"{name}.{path}"] = ROUTER if f"{name}.{path}" in routers else kind
    chosen = [m for m, path in paths.items() if f"{name}.{path}" not in left_alone]
    groups = []
    for number, (expert, modules) in enumerate(_ordered(log, found, chosen)):
        targets = tuple(
            Target(
                name=f"{name}.{paths[module]}",
                projection=paths[module],
                block=index,
                group=number,
                out_features=_shape(module)[0],
                in_features=_shape(module)[1],
                bias=getattr(module, "bias", None) is not None,
                transposed=is_transposed(module),
                expert=expert,
                joins=None if expert is not None else joins.found.get(module),
            )
            for module in modules
        )
        groups.append(Group(index, number, targets[0].in_features, targets))
    return Block(index, name, tuple(groups)), left_alone


def _ordered(
    log: CallLog, found: list[Mixture], chosen: list[nn.Module]
) -> list[tuple[Expert | None, list[nn.Module]]]:
    """Groups of those modules in execution order, with the expert that they belong to."""
    wanted = set(chosen)
    routed = {module for mixture in found for module in mixture.linears}
    calls = [c for c in log.order if c.module in wanted and c.module not in routed]
    places = {call.module: place for place, call in enumerate(log.order)}
    groups: list[tuple[int, Expert | None, list[nn.Module]]] = [
        (places[group[0].module], None, [call.module for call in group]) for group in grouped(calls)
    ]
    for mixture in found:
        for group in mixture.groups:
            modules = [m for m in group.linears if m in wanted]
            if modules and mixture.first is not None:
                groups.append((mixture.first, group.expert, modules))
    groups.sort(key=lambda group: group[0])  # stable: a mixture keeps its order
    return [(expert, modules) for _, expert, modules in groups]


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
    log = CallLog(
        {m: f"{name}.{i}" for name, blocks in lists.items() for i, m in enumerate(blocks)}
    )
    joins, linears = Joins(), [m for m in model.modules() if is_linear(m)]
    with evaluating(model), watching(log, linears), joins.watching(log.members):
        run_window(model, input_ids)
    chosen = _choose_list(model, lists, log)
    owners = _owners(model)
    blocks: list[Block] = []
    left_alone: dict[str, str] = {}
    for index in range(len(lists[chosen])):
        name = f"{chosen}.{index}"
        block, left = _read_block(
            index, name, get_module(model, name), log, owners, input_ids.shape[1], joins
        )
        blocks.append(block)
        left_alone |= left
    if not any(block.groups for block in blocks):
        raise ModelError(
            f"no linear layer of the blocks {chosen!r} of {type(model).__name__} can be "
            f"compressed; first reason: {next(iter(left_alone.items()), 'no linear layers')}"
        )
    return Anatomy(tuple(blocks), left_alone)
