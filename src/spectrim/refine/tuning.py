"""All blocks trained together on whole windows: on the text, or on a teacher's distribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectrim.devices import on_host
from spectrim.model.losses import divergence, next_token
from spectrim.model.tail import Tail
from spectrim.refine.course import Course
from spectrim.refine.fitting import FitResult, FitSettings, LossOf, fit
from spectrim.refine.masters import frozen, master_weights


def loss_on(
    tail: Tail,
    ids: Tensor,
    device: torch.device,
    teacher: Tail | None = None,
    *,
    autocast: bool = False,
) -> LossOf:
    """Indices of windows (len,) -> their mean loss in nats per token, differentiable.

    Args:
        tail: of the model that is trained.
        ids: windows (N, T).
        device: of the model.
        teacher: of the model whose next-token distribution is the aim; None takes the next token.
        autocast: bf16 products, where trained parameters are fp32 among bf16 ones.
    """

    def loss_of(rows: Tensor) -> Tensor:
        chunk = ids[rows].to(device)
        expected = None
        if teacher is not None:
            with torch.no_grad():
                expected = teacher.states(chunk)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            hidden = tail.states(chunk)
            if teacher is None or expected is None:
                return tail.total(hidden[:, :-1], next_token(chunk)) / chunk[:, 1:].numel()
            return tail.total(hidden, divergence(teacher, expected)) / chunk.numel()

    return loss_of


def tune(
    tail: Tail,
    parameters: list[nn.Parameter],
    ids: Tensor,
    course: Course,
    settings: FitSettings,
    *,
    teacher: Tail | None = None,
) -> FitResult:
    """Train some parameters of a model in place; norm and head behind its blocks stay.

    Args:
        tail: of the model.
        parameters: to train; everything else is held fixed.
        ids: windows, (N, T).
        course: which of them are trained on and judged by, in nats per token.
        settings: hyper-parameters.
        teacher: of the model to learn from; None learns the text.

    Raises:
        NonFiniteError: the loss diverged; the parameters are as they were.
    """
    device = parameters[0].device
    loss_of = loss_on(tail, ids, device, teacher, autocast=not on_host(device))
    chosen = {id(p) for p in parameters}
    others = [p for p in tail.model.parameters() if id(p) not in chosen]
    with frozen(others), master_weights(parameters) as as_stored:
        name = "the compressed layers"
        return fit(name, parameters, loss_of, course, settings, judging=as_stored)
