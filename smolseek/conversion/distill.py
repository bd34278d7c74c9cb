"""The end-to-end stage: the whole converted model learns the dense model's next-token distribution.

Shapes: B windows, T tokens in each, N tokens in one row, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.conversion.calibrate import Calibration
from smolseek.conversion.collect import batches
from smolseek.conversion.descent import Descent, scale_latents
from smolseek.conversion.job import Job
from smolseek.conversion.mla.latent import LATENT_RMS
from smolseek.conversion.residual_stream import shuffled
from smolseek.conversion.sizes import DISTILL_BATCH_TOKENS, is_small
from smolseek.conversion.student import layers_of, mean_divergence, mean_loss, own_weights
from smolseek.model import DeepseekV3
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.balance import take_expert_counts, update_biases
from smolseek.model.experts import MixtureOfExperts
from smolseek.numerics.loss import divergence
from smolseek.numerics.precision import autocast
from smolseek.numerics.shares import ALONE, Shares

log = logging.getLogger(__name__)

_RATE = 0.011
"""Of each parameter's own size, over the root of the number of layers, for what every layer changes adds up: for the
many steps of a small source (LOG.md)."""
_RATE_PER_ROOT = 0.0127
"""The same for the few steps of other sources, times the root of the KL that they begin with: weights then have a way
to go that is about as long as this root, for KL is of second order in them (LOG.md)."""
_BALANCE_SPEED = 1e-3
_LARGE_PARTS = (MultiheadLatentAttention, MixtureOfExperts)
"""What is trained of a large source: the few tokens of its stage say little about all the other weights."""


def distill_model(
    job: Job, student: DeepseekV3, dense: Any, calibration: Calibration, dense_BTD: Tensor | None
) -> float | None:
    """Train the student in place and return its loss on the judged windows.

    `dense_BTD` are the dense model's final states on the refinement windows, if they are known.

    Returns None where the judged windows moved away from the dense model by it: then the training is undone.
    """
    job.on_progress("end-to-end KL", 0, job.distill_steps)
    before = job.shares.by_leader(lambda: mean_divergence(student, dense, calibration.judged_BT))
    parts = (MixtureOfExperts,) if job.settings.exact else () if is_small(job.source) else _LARGE_PARTS
    trained = own_weights(student, parts)
    kept = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    distill(
        student,
        dense.get_output_embeddings().weight,
        calibration.refined_BT,
        final_states(dense, calibration.refined_BT) if dense_BTD is None else dense_BTD,
        trained,
        steps=job.distill_steps,
        seed=job.settings.seed,
        rate=_RATE if is_small(job.source) else _RATE_PER_ROOT * before**0.5,
        on_step=lambda done: job.on_progress("end-to-end KL", done, job.distill_steps),
        shares=job.shares,
    )
    after = job.shares.by_leader(lambda: mean_divergence(student, dense, calibration.judged_BT))
    if after < before:
        return job.shares.by_leader(lambda: mean_loss(student, calibration.judged_BT))
    if job.shares.leads:
        log.warning("end-to-end KL rose from %.4f to %.4f on other text and is undone; name more text", before, after)
    student.load_state_dict(kept)
    return None


def distill(
    student: DeepseekV3,
    dense_head_VD: Tensor,
    windows_BT: Tensor,
    dense_BTD: Tensor,
    parameters: dict[str, nn.Parameter],
    *,
    steps: int,
    seed: int,
    rate: float,
    on_step: Callable[[int], None],
    shares: Shares = ALONE,
) -> None:
    """Train `parameters` in place by KL(dense ‖ converted) of the next token; routing biases balance all along.

    `dense_BTD` are the dense model's final states on the windows; `rate` is a step's share of a parameter's size, times
    the root of the number of layers; `on_step(done)` reports progress (docs/method.md, "End-to-end KL"). Several
    processes divide every step's windows.
    """
    for layer in layers_of(student):
        scale_latents(layer.self_attn, 1 / LATENT_RMS)
    take_expert_counts(student)
    descent = Descent(parameters, rate=rate * len(layers_of(student)) ** -0.5, steps=steps, shares=shares)
    batch, device = max(1, DISTILL_BATCH_TOKENS // windows_BT.shape[1]), dense_BTD.device
    for step, rows in enumerate(map(shares.own, shuffled(len(windows_BT), batch, steps, seed))):
        ids_BT, states_BTD = windows_BT[rows].to(device), dense_BTD[rows.to(device)]
        loss = distillation_loss(student, dense_head_VD, ids_BT, states_BTD) if len(rows) else None
        descent.step(loss, len(rows))
        counts = take_expert_counts(student)
        for _, counts_E in counts:
            shares.sum_(counts_E)
        update_biases(student, counts, _BALANCE_SPEED * (1 - step / steps))
        on_step(step + 1)
    descent.end()
    for layer in layers_of(student):
        scale_latents(layer.self_attn, LATENT_RMS)


def distillation_loss(student: DeepseekV3, dense_head_VD: Tensor, ids_BT: Tensor, dense_BTD: Tensor) -> Tensor:
    """Returns the mean KL(dense ‖ converted) of the next token over a batch, in nats."""
    with autocast(ids_BT.device, "auto"):
        hidden_ND = student.hidden_states(ids_BT).flatten(0, 1)
        return divergence(hidden_ND, student.lm_head.weight, dense_BTD.flatten(0, 1), dense_head_VD)


@torch.no_grad()
def final_states(dense: Any, windows_BT: Tensor) -> Tensor:
    """Returns a transformers model's final hidden states (B, T, D)."""
    with autocast(dense.device, "auto"):
        parts = [
            dense.base_model(input_ids=ids_BT.to(dense.device), use_cache=False).last_hidden_state
            for ids_BT in batches(windows_BT, DISTILL_BATCH_TOKENS)
        ]
    return torch.cat(parts)
