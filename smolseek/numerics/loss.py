"""Next-token loss from hidden states: cross-entropy, mixed with KL to a teacher, a bounded chunk of logits at a time.

Shapes: N tokens in one row, t some of those tokens, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from smolseek.numerics.memory import sent
from smolseek.numerics.precision import autocast_dtype
from smolseek.numerics.slices import even_slices

_MAX_CHUNK_BYTES = 2**28
"""Most bytes of logits held at once, in the dtype of the product that makes them."""
_COUNTS_SURE = {"cpu"}
"""Devices on which only the rows of sure labels are summed. The CPU would have to wait for another device's count."""
_BLOCK_LOGITS = {"cpu": 2**18}
"""Number of logits whose KL is computed at once, in fp32: few enough for a core's cache. Elsewhere: a whole chunk."""
IGNORED = -100
"""The label of a token that does not count in the loss."""


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
    """Returns the mean of (1 - w) · cross-entropy + w · τ² KL(teacher ‖ student), and the mean cross-entropy alone.

    Both are in nats per token, over the tokens whose label is not `IGNORED`; without any they are 0. Both distributions
    of the KL are at temperature τ (Hinton et al. 2015, section 2). The gradients are computed together with the loss,
    so that never more logits exist than those of one chunk. The loss can therefore be differentiated only once.

    Labels on the CPU are best, wherever the states are: they are counted, and nothing then waits for another device.
    """
    kept_N, device = labels_N != IGNORED, hidden_ND.device
    if not kept_N.all():
        kept_t = kept_N.nonzero().squeeze(1)
        labels_N, kept_t = labels_N[kept_t], sent(kept_t, device)
        hidden_ND = hidden_ND[kept_t]
        teacher_hidden_ND = None if teacher_hidden_ND is None else teacher_hidden_ND[kept_t]
    if not len(labels_N):
        nothing = hidden_ND.sum() + head_VD[:0].sum()  # each process needs a gradient of the head, be it zeros
        return nothing, nothing.detach()
    labels_N = sent(labels_N, device)
    teacher = (teacher_hidden_ND, teacher_head_VD) if distill_weight else (None, None)
    return _HeadLoss.apply(hidden_ND, head_VD, labels_N, *teacher, distill_weight, temperature, torch.is_grad_enabled())


def divergence(hidden_ND: Tensor, head_VD: Tensor, teacher_hidden_ND: Tensor, teacher_head_VD: Tensor) -> Tensor:
    """Returns the mean KL(teacher ‖ student) in nats per token, in chunks as `next_token_loss`."""
    any_labels_N = torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device)
    teacher = teacher_hidden_ND, teacher_head_VD
    return _HeadLoss.apply(hidden_ND, head_VD, any_labels_N, *teacher, 1.0, 1.0, torch.is_grad_enabled())[0]


class _HeadLoss(torch.autograd.Function):
    """Computes `next_token_loss` of tokens with labels, and its gradients in the same pass.

    A chunk takes three matrix products; recomputing its logits in the backward pass would take four.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        labels_N: Tensor,
        teacher_hidden_ND: Tensor | None,
        teacher_head_VD: Tensor | None,
        distill_weight: float,
        temperature: float,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = autocast_dtype(hidden_ND)
        x_ND, weight_VD, mean = hidden_ND.to(dtype), head_VD.to(dtype), 1 / len(labels_N)
        wants_hidden, wants_head = (differentiable and wanted for wanted in ctx.needs_input_grad[:2])
        hidden_grad_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        head_grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        sums = torch.zeros(2, device=hidden_ND.device)
        for rows in _chunks(len(labels_N), _MAX_CHUNK_BYTES // (dtype.itemsize * len(head_VD))):
            logits_NV = F.linear(x_ND[rows], weight_VD)
            if teacher_hidden_ND is None or teacher_head_VD is None:
                sums += _entropy_gradient(logits_NV, labels_N[rows])
            else:
                teacher_NV = F.linear(teacher_hidden_ND[rows], teacher_head_VD)
                sums += _mixed_gradient(logits_NV, labels_N[rows], teacher_NV, distill_weight, temperature)
            if hidden_grad_ND is not None:
                torch.mul(logits_NV @ weight_VD, mean, out=hidden_grad_ND[rows])
            if head_grad_VD is not None:
                _add_transposed_product(head_grad_VD, logits_NV, x_ND[rows], mean)
        ctx.gradients = [hidden_grad_ND, None if head_grad_VD is None else head_grad_VD.to(head_VD.dtype)]
        loss, entropy = (sums * mean).unbind()
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # not held here: autograd can then add to them in place
        if loss_grad.device.type != "cpu" or loss_grad.item() != 1:
            gradients = [None if gradient is None else gradient.mul_(loss_grad) for gradient in gradients]
        return *gradients, *[None] * 6


def _entropy_gradient(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Returns the sum of the cross-entropies, and overwrites the logits with its gradient, softmax - onehot(label).

    Near 1 a probability p has too few digits for 1 - p in its own dtype. There 1 - p is the sum of the other
    probabilities. A cross-entropy is at most 87 nats, where the probability underflows.
    """
    every_N = torch.arange(len(labels_N), device=labels_N.device)
    torch.softmax(logits_NV, -1, out=logits_NV)
    label_N = logits_NV[every_N, labels_N].float()
    sure_N = label_N > 0.5
    if logits_NV.device.type in _COUNTS_SURE:
        sure_t = sure_N.nonzero().squeeze(1)
        sure_tV = logits_NV[sure_t]
        sure_tV[every_N[: len(sure_t)], labels_N[sure_t]] = 0
        others_N = torch.zeros_like(label_N).index_copy_(0, sure_t, sure_tV.sum(-1, dtype=torch.float32))
    else:
        logits_NV[every_N, labels_N] = 0
        others_N = logits_NV.sum(-1, dtype=torch.float32)
    entropy_N = -label_N.clamp_min(torch.finfo(torch.float32).tiny).log()
    entropy_N = torch.where(sure_N, -torch.log1p(-others_N), entropy_N)
    gradient_N = torch.where(sure_N, -others_N, label_N - 1)
    logits_NV[every_N, labels_N] = gradient_N.to(logits_NV.dtype)  # scatter_ takes as long as the softmax
    return entropy_N.sum()


def _mixed_gradient(
    logits_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor, distill_weight: float, temperature: float
) -> Tensor:
    """Returns the sums of loss and cross-entropy (2,), and overwrites the logits with the gradient of the loss."""
    sums = torch.zeros(2, device=logits_NV.device)
    block = _BLOCK_LOGITS.get(logits_NV.device.type, logits_NV.numel()) // logits_NV.shape[1]
    for rows in _chunks(len(labels_N), block):
        labels_N1, part_NV = labels_N[rows].unsqueeze(1), logits_NV[rows].float()
        log_NV = part_NV.log_softmax(-1)
        target_NV = (teacher_NV[rows].float() / temperature).log_softmax(-1)
        student_NV = (part_NV / temperature).log_softmax(-1)
        label_N1 = log_NV.gather(1, labels_N1)
        divergence = F.kl_div(student_NV, target_NV, reduction="sum", log_target=True)
        loss = distill_weight * temperature**2 * divergence - (1 - distill_weight) * label_N1.sum()
        sums += torch.stack((loss, -label_N1.sum()))
        gradient_NV = log_NV.exp_().scatter_(1, labels_N1, label_N1.expm1()).mul_(1 - distill_weight)
        difference_NV = student_NV.exp_().sub_(target_NV.exp_())
        logits_NV[rows] = gradient_NV.add_(difference_NV, alpha=distill_weight * temperature)
    return sums


def _add_transposed_product(total_VD: Tensor, left_NV: Tensor, right_ND: Tensor, scale: float) -> None:
    """Add scale · leftᵀ right to the total.

    For bf16 on a CPU the small operand is transposed instead of the large one, and the product is computed in parts
    that fit the core's cache: 172 ms instead of 307 at 2,048 × 49,152 × 576 on one core.
    """
    if left_NV.dtype != torch.bfloat16 or left_NV.device.type != "cpu":
        total_VD.add_(left_NV.t() @ right_ND, alpha=scale)
        return
    right_DN = right_ND.t().contiguous()
    for part in _chunks(len(total_VD), 2048):
        total_VD[part].add_((right_DN @ left_NV[:, part]).t().contiguous(), alpha=scale)


def _chunks(count: int, most: int) -> list[slice]:
    """Returns as few slices of `count` rows as possible, of even lengths of at most `most` (but at least one row)."""
    return even_slices(count, -(-count // max(1, most)))
