"""The fit: every attention block in closed form, under each plan of rope slots, and the best plan kept."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolseek.conversion.calibrate import Calibration
from smolseek.conversion.collect import collect_moments
from smolseek.conversion.job import Job
from smolseek.conversion.mla.exact import exact_tensors
from smolseek.conversion.mla.folding import fold_bias, fold_norms
from smolseek.conversion.mla.heads import Heads, QueryLatent, exact_query, fit_heads, query_encoder
from smolseek.conversion.mla.latent import Compression, Latent, compress, fit_latent, pad_latent
from smolseek.conversion.mla.layout import low_rank_tensors
from smolseek.conversion.mla.plans import RopePlan, rope_plans
from smolseek.conversion.mla.weights import HeadSizes, Projections
from smolseek.conversion.moments import LayerMoments
from smolseek.conversion.source_weights import read_projections
from smolseek.conversion.student import assemble, mean_divergence
from smolseek.conversion.work_folder import WorkFolder
from smolseek.formats.rope import YARN_STANDS_IN, inverse_frequencies, target_frequencies
from smolseek.numerics.memory import release_memory
from smolseek.numerics.precision import algebra_device

log = logging.getLogger(__name__)

_LOSSES = (
    ("qk_norm_energy_lost", "q and k norms", "refinement wins most of it back"),
    ("bias_energy_lost", "q, k and v biases", "profile transformers keeps them"),
)
"""Facts of a layer about what was approximated because the target has no place for it, and what helps."""


@dataclass(frozen=True)
class FittedAttention:
    """Converted attention blocks (tensors under `self_attn.`, fp32, on the CPU) and what they cost."""

    layers: list[dict[str, Tensor]]
    errors: list[dict[str, Any]]
    rope_theta: float
    """The rope base that the slots want."""
    folds: tuple[tuple[int, ...], ...] | None
    """Source frequencies in each rope slot; None in the exact form, whose slots are the source's own."""


def exact_block(job: Job, index: int) -> dict[str, Tensor]:
    """Returns one attention block in the exact form."""
    weights = read_projections(job.tensors, job.source, index, torch.device("cpu"))
    rotates = job.source.rope_layers[index]
    return exact_tensors(weights, job.source.head_dim, job.target["qk_nope_head_dim"], rotates=rotates)


def fit_attention(job: Job, dense: Any, calibration: Calibration, work: WorkFolder) -> FittedAttention:
    """Returns every attention block in closed form, from the work folder if it is there.

    `dense` is the transformers model. Errors are weighed by what it does on the calibration windows.

    Raises:
        ValueError: too little space for the moments.
    """
    if (kept := work.get("closed-form")) is not None:
        return _unpack(*kept, layers=job.source.num_hidden_layers)
    moments = work.path / "moments"
    job.shares.by_leader(lambda: _clear(moments))
    fitted = _fit_best_plan(job, dense, calibration, moments)
    named = {f"{i}.{name}": tensor for i, layer in enumerate(fitted.layers) for name, tensor in layer.items()}
    work.put("closed-form", named, {k: getattr(fitted, k) for k in ("errors", "rope_theta", "folds")})
    if job.shares.leads:
        shutil.rmtree(moments)
    release_memory()
    return fitted


def _clear(moments: Path) -> None:
    """Make the folder empty: an interrupted conversion leaves files in it."""
    shutil.rmtree(moments, ignore_errors=True)
    moments.mkdir()


def _unpack(tensors: dict[str, Tensor], facts: dict[str, Any], *, layers: int) -> FittedAttention:
    """Returns what the work folder kept."""
    blocks: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    for name, tensor in tensors.items():
        index, _, rest = name.partition(".")
        blocks[int(index)][rest] = tensor
    return FittedAttention(blocks, facts["errors"], facts["rope_theta"], tuple(map(tuple, facts["folds"])))


def _fit_best_plan(job: Job, dense: Any, calibration: Calibration, folder: Path) -> FittedAttention:
    """Returns the fit under the plan of rope slots nearest to the dense model; the whole model has one rope_theta.

    Plans are compared by KL(dense ‖ converted) of the whole model on the judged windows.
    """
    best: tuple[float, FittedAttention] | None = None
    stride, moments = 0, []
    plans = rope_plans(job.source.head_dim, job.target["qk_rope_head_dim"])
    on_more = _progress(job, plans, len(calibration.moments_BT))
    for plan in plans:
        if plan.stride != stride:  # the gradient at the slots depends on their frequencies alone
            stride = plan.stride
            moments = collect_moments(
                dense,
                calibration.moments_BT,
                _slot_angles(job, plan),
                seed=job.settings.seed,
                folder=folder,
                on_windows=on_more,
                shares=job.shares,
            )
        fitted = _fit_plan(job, dense, plan, moments, on_more)
        divergence = _divergence(job, dense, fitted, calibration.judged_BT) if len(plans) > 1 else 0.0
        divergence = math.inf if math.isnan(divergence) else divergence
        if best is None or divergence < best[0]:
            best = divergence, fitted
        on_more(1)
    assert best is not None
    if job.shares.leads:
        _warn_of_approximations(best[1].errors)
        if job.with_target(best[1].rope_theta).target["rope_parameters"]["rope_type"] == "yarn":
            log.warning("%s; profile transformers keeps it", YARN_STANDS_IN)
    return best[1]


def _slot_angles(job: Job, plan: RopePlan) -> Tensor:
    """Returns the angle per position (radians) at which each source frequency turns under the plan."""
    theta = plan.rope_theta(job.source.rope["rope_theta"], job.source.head_dim)
    rope = job.with_target(theta).target["rope_parameters"]
    slots = target_frequencies(rope, job.target["qk_rope_head_dim"])
    own = inverse_frequencies(job.source.rope, job.source.head_dim)
    return torch.tensor(plan.angles(slots, own))


def _progress(job: Job, plans: list[RopePlan], windows: int) -> Callable[[int], None]:
    """Returns a function that is told how much more is done, and tells the job.

    Counted are the windows of each pass for moments, and for each plan its layers and its comparison with the others.
    """
    passes, done = len({plan.stride for plan in plans}), 0
    count = passes * windows + len(plans) * (job.source.num_hidden_layers + 1)

    def on_more(more: int) -> None:
        nonlocal done
        done += more
        job.on_progress("closed form", done, count)

    on_more(0)
    return on_more


def _divergence(job: Job, dense: Any, fitted: FittedAttention, judged_BT: Tensor) -> float:
    """Returns the KL of the whole model under one plan."""
    converted = assemble(dense, job.with_target(fitted.rope_theta).target, fitted.layers)
    divergence = job.shares.by_leader(lambda: mean_divergence(converted, dense, judged_BT))
    log.info("rope slots %s: KL %.4f", fitted.folds, divergence)
    return divergence


def _fit_plan(
    job: Job, dense: Any, plan: RopePlan, moments: list[Callable[[], LayerMoments]], on_more: Callable[[int], None]
) -> FittedAttention:
    """Returns all blocks under one plan, one after the other: all moments at once do not fit into memory.

    Several processes divide the layers.
    """
    device = algebra_device(dense.device)

    def fit_layer(index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = read_projections(job.tensors, job.source, index, device)
        gain_D = dense.model.layers[index].input_layernorm.weight.to(device).double()
        used = plan if job.source.rope_layers[index] else plan.emptied()
        try:
            fitted = fit_block(job, weights, moments[index]().to(device), gain_D, used)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"checkpoint {job.name}: layer {index} has weights so large, small or alike that they cannot be "
                "factorised; fetch the checkpoint again or name another"
            ) from error
        on_more(1)
        return fitted

    layers, errors = zip(*job.shares.each(fit_layer, range(len(moments))), strict=True)
    if others := len(moments) - len(job.shares.own(range(len(moments)))):
        on_more(others)
    theta = plan.rope_theta(job.source.rope["rope_theta"], job.source.head_dim)
    return FittedAttention(list(layers), list(errors), theta, plan.folds)


def fit_block(
    job: Job, weights: Projections, moments: LayerMoments, gain_D: Tensor, plan: RopePlan
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns one block's tensors and what they lose; decoders are refitted behind the latent norms.

    `gain_D` is the gain of the norm in front of the block.
    """
    target, head_dim = job.target, job.source.head_dim
    weights, moments, lost = _fold(job, weights, moments)
    compression = compress(weights, moments, plan, head_dim)
    rank = target["kv_lora_rank"]
    latent = fit_latent(compression.encode, compression.target_YX, compression.fisher_YY, moments, rank)
    latent = pad_latent(latent, rank)
    sizes = HeadSizes(head_dim, target["qk_nope_head_dim"], target["v_head_dim"])
    heads = fit_heads(weights, compression, latent, sizes, moments.input_XX)
    query_rank = target["q_lora_rank"]
    query = _fit_query(heads, weights, compression, moments, latent, gain_D, query_rank) if query_rank else None
    tensors = low_rank_tensors(weights, compression, latent, heads, head_dim, query)
    errors = {"latent_error_weighted": latent.weighted_error, "latent_error": latent.plain_error}
    errors["rope_energy_kept"] = compression.rope_energy_kept
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}, errors | lost


def _fold(job: Job, weights: Projections, moments: LayerMoments) -> tuple[Projections, LayerMoments, dict[str, float]]:
    """Returns weights and moments without the parts that the target has no place for, and the energy lost by that."""
    lost: dict[str, float] = {}
    if job.source.qk_norms:
        weights, moments, lost["qk_norm_energy_lost"] = fold_norms(weights, moments)
    if job.source.biases and not job.target["attention_bias"]:
        weights, moments, lost["bias_energy_lost"] = fold_bias(weights, moments)
    return weights, moments, lost


def _fit_query(
    heads: Heads,
    weights: Projections,
    compression: Compression,
    moments: LayerMoments,
    latent: Latent,
    gain_D: Tensor,
    rank: int,
) -> QueryLatent:
    """Returns a query latent: exact at full rank, else with a decoder refitted behind its norm."""
    if exact := exact_query(heads.query_HQX, gain_D, rank):
        return exact
    encode = partial(query_encoder, heads, weights, compression, latent.normed_CC)
    query_QX = heads.query_HQX.flatten(0, 1)
    fitted = fit_latent(encode, query_QX, torch.eye(len(query_QX)).to(query_QX), moments, rank)
    return QueryLatent(fitted.encoder_CX, fitted.decoder_YC)


def _warn_of_approximations(errors: list[dict[str, Any]]) -> None:
    for field, what, remedy in _LOSSES:
        if field in errors[0]:
            most = max(layer[field] for layer in errors)
            log.warning("%s are approximated: up to %.2g of their energy is lost; %s", what, most, remedy)
