"""What a router's scores tell its balancing: the quantile shift and the balance loss; pure functions on tensors.

Shapes: N tokens, E routed experts (or groups of them, where whole groups are chosen), K chosen per token, S sequences,
T tokens in a sequence.
"""

from typing import Any

import torch
from torch import Tensor


def quantile_shift(biased_NE: Tensor, chosen: int) -> Tensor:
    """By how much each bias (E,) must move, alone, for its expert to be chosen by its fair share K / E of the tokens.

    Expert e is chosen where its biased score is above the K-th highest of the others', t_ne: the shift is minus the
    (1 - K / E)-quantile over the tokens of s_ne + b_e - t_ne. All zero when every expert is chosen.
    """
    tokens, experts = biased_NE.shape
    rank = tokens - round(tokens * chosen / experts)
    if not 0 < rank < tokens:
        return biased_NE.new_zeros(experts)
    top = biased_NE.topk(chosen + 1, dim=-1).values
    last_N1, next_N1 = top[:, -2:-1], top[:, -1:]
    margin_NE = biased_NE - torch.where(biased_NE >= last_N1, next_N1, last_N1)
    shift_E = -margin_NE.kthvalue(rank, dim=0).values
    return shift_E.nan_to_num(0.0, 0.0, 0.0)  # a step that overflowed must not outlive its batch


def balance_loss(scores_NE: Tensor, indices_NK: Tensor, sequences: int) -> Tensor:
    """Mean over the sequences of Σ_e f_e P_e (DeepSeek-V3, equations 17-20, without α); 1 when balanced.

    f_e is expert e's share of the choices `indices_NK` times E, P_e the mean of its score over the sum of the token's
    scores. With one sequence of the whole batch and scores of a softmax: the loss of Switch Transformers (Fedus et al.
    2021, equation 4), of which f has no gradient either.
    """
    experts = scores_NE.shape[1]
    chosen_SX = indices_NK.reshape(sequences, -1)  # (S, T * K)
    counts_SE = scores_NE.new_zeros(sequences, experts).scatter_add_(
        1, chosen_SX, torch.ones_like(chosen_SX, dtype=scores_NE.dtype)
    )
    share_SE = counts_SE * (experts / chosen_SX.shape[1])
    normalised_NE = scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + 1e-20)
    mean_SE = normalised_NE.view(sequences, -1, experts).mean(dim=1)
    return (share_SE * mean_SE).sum(dim=-1).mean()


class _WithLoss(torch.autograd.Function):
    """`x` itself; in the backward pass `loss` receives a gradient of 1, as if it were added to what is minimised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.shape, loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.loss
        return grads[0], torch.ones(shape, dtype=dtype, device=device)


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x`, through whose backward pass `loss` is minimised too.

    No caller has to carry the loss to the end of the model, and recomputing activations counts it once: the graph that
    the backward pass runs through is the one that holds it.
    """
    out: Tensor = _WithLoss.apply(x, loss)
    return out
