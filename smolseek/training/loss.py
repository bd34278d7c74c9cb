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
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean of (1 - w) · cross-entropy + w · τ² KL(teacher ‖ student) in nats per token, and the cross-entropy alone.

    Both are over the positions whose label is not `IGNORED` (0 where there are none), and only their logits are made;
    both distributions of the KL are at temperature τ (Hinton et al. 2015, section 2). More than one chunk is recomputed
    in the backward pass, so that the logits of one chunk at most are ever held.
    """
    kept_N = labels_N != IGNORED
    if not kept_N.all():
        hidden_ND, labels_N = hidden_ND[kept_N], labels_N[kept_N]
        teacher_hidden_ND = None if teacher_hidden_ND is None else teacher_hidden_ND[kept_N]
    if not len(labels_N):
        return hidden_ND.sum(), hidden_ND.sum().detach()
    if not distill_weight and has_fused_entropy(hidden_ND, head_VD):
        entropy = F.linear_cross_entropy(hidden_ND, head_VD, labels_N, options=torch.nn.LinearCrossEntropyOptions())
        return entropy, entropy.detach()
    chunk = max(1, _MAX_CHUNK_LOGITS // head_VD.shape[0])
    parts = range(0, len(labels_N), chunk)
    losses, entropies = [], []
    for start in parts:
        rows = slice(start, start + chunk)
        teacher = None
        if distill_weight:
            assert teacher_hidden_ND is not None and teacher_head_VD is not None
            teacher = (teacher_hidden_ND[rows], teacher_head_VD)
        arguments = (hidden_ND[rows], head_VD, labels_N[rows], teacher, distill_weight, temperature)
        loss, entropy = (
            _chunk_loss(*arguments) if len(parts) == 1 else checkpoint(_chunk_loss, *arguments, use_reentrant=False)
        )
        losses.append(loss)
        entropies.append(entropy.detach())
    return torch.stack(losses).sum() / len(labels_N), torch.stack(entropies).sum() / len(labels_N)


def has_fused_entropy(hidden_ND: Tensor, head_VD: Tensor) -> bool:
    """Whether torch has a chunked cross-entropy that does it: in fp32 alone, for it rounds a bf16 mean to bf16."""
    autocast = torch.is_autocast_enabled(hidden_ND.device.type)
    there = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return there and not autocast and hidden_ND.dtype == head_VD.dtype == torch.float32


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


def _divergence(logits_NV: Tensor, teacher: tuple[Tensor, Tensor], temperature: float = 1.0) -> Tensor:
    """Sum of τ² KL(teacher ‖ student) over positions, both at temperature τ."""
    with torch.no_grad():
        target_NV = (F.linear(*teacher).float() / temperature).log_softmax(-1)
    student_NV = (logits_NV / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(student_NV, target_NV, reduction="sum", log_target=True)


def _chunk_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    distill_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Sums over the chunk's positions."""
    logits_NV = F.linear(hidden_ND, head_VD).float()
    entropy = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    if teacher is None:
        return entropy, entropy
    divergence = _divergence(logits_NV, teacher, temperature)
    return (1 - distill_weight) * entropy + distill_weight * divergence, entropy
