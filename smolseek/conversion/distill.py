"""The end-to-end stage: the whole converted model learns the dense model's next-token distribution and its states.

Shapes: B windows, T tokens in each, N tokens in one row, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.conversion.calibrate import Calibration
from smolseek.conversion.collect import TOKENS_AT_ONCE, batches
from smolseek.conversion.descent import Descent, constants, scale_latents
from smolseek.conversion.job import Job
from smolseek.conversion.mla.latent import LATENT_RMS
from smolseek.conversion.residual_stream import BEHIND_DTYPE, DenseStates, shuffled
from smolseek.conversion.sizes import BEGINNING_BATCH_TOKENS, DISTILL_BATCH_TOKENS, is_small, matched_layers
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
_RATE_PER_ROOT = 0.009
"""The same for the few steps of other sources, times the root of the KL that they begin with: weights then have a way
to go that is about as long as this root, for KL is of second order in them (LOG.md)."""
_BALANCE_SPEED = 1e-3
_LARGE_PARTS = (MultiheadLatentAttention, MixtureOfExperts)
"""What is trained of a large source: the few tokens of its stage say little about all the other weights."""


def distill_model(
    job: Job, student: DeepseekV3, dense: Any, calibration: Calibration, states: DenseStates | None
) -> float | None:
    """Train the student in place and return its loss on the judged windows.

    `states` are the dense model's on the refinement windows, if they are known.

    Returns None where it got no better by the judged windows: then the training is undone. Better is a lower KL; for a
    large source, whose judged text is long enough to tell small differences of loss, a lower sum of KL and loss.
    """

    def judged() -> list[float]:
        windows_BT = calibration.judged_BT
        divergence = job.shares.by_leader(lambda: mean_divergence(student, dense, windows_BT))
        if is_small(job.source) or not math.isfinite(divergence):
            return [divergence]
        return [divergence, job.shares.by_leader(lambda: mean_loss(student, windows_BT))]

    job.on_progress("end-to-end KL", 0, job.distill_steps)
    before = judged()
    parts = (MixtureOfExperts,) if job.settings.exact else () if is_small(job.source) else _LARGE_PARTS
    trained = own_weights(student, parts)
    names = {*trained, *dict(student.named_buffers())}  # routing biases among the latter
    changing = {name: tensor for name, tensor in student.state_dict().items() if name in names}
    start = {name: tensor.clone() for name, tensor in changing.items()}
    distill(
        student,
        dense.get_output_embeddings().weight,
        _draw_steps(job, dense, calibration, states),
        trained,
        steps=job.distill_steps,
        rate=_RATE if is_small(job.source) else _RATE_PER_ROOT * before[0] ** 0.5,
        on_step=lambda done: job.on_progress("end-to-end KL", done, job.distill_steps),
        shares=job.shares,
    )
    if go_to_lowest(changing, start, lambda: sum(judged()), sum(before)):
        return job.shares.by_leader(lambda: mean_loss(student, calibration.judged_BT))
    if job.shares.leads:
        measured = "KL" if is_small(job.source) else "KL and loss"
        told = "end-to-end training: %s of %.4f on other text did not get lower; it is undone, name more text"
        log.warning(told, measured, sum(before))
    return None


def _draw_steps(
    job: Job, dense: Any, calibration: Calibration, states: DenseStates | None
) -> Iterable[Sequence[tuple[States, Tensor]]]:
    """Returns what each step learns from: windows of the text, and where there are any, beginnings beside them."""
    layers, steps, seed = matched_layers(job.source), job.distill_steps, job.settings.seed
    texts: list[States] = [states or dense_states(dense, calibration.refined_BT, layers)]
    if len(calibration.more_BT):
        texts.append(NewStates(dense, calibration.more_BT, layers))
    parts_of_steps = [draw(texts, DISTILL_BATCH_TOKENS[is_small(job.source)], steps, seed)]
    if len(calibration.beginnings_BT):
        beginnings = NewStates(dense, calibration.beginnings_BT, layers)
        parts_of_steps.append(draw([beginnings], BEGINNING_BATCH_TOKENS, steps, seed))
    return zip(*parts_of_steps, strict=True)


@torch.no_grad()
def go_to_lowest(
    tensors: dict[str, Tensor], start: dict[str, Tensor], judged: Callable[[], float], before: float
) -> bool:
    """Move tensors to where `judged()` is lowest on the way from `start` to where they are; returns whether they moved.

    The way's end is tried, then three quarters of it and less, while that is lower. `before` is what the start was
    judged. The few tokens of a step also lead astray: what that costs grows with the square of the way, and what is
    gained, at first, with the way itself (docs/method.md, "End-to-end KL").
    """
    here, best, lowest, last = 1.0, 0.0, before, math.inf

    def go(share: float) -> float:
        for name, tensor in tensors.items():
            tensor.copy_(torch.lerp(start[name], tensor, share / here) if share else start[name])
        return share

    for share in (1.0, 0.75, 0.5, 0.25):
        here, found = go(share), judged()
        if found < lowest:
            best, lowest = share, found
        if not found < last:
            break
        last = found
    go(best)
    return best > 0


def distill(
    student: DeepseekV3,
    dense_head_VD: Tensor,
    batches: Iterable[Sequence[tuple[States, Tensor]]],
    parameters: dict[str, nn.Parameter],
    *,
    steps: int,
    rate: float,
    on_step: Callable[[int], None],
    shares: Shares = ALONE,
) -> None:
    """Train `parameters` in place by `distillation_loss`; routing biases balance all along.

    `batches` has for each of the `steps` some windows of one text or several, by number, and the loss is the mean over
    all their tokens. `rate` is a step's share of a parameter's size, times the root of the number of layers;
    `on_step(done)` reports progress (docs/method.md, "End-to-end KL"). Several processes divide every step's windows.
    """
    blocks = [layer.self_attn for layer in layers_of(student)]
    held = [part for block in blocks for part in constants(block)]
    for block in blocks:
        scale_latents(block, 1 / LATENT_RMS)
    take_expert_counts(student)
    descent = Descent(parameters, rate=rate * len(blocks) ** -0.5, steps=steps, held=held, shares=shares)
    for step, parts in enumerate(batches):
        tokens = [len(rows) * text.ids_BT.shape[1] for text, rows in parts]
        losses = []
        for (text, rows), count in zip(parts, tokens, strict=True):
            if len(own := shares.own(rows)):
                share = count / sum(tokens) * len(own) / len(rows) * shares.size
                losses.append(share * distillation_loss(student, dense_head_VD, text.of(own)))
        descent.step(torch.stack(losses).sum() if losses else None)
        counts = take_expert_counts(student)
        for _, counts_E in counts:
            shares.sum_(counts_E)
        update_biases(student, counts, _BALANCE_SPEED * (1 - step / steps))
        on_step(step + 1)
    descent.end()
    for block in blocks:
        scale_latents(block, LATENT_RMS)


def draw(texts: Sequence[States], tokens: int, steps: int, seed: int) -> Iterator[tuple[States, Tensor]]:
    """Returns for each step a text and the numbers of some of its windows, about `tokens` tokens.

    Texts have windows of different lengths, and a step has windows of one length. Each window comes once before any
    comes again, in an order drawn from `seed`.
    """
    counts = [max(1, tokens // text.ids_BT.shape[1]) for text in texts]
    rows = [shuffled(len(text.ids_BT), count, steps, seed) for text, count in zip(texts, counts, strict=True)]
    turns = [
        index
        for index, (text, count) in enumerate(zip(texts, counts, strict=True))
        for _ in range(0, len(text.ids_BT), count)
    ]
    for turn in shuffled(len(turns), 1, steps, seed):
        index = turns[int(turn)]
        yield texts[index], next(rows[index])


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


@dataclass(frozen=True)
class NewStates:
    """Windows that are met about once: the dense model's states on them are computed when they are."""

    dense: Any
    ids_BT: Tensor
    layers: Iterable[int]

    def of(self, rows: Tensor) -> DenseStates:
        """Returns those of some windows, all where the dense model lies."""
        return dense_states(self.dense, self.ids_BT[rows].to(self.dense.device), self.layers)


States = DenseStates | NewStates


@torch.no_grad()
def dense_states(dense: Any, windows_BT: Tensor, layers: Iterable[int] = ()) -> DenseStates:
    """Returns a transformers model's final hidden states, and its residual stream behind some layers."""
    final: list[Tensor] = []
    behind: dict[int, list[Tensor]] = {index: [] for index in layers}
    with autocast(dense.device, "auto"):
        for ids_BT in batches(windows_BT, TOKENS_AT_ONCE):
            out = dense.base_model(
                input_ids=ids_BT.to(dense.device), use_cache=False, output_hidden_states=bool(behind)
            )
            final.append(out.last_hidden_state)
            for index, parts in behind.items():
                parts.append(out.hidden_states[index + 1].to(BEHIND_DTYPE))
    return DenseStates(windows_BT, torch.cat(final), {index: torch.cat(parts) for index, parts in behind.items()})
