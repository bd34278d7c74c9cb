"""The balance loss of a router, and how it joins a model's loss; pure functions on tensors.

Shapes: B sequences, T tokens in each, N tokens in one row (B × T), E n_routed_experts, K num_experts_per_tok,
Z other numbers, flattened.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def own_counts(counts: Tensor) -> Tensor:
    """Returns the counts of one process that takes no others into account."""
    return counts


def balance_loss(
    scores_NE: Tensor, indices_NK: Tensor, sequences: int, sum_counts: Callable[[Tensor], Tensor] = own_counts
) -> Tensor:
    """Returns the mean over the sequences of Σ_e f_e P_e (DeepSeek-V3, equations 17-20, without α); 1 when balanced.

    f_e is expert e's share of the choices `indices_NK`, times E; it has no gradient. P_e is the mean over the tokens of
    expert e's score divided by the sum of the token's scores. With the whole batch as one sequence and softmax scores,
    this is the loss of Switch Transformers (Fedus et al. 2021, equation 4).
    """
    experts = scores_NE.shape[1]
    chosen_BZ = indices_NK.reshape(sequences, -1)  # Z = T × K
    counts_BE = scores_NE.new_zeros(sequences, experts).scatter_add_(
        1, chosen_BZ, torch.ones_like(chosen_BZ, dtype=scores_NE.dtype)
    )
    counts_BE = sum_counts(counts_BE)
    share_BE = counts_BE * (experts / counts_BE.sum(dim=-1, keepdim=True))
    normalised_NE = scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + 1e-20)
    mean_BE = normalised_NE.view(sequences, -1, experts).mean(dim=1)
    return (share_BE * mean_BE).sum(dim=-1).mean()


class _WithLoss(torch.autograd.Function):
    """Returns `x` unchanged; in the backward pass `loss` gets the gradient 1, like a summand of the minimised loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.shape, loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss
        return grads[0], torch.ones(shape, dtype=dtype, device=device)


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Returns `x` unchanged, and adds `loss` to whatever is minimised through `x`.

    No caller has to carry the loss to the end of the model. Recomputed activations count it once, because the backward
    pass runs through one graph only.
    """
    out: Tensor = _WithLoss.apply(x, loss)
    return out
