"""The end-to-end stage: the whole converted model learns the dense model's next-token distribution and its states.

Shapes: B windows, T tokens in each, N tokens in one row, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.conversion.calibrate import Calibration
from smolseek.conversion.collect import TOKENS_AT_ONCE, batches
from smolseek.conversion.descent import Descent, scale_latents
from smolseek.conversion.job import Job
from smolseek.conversion.mla.latent import LATENT_RMS
from smolseek.conversion.residual_stream import DenseStates, shuffled
from smolseek.conversion.sizes import DISTILL_BATCH_TOKENS, is_small, matched_layers
from smolseek.conversion.student import layers_of, mean_divergence, mean_loss, own_weights
from smolseek.model import DeepseekV3
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.balance import take_expert_counts, update_biases
from smolseek.model.experts import MixtureOfExperts
from smolseek.numerics.loss import divergence
from smolseek.numerics.precision import autocast, compute_dtype
from smolseek.numerics.shares import ALONE, Shares

log = logging.getLogger(__name__)

_RATE = 0.011
"""Of each parameter's own size, over the root of the number of layers, for what every layer changes adds up: for the
many steps of a small source (LOG.md)."""
_RATE_PER_ROOT = 0.009
"""The same for the few steps of other sources, times the root of the KL that they begin with: weights then have a way
to go that is about as long as this root, for KL is of second order in them (LOG.md)."""
_BALANCE_SPEED = 1e-3
_BEGINNING_TOKENS = 4
_BEGINNINGS = 32
"""Beginnings in a step, beside its windows."""
_LARGE_PARTS = (MultiheadLatentAttention, MixtureOfExperts)
"""What is trained of a large source: the few tokens of its stage say little about all the other weights."""


def distill_model(
    job: Job, student: DeepseekV3, dense: Any, calibration: Calibration, states: DenseStates | None
) -> float | None:
    """Train the student in place and return its loss on the judged windows.

    `states` are the dense model's on the refinement windows, if they are known.

    Returns None where the judged windows moved away from the dense model by it: then the training is undone.
    """
    job.on_progress("end-to-end KL", 0, job.distill_steps)
    before = job.shares.by_leader(lambda: mean_divergence(student, dense, calibration.judged_BT))
    parts = (MixtureOfExperts,) if job.settings.exact else () if is_small(job.source) else _LARGE_PARTS
    trained = own_weights(student, parts)
    changing = {*trained, *dict(student.named_buffers())}  # routing biases among the latter
    kept = {name: tensor.clone() for name, tensor in student.state_dict().items() if name in changing}
    layers = matched_layers(job.source)
    states = states or dense_states(dense, calibration.refined_BT, layers)
    if len(calibration.more_BT):
        states = states.with_more(dense_states(dense, calibration.more_BT, layers))
    texts = [(states, max(1, DISTILL_BATCH_TOKENS[is_small(job.source)] // states.ids_BT.shape[1]))]
    if layers:
        beginnings_BT = cut_beginnings(states.ids_BT, job.distill_steps * _BEGINNINGS, job.settings.seed)
        texts.append((dense_states(dense, beginnings_BT, layers), _BEGINNINGS))
    distill(
        student,
        dense.get_output_embeddings().weight,
        texts,
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
    student.load_state_dict(kept, strict=False)
    return None


def distill(
    student: DeepseekV3,
    dense_head_VD: Tensor,
    texts: Sequence[tuple[DenseStates, int]],
    parameters: dict[str, nn.Parameter],
    *,
    steps: int,
    seed: int,
    rate: float,
    on_step: Callable[[int], None],
    shares: Shares = ALONE,
) -> None:
    """Train `parameters` in place by `distillation_loss`; routing biases balance all along.

    A step takes the given number of windows of each text, and its loss is the mean over their tokens. `rate` is a
    step's share of a parameter's size, times the root of the number of layers; `on_step(done)` reports progress
    (docs/method.md, "End-to-end KL"). Several processes divide every step's windows.
    """
    for layer in layers_of(student):
        scale_latents(layer.self_attn, 1 / LATENT_RMS)
    take_expert_counts(student)
    descent = Descent(parameters, rate=rate * len(layers_of(student)) ** -0.5, steps=steps, shares=shares)
    tokens = sum(count * text.ids_BT.shape[1] for text, count in texts)
    chosen = [shuffled(len(text.ids_BT), count, steps, seed) for text, count in texts]
    for step, rows_of_each in enumerate(zip(*chosen, strict=True)):
        losses = []
        for (text, count), rows in zip(texts, rows_of_each, strict=True):
            if len(own := shares.own(rows)):
                share = count * text.ids_BT.shape[1] / tokens * len(own) / len(rows) * shares.size
                losses.append(share * distillation_loss(student, dense_head_VD, text.of(own)))
        descent.step(torch.stack(losses).sum() if losses else None)
        counts = take_expert_counts(student)
        for _, counts_E in counts:
            shares.sum_(counts_E)
        update_biases(student, counts, _BALANCE_SPEED * (1 - step / steps))
        on_step(step + 1)
    descent.end()
    for layer in layers_of(student):
        scale_latents(layer.self_attn, LATENT_RMS)


def cut_beginnings(windows_BT: Tensor, count: int, seed: int) -> Tensor:
    """Returns short windows, cut out of others at random.

    The first token of a window becomes the sink of all attention, whatever it is, and no other token may. One token in
    256 is too few to learn that from.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = windows_BT.shape[1] // _BEGINNING_TOKENS * _BEGINNING_TOKENS
    pieces_BT = windows_BT[:, :whole].reshape(-1, _BEGINNING_TOKENS)
    return pieces_BT[torch.randperm(len(pieces_BT), generator=generator)[:count]]


def distillation_loss(student: DeepseekV3, dense_head_VD: Tensor, states: DenseStates) -> Tensor:
    """Returns the mean KL(dense ‖ converted) of the next token over windows, in nats, and how far streams are apart.

    The latter, added, is the mean of log(1 + |converted - dense|² / |dense|²) over tokens and the layers of `states`.
    It notices a token that wrongly becomes an attention sink, or does not, which the KL hardly does. The logarithm
    keeps such a token from outweighing all others (docs/method.md, "End-to-end KL").
    """
    behind_BTD: dict[int, Tensor] = {}
    with autocast(states.ids_BT.device, "auto"), _outputs(student, behind_BTD, states.behind_BTD):
        hidden_ND = student.hidden_states(states.ids_BT).flatten(0, 1)
        loss = divergence(hidden_ND, student.lm_head.weight, states.final_BTD.flatten(0, 1), dense_head_VD)
    apart = [_apart(behind_BTD[index], dense_BTD.float()) for index, dense_BTD in states.behind_BTD.items()]
    return loss + torch.stack(apart).mean() if apart else loss


def _apart(converted_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    errors_BT = (converted_BTD - dense_BTD).square().sum(-1) / dense_BTD.square().sum(-1)
    return errors_BT.log1p().mean()


@contextmanager
def _outputs(model: DeepseekV3, kept: dict[int, Tensor], layers: Iterable[int]) -> Iterator[None]:
    """While open, `kept` gets the output of some layers whenever the model runs."""
    hooks = [
        layers_of(model)[index].register_forward_hook(lambda _, __, out, index=index: kept.update({index: out}))
        for index in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def dense_states(dense: Any, windows_BT: Tensor, layers: Iterable[int] = ()) -> DenseStates:
    """Returns a transformers model's final hidden states, and its residual stream behind some layers."""
    final: list[Tensor] = []
    behind: dict[int, list[Tensor]] = {index: [] for index in layers}
    dtype = compute_dtype(dense.device, "auto")
    with autocast(dense.device, "auto"):
        for ids_BT in batches(windows_BT, TOKENS_AT_ONCE):
            out = dense.base_model(
                input_ids=ids_BT.to(dense.device), use_cache=False, output_hidden_states=bool(behind)
            )
            final.append(out.last_hidden_state)
            for index, parts in behind.items():
                parts.append(out.hidden_states[index + 1].to(dtype))
    return DenseStates(windows_BT, torch.cat(final), {index: torch.cat(parts) for index, parts in behind.items()})
