"""AdamW with a learning rate for every tensor (Loshchilov and Hutter, ICLR 2019).

PyTorch's takes one rate per group, and a group's operators are launched for that group alone: with
a group per tensor a network of 500 factors takes 7,000 launches per step. Here all tensors take
a step together, each with its own rate, in a dozen launches on an accelerator; the operations are
those of `torch.optim.AdamW`, in its order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectrim.tolerances import ADAM_EPSILON

BETAS = 0.9, 0.999


class AdamW:
    """The state of a training.

    Args:
        parameters: changed in place; one without a gradient stays, as does what is known of it.
        weight_decay: share of a tensor that a step at rate 1 takes away.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float):
        self._parameters, self._decay = list(parameters), weight_decay
        self._means: list[Tensor] = [torch.zeros_like(p.data) for p in parameters]
        self._squares: list[Tensor] = [torch.zeros_like(p.data) for p in parameters]
        self._steps = [0] * len(self._parameters)

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Take a step.

        Args:
            rates: learning rates, one per parameter.
        """
        reached = [i for i, p in enumerate(self._parameters) if p.grad is not None]
        if not reached:
            return
        for i in reached:
            self._steps[i] += 1
        values: list[Tensor] = [self._parameters[i].data for i in reached]
        gradients = [grad for p in self._parameters if (grad := p.grad) is not None]
        means, squares = ([of[i] for i in reached] for of in (self._means, self._squares))
        # What the moments lack of their size, as they began at zero.
        first, second = ([1 - beta ** self._steps[i] for i in reached] for beta in BETAS)
        torch._foreach_mul_(values, [1 - rates[i] * self._decay for i in reached])
        torch._foreach_lerp_(means, gradients, 1 - BETAS[0])
        torch._foreach_mul_(squares, BETAS[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - BETAS[1])
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_div_(sizes, [share**0.5 for share in second])
        torch._foreach_add_(sizes, ADAM_EPSILON)
        lengths = [-rates[i] / share for i, share in zip(reached, first, strict=True)]
        torch._foreach_addcdiv_(values, means, sizes, lengths)
