"""The two losses of a language model, piece by piece (`tail.py`): next token, and divergence.

Both are summed over tokens, in nats, in fp32 or better.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.model.tail import Loss, Tail


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every token, nats: logits (b, t, vocabulary), labels (b, t) -> (b, t)."""
    labels = labels.to(logits.device)
    losses = F.cross_entropy(_wide(logits).flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def next_token(ids: Tensor) -> Loss:
    """Summed cross-entropy of windows (B, T); the last position predicts none of their tokens."""

    def loss(logits: Tensor, rows: slice, positions: slice) -> Tensor:
        labels = ids[:, 1:][rows, positions]
        return token_losses(logits[:, : labels.shape[1]], labels).sum()

    return loss


def kl_per_token(teacher: Tensor, student: Tensor) -> Tensor:
    """`KL(softmax(teacher) ‖ softmax(student))` in nats; (..., vocabulary) -> (...)."""
    log_p = F.log_softmax(teacher.to(_wide(student).dtype), -1)
    log_q = F.log_softmax(_wide(student), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergence(tail: Tail, teacher: Tensor) -> Loss:
    """Summed divergence from what follows from a teacher's last states (B, T, d).

    The teacher's logits are taken in its own precision, whatever autocast says of the student's.
    """

    def loss(logits: Tensor, rows: slice, positions: slice) -> Tensor:
        with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
            expected = tail.logits(teacher[rows, positions])
        return kl_per_token(expected, logits).sum()

    return loss
