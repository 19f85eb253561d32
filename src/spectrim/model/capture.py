"""Hand the input of every group to a callback while blocks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from spectrim.model.anatomy import Group
from spectrim.model.weights import get_module


def first_tensor(args: tuple, kwargs: dict) -> Tensor:
    """The one tensor a linear was called with."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def capture_inputs(
    block: nn.Module, groups: Sequence[Group], callback: Callable[[Group, Tensor], None]
) -> Iterator[None]:
    """Call `callback(group, x)` whenever `block` is about to run a group.

    `x` holds the tokens that enter the group, flattened to (B*T, in): a view of the live tensor,
    to be read or copied but not changed. Its dtype and device are those of the forward pass.

    Args:
        block: the block's module, original or changed; a group's first target is looked up in it
            by its path inside the block.
        groups: the groups of this block that are wanted.
        callback: gets the group and its input.
    """
    handles = []
    try:
        for group in groups:

            def hook(_module: nn.Module, args: tuple, kwargs: dict, group: Group = group) -> None:
                x = first_tensor(args, kwargs)
                callback(group, x.reshape(-1, x.shape[-1]))

            target = get_module(block, group.targets[0].projection)
            handles.append(target.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
