"""Layer-wise refinement: each converted block learns the dense block's output, behind the converted blocks before it.

Shapes: B windows, T tokens in each, N tokens in one row, D hidden_size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from smolseek.conversion.calibrate import Calibration
from smolseek.conversion.carve import Carving, carve, carving_loss, load_carving, refine_carving
from smolseek.conversion.descent import Descent, constants, scale_latents
from smolseek.conversion.job import Job
from smolseek.conversion.mla.latent import LATENT_RMS
from smolseek.conversion.residual_stream import BEHIND_DTYPE, DenseStates, ResidualStream
from smolseek.conversion.sizes import (
    CARVE_BATCH_TOKENS,
    CARVE_TOKENS,
    OPENING_BATCH_TOKENS,
    REFINE_BATCH_TOKENS,
    carve_steps,
    is_small,
    matched_layers,
)
from smolseek.conversion.student import layers_of
from smolseek.conversion.work_folder import WorkFolder
from smolseek.model import DeepseekV3
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.experts import MixtureOfExperts
from smolseek.numerics.precision import autocast

_RATE = {True: 0.015, False: 0.003}
"""Of each matrix's own size: for the many steps of a small source, and for the few of others (LOG.md)."""

Rope = tuple[Tensor, Tensor]
"""cos and sin of the target, as its attention takes them."""


def refine_layers(
    job: Job, student: DeepseekV3, dense: Any, calibration: Calibration, work: WorkFolder
) -> tuple[list[dict[str, float]], DenseStates]:
    """Refine the student in place, layer by layer, and carve its MLPs if the job says so.

    Returns errors by layer, and the dense model's states on the refinement windows. Layers that the work folder holds
    are loaded from it.
    """
    texts = [(calibration.refined_BT, REFINE_BATCH_TOKENS)]
    if job.refines_attention and len(calibration.openings_BT):
        texts.append((calibration.openings_BT, OPENING_BATCH_TOKENS))
    streams = [
        (student.model.rope(windows_BT.shape[1]), ResidualStream(dense.model, windows_BT, job.shares, tokens))
        for windows_BT, tokens in texts
    ]
    stream = streams[0][1]
    student.config = DeepseekV3Config(**job.target)
    errors, layers = [], layers_of(student)
    behind_BTD: dict[int, Tensor] = {}
    for index, layer in enumerate(layers):
        job.on_progress("refine layers", index, len(layers))
        kept = work.get(f"layer-{index}")
        carves = job.carves and index >= job.target["first_k_dense_replace"]
        if carves:
            layer.mlp = MixtureOfExperts(student.config).requires_grad_(False).eval().to(dense.device)
        block = nn.ModuleDict({"self_attn": layer.self_attn} | ({"mlp": layer.mlp} if carves else {}))
        facts: dict[str, float] = {}
        if kept is not None:
            block.load_state_dict(kept[0])
            facts = kept[1]
        for _, each in streams:
            each.enter(index)
        if kept is None and job.refines_attention:
            facts |= _refine_attention(job, layer.self_attn, streams, index)
        for rope, each in streams:
            each.pass_attention(partial(layer.self_attn, rope=rope))
        if kept is None and carves:
            facts |= _carve_mlp(job, layer.mlp, dense.model.layers[index].mlp, stream, index)
        for _, each in streams:
            each.pass_mlp(layer.mlp)
        if index in matched_layers(job.source):
            behind_BTD[index] = stream.hidden_BTD.to(BEHIND_DTYPE)
        if kept is None:
            work.put(f"layer-{index}", block.state_dict(), facts)
        errors.append(facts)
    job.on_progress("refine layers", len(layers), len(layers))
    return errors, DenseStates(calibration.refined_BT, stream.final_states(), behind_BTD)


def refine_attention(
    block: MultiheadLatentAttention,
    streams: Sequence[tuple[Rope, ResidualStream]],
    *,
    steps: int,
    seed: int,
    rate: float,
) -> None:
    """Train a converted attention block in place to give the output of the dense block that the streams stand before.

    A step takes windows of each stream, and its loss is the sum of their relative errors. The block trains in stock
    form, norm and all (docs/method.md, "Refinement"). Processes that share the streams divide every step's windows.
    """
    shares = streams[0][1].shares
    held = constants(block)
    scale_latents(block, 1 / LATENT_RMS)
    matrices = {name: p for name, p in block.named_parameters() if p.dim() == 2}  # they can do all that norms could
    descent = Descent(matrices, rate=rate, steps=steps, muon_heads=block.num_heads, held=held, shares=shares)
    for rows_of_each in zip(*(stream.batches(steps, seed) for _, stream in streams), strict=True):
        parts = [
            (rope, *stream.attention(shares.own(rows)))
            for (rope, stream), rows in zip(streams, rows_of_each, strict=True)
        ]
        energies = torch.stack([target_BTD.square().sum() for _, _, target_BTD in parts])
        shares.sum_(energies)
        losses = [
            attention_loss(block, *part, energy) for part, energy in zip(parts, energies, strict=True) if len(part[1])
        ]
        descent.step(shares.size * torch.stack(losses).sum() if losses else None)
    descent.end()
    scale_latents(block, LATENT_RMS)


def attention_loss(
    block: MultiheadLatentAttention, rope: Rope, x_BTD: Tensor, target_BTD: Tensor, energy: Tensor
) -> Tensor:
    """Returns Σ|converted - dense|² of a batch over `energy`: that of the dense outputs in all processes' batches."""
    with autocast(x_BTD.device, "auto"):
        out_BTD = block(x_BTD, rope)
    return (out_BTD - target_BTD).square().sum() / energy


@torch.no_grad()
def attention_error(block: MultiheadLatentAttention, rope: Rope, stream: ResidualStream) -> float:
    """Returns E|converted - dense|² / E|dense|² of an attention block's output, over the stream's probe."""
    x_BTD, target_BTD = stream.probed_attention()

    def error() -> float:
        total = (block(x_BTD, rope) - target_BTD).square().sum()
        return float(total / target_BTD.square().sum().clamp(min=1e-30))

    return stream.shares.by_leader(error)


def _refine_attention(
    job: Job, block: MultiheadLatentAttention, streams: Sequence[tuple[Rope, ResidualStream]], index: int
) -> dict[str, float]:
    """Refine one attention block in place; returns its error before and after, on the first stream."""
    rope, stream = streams[0]
    before, start = attention_error(block, rope, stream), copy.deepcopy(block.state_dict())
    seed, rate = job.settings.seed + index, _RATE[is_small(job.source)]
    refine_attention(block, streams, steps=job.refine_steps, seed=seed, rate=rate)
    after = attention_error(block, rope, stream)
    better = after < before  # false too where the refined block gives NaN
    if not better:
        block.load_state_dict(start)
    return {"attention_error": before, "attention_error_refined": after if better else before}


def _carve_mlp(job: Job, block: MixtureOfExperts, mlp: Any, stream: ResidualStream, index: int) -> dict[str, float]:
    """Carve and refine one dense MLP into `block`; returns its error relative to the dense output, before and after."""
    chosen, steps, shares = job.target["num_experts_per_tok"], carve_steps(job.source, job.settings), job.shares
    weights = {name: getattr(mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
    probe, sample = stream.mlp_samples()
    generator = torch.Generator().manual_seed(job.settings.seed + index)

    def closed_form() -> list[Tensor]:
        every = max(1, len(sample.weight_N) // CARVE_TOKENS)
        return [tensor.cpu() for tensor in carve(weights, sample.at(slice(None, None, every)), job.target)]

    def error(carving: Carving) -> float:
        return shares.by_leader(lambda: float(carving_loss(carving, probe, chosen)[0]))

    carving = Carving(*(tensor.to(probe.weight_N.device) for tensor in shares.by_leader(closed_form)))
    facts = {"mlp_error": error(carving)}
    if steps:
        tokens = CARVE_BATCH_TOKENS[is_small(job.source)]
        refined = refine_carving(
            carving, sample, chosen, steps=steps, generator=generator, batch_tokens=tokens, shares=shares
        )
        after = error(refined)
        better = after < facts["mlp_error"]
        carving = refined if better else carving
        facts["mlp_error_refined"] = after if better else facts["mlp_error"]
    load_carving(block, carving)
    return facts
