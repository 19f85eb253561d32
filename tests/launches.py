"""Counts what a forward asks of a device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Launches"]


class Launches(TorchDispatchMode):
    """Counts operators that do work; views only change how memory is read."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view and op is not torch.ops.aten._unsafe_view.default:
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))
