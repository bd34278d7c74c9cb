"""Next-token loss from hidden states: cross-entropy, mixed with KL to a teacher, a bounded chunk of logits at a time.

Shapes: N positions (batch × tokens), D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_MAX_CHUNK_LOGITS = 2**25
"""Logits held at once; 128 MiB in fp32."""


IGNORED = -100
"""The label of a position that has no part in the loss."""


def next_token_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    teacher_hidden_ND: Tensor | None = None,
    teacher_head_VD: Tensor | None = None,
    distill_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean of (1 - w) · cross-entropy + w · KL(teacher ‖ student) in nats per token, and the cross-entropy alone.

    Both are over the positions whose label is not `IGNORED` (0 where there are none), and only their logits are made.
    More than one chunk is recomputed in the backward pass, so that the logits of one chunk at most are ever held
    (Hinton et al. 2015, temperature 1).
    """
    kept_N = labels_N != IGNORED
    if not kept_N.all():
        hidden_ND, labels_N = hidden_ND[kept_N], labels_N[kept_N]
        teacher_hidden_ND = None if teacher_hidden_ND is None else teacher_hidden_ND[kept_N]
    if not len(labels_N):
        return hidden_ND.sum(), hidden_ND.sum().detach()
    chunk = max(1, _MAX_CHUNK_LOGITS // head_VD.shape[0])
    parts = range(0, len(labels_N), chunk)
    losses, entropies = [], []
    for start in parts:
        rows = slice(start, start + chunk)
        teacher = None
        if distill_weight:
            assert teacher_hidden_ND is not None and teacher_head_VD is not None
            teacher = (teacher_hidden_ND[rows], teacher_head_VD)
        arguments = (hidden_ND[rows], head_VD, labels_N[rows], teacher, distill_weight)
        loss, entropy = (
            _chunk_loss(*arguments) if len(parts) == 1 else checkpoint(_chunk_loss, *arguments, use_reentrant=False)
        )
        losses.append(loss)
        entropies.append(entropy.detach())
    return torch.stack(losses).sum() / len(labels_N), torch.stack(entropies).sum() / len(labels_N)


def divergence(hidden_ND: Tensor, head_VD: Tensor, teacher_hidden_ND: Tensor, teacher_head_VD: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) in nats per position; chunks as in `next_token_loss`."""
    chunk = max(1, _MAX_CHUNK_LOGITS // head_VD.shape[0])
    parts = list(zip(hidden_ND.split(chunk), teacher_hidden_ND.split(chunk), strict=True))

    def part_divergence(part_ND: Tensor, teacher_ND: Tensor) -> Tensor:
        return _divergence(F.linear(part_ND, head_VD).float(), (teacher_ND, teacher_head_VD))

    if len(parts) == 1:
        return part_divergence(*parts[0]) / len(hidden_ND)
    total = torch.stack([checkpoint(part_divergence, *part, use_reentrant=False) for part in parts]).sum()
    return total / len(hidden_ND)


def _divergence(logits_NV: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of KL(teacher ‖ student) over positions."""
    with torch.no_grad():
        target_NV = F.linear(*teacher).float().log_softmax(-1)
    return F.kl_div(logits_NV.log_softmax(-1), target_NV, reduction="sum", log_target=True)


def _chunk_loss(
    hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, teacher: tuple[Tensor, Tensor] | None, distill_weight: float
) -> tuple[Tensor, Tensor]:
    """Sums over the chunk's positions."""
    logits_NV = F.linear(hidden_ND, head_VD).float()
    entropy = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    if teacher is None:
        return entropy, entropy
    return (1 - distill_weight) * entropy + distill_weight * _divergence(logits_NV, teacher), entropy
