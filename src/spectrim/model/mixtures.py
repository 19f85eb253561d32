"""Experts of a block: lists of which each token reaches some members only, and their groups.

Which experts a window reaches depends on its text. What one expert does is what all of them do, so
the experts that the traced window did not reach are read like those that it did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from spectrim.model.anatomy import Expert
from spectrim.model.call_log import CallLog, grouped, odd_class
from spectrim.model.experts.stack import ExpertStack
from spectrim.model.weights import is_linear


@dataclass(frozen=True)
class ExpertGroup:
    """Linear layers of one expert that read the same tokens.

    Attributes:
        expert: which.
        linears: in execution order.
    """

    expert: Expert
    linears: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Mixture:
    """Lists of one length whose members with the same number are one expert.

    Attributes:
        groups: of all experts, in the order in which they run.
        linears: all linear layers of the lists.
        first: place of the first call in the log; None if no expert was reached.
        reason: why there are no groups; empty if there are.
    """

    groups: tuple[ExpertGroup, ...]
    linears: frozenset[nn.Module]
    first: int | None
    reason: str = ""


def mixtures(block: nn.Module, log: CallLog, tokens: int) -> list[Mixture]:
    """The mixtures of a block in the order of its modules."""
    lists: dict[str, dict[str, list[nn.Module]]] = {}
    taken: list[str] = []
    for path, module in block.named_modules():
        if any(path.startswith(f"{other}.") for other in taken):
            continue
        if isinstance(module, ExpertStack):
            # What one module multiplies by in turn is one expert's.
            lists.setdefault(f"{path.rpartition('.')[0]}:{len(module)}", {})[path] = list(module)
        elif isinstance(module, nn.ModuleList) and _is_routed(module, log, tokens):
            lists[path] = {path: list(module)}
            taken.append(path)
    return [_read(found, log) for found in lists.values()]


def _is_routed(members: nn.ModuleList, log: CallLog, tokens: int) -> bool:
    """Whether some member saw only some of the tokens, or none."""
    linears = [m for m in members.modules() if is_linear(m)]
    seen = [call.tensor for m in linears for call in log.calls[m]]
    whole = [x is None or x.numel() == tokens * x.shape[-1] for x in seen]
    return (
        len(members) > 1
        and bool(linears)
        and not (all(whole) and all(log.calls[m] for m in linears))
    )


def _linears(member: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in member.named_modules() if is_linear(m)}


def _read(lists: Mapping[str, list[nn.Module]], log: CallLog) -> Mixture:
    """Groups of all experts, after the example of those that were reached."""
    inside = [[_linears(member) for member in members] for members in lists.values()]
    everything = frozenset(m for members in inside for found in members for m in found.values())
    places = {
        m: (s, e) for s, ms in enumerate(inside) for e, f in enumerate(ms) for m in f.values()
    }
    order = [places[call.module] for call in log.order if call.module in places]
    if not order:
        return Mixture((), everything, None, "no expert was reached by the traced window")
    reason = _irregular(inside, log)
    if reason:
        return Mixture((), everything, None, reason)
    steps: list[tuple[int, list[str]]] = []  # which list, and paths of a group inside its members
    for number in dict.fromkeys(s for s, _ in order):
        example = next(e for s, e in order if s == number)
        paths = {m: path for path, m in inside[number][example].items()}
        calls = [call for call in log.order if call.module in paths]
        steps += [(number, [paths[call.module] for call in group]) for group in grouped(calls)]
    by_list = len({e for _, e in order}) > 1 and [s for s, _ in order] == sorted(
        (s for s, _ in order), key=[number for number, _ in steps].index
    )
    groups = []
    for place, (number, paths) in enumerate(steps):
        step = ".".join(x for x in (list(lists)[number], "+".join(paths)) if x)
        for expert, found in enumerate(inside[number]):
            which = Expert(expert, step, place == 0, place == len(steps) - 1)
            groups.append((place, expert, ExpertGroup(which, tuple(found[p] for p in paths))))
    groups.sort(key=lambda g: (steps[g[0]][0], g[1], g[0]) if by_list else (g[1], g[0]))
    first = next(i for i, call in enumerate(log.order) if call.module in places)
    return Mixture(tuple(group for *_, group in groups), everything, first)


def _irregular(inside: list[list[dict[str, nn.Module]]], log: CallLog) -> str:
    """Why the experts of some lists cannot be read after one example; empty if they can."""
    for members in inside:
        shapes = [{p: tuple(m.weight.shape) for p, m in found.items()} for found in members]  # type: ignore[union-attr]
        if any(shape != shapes[0] for shape in shapes):
            return "its experts differ in their linear layers"
        for found in members:
            counts = {len(log.calls[m]) for m in found.values()}
            if counts not in ({0}, {1}):
                return f"an expert's linear layers are called {sorted(counts)} times, expected once"
            if any(call.tensor is None for m in found.values() for call in log.calls[m]):
                return "an expert is called with other arguments than one tensor"
            if found_odd := next((m for m in found.values() if m in log.odd), None):
                return odd_class(found_odd)
    return ""
