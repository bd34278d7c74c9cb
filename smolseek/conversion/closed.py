"""The closed form over all attention blocks: calibrate, convert under each plan of rope slots, keep the best.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config

from smolseek.checkpoint.folder import TensorFolder
from smolseek.config import ConvertSettings
from smolseek.conversion.attention import (
    Compression,
    Heads,
    HeadSizes,
    Projections,
    QueryLatent,
    RopePlan,
    compress,
    exact_query,
    fit_heads,
    fold_bias,
    fold_norms,
    latent_errors,
    portable_tensors,
    query_encoder,
    refit_decoder,
    rope_plans,
)
from smolseek.conversion.moments import LayerMoments, NormMoments, collect_moments, norm_moments
from smolseek.conversion.sources import read_projections
from smolseek.conversion.target import inverse_frequencies, target_config, target_rope
from smolseek.evaluation import measure_divergence, measure_quality
from smolseek.model import DeepseekV3, StockModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClosedForm:
    """Converted attention blocks (tensors under `self_attn.`), what they cost, and the rope base that they want."""

    layers: list[dict[str, Tensor]]
    errors: list[dict[str, Any]]
    rope_theta: float
    folds: tuple[tuple[int, ...], ...]


class ClosedFormConverter:
    """One source's attention under `settings`, weighed by what the dense model does on `windows_NT`.

    Plans are compared by KL(dense ‖ converted) of the whole model on `judged_NT`, other windows of the same text.
    """

    def __init__(
        self,
        dense: Any,
        tensors: TensorFolder,
        config: dict[str, Any],
        source: dict[str, Any],
        settings: ConvertSettings,
        windows_NT: Tensor,
        judged_NT: Tensor,
        folder: Path,
    ) -> None:
        self.dense, self.tensors, self.config, self.source, self.settings = dense, tensors, config, source, settings
        self.windows_NT, self.judged_NT, self.folder = windows_NT, judged_NT, folder
        self.target = target_config(config, settings)
        self.head_dim = source["head_dim"]

    def best(self) -> ClosedForm:
        """The plan of rope slots nearest to the dense model; rope_theta is one for the whole model."""
        angles = torch.tensor(inverse_frequencies(target_rope(self.source, self.settings), self.head_dim))
        best: tuple[float, ClosedForm] | None = None
        stride, moments = 0, []
        plans = rope_plans(self.head_dim, self.target["qk_rope_head_dim"])
        for plan in plans:
            if plan.stride != stride:  # the gradient at the slots depends on their frequencies alone
                stride, slots = plan.stride, plan.slot_frequencies(self.head_dim)
                moments = collect_moments(
                    self.dense, self.windows_NT, angles[slots], seed=self.settings.seed, folder=self.folder
                )
            closed = self.under(plan, moments)
            apart = self._apart(closed) if len(plans) > 1 else 0.0
            if best is None or apart < best[0]:
                best = apart, closed
        assert best is not None
        _tell(best[1].errors)
        return best[1]

    def _apart(self, closed: ClosedForm) -> float:
        target = target_config(self.config, self.settings, rope_theta=closed.rope_theta)
        converted = assemble(self.dense, target, closed.layers)
        apart = mean_divergence(converted, self.dense, self.judged_NT)
        log.info("rope slots %s: KL %.4f", closed.folds, apart)
        return apart

    def under(self, plan: RopePlan, moments: list[Callable[[], LayerMoments]]) -> ClosedForm:
        """All blocks under one plan, one after the other; all moments at once do not fit into memory."""
        blocks = [self._block(index, read(), plan) for index, read in enumerate(moments)]
        layers, errors = zip(*blocks, strict=True)
        theta = plan.rope_theta(self.source["rope"]["rope_theta"], self.head_dim)
        return ClosedForm(list(layers), list(errors), theta, plan.folds)

    def _block(self, index: int, moments: LayerMoments, plan: RopePlan) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One block's tensors and what they lose: the closed form, its decoders refitted behind the latent norms."""
        weights, moments, lost = self._fold(read_projections(self.tensors, self.source, index), moments)
        used = plan if self.source["rope_layers"][index] else plan.silent()
        compression = compress(weights, moments, used, self.head_dim, self.target["kv_lora_rank"])
        norm = norm_moments(moments, compression.encoder_RD)
        decoder_YR = refit_decoder(compression.target_YD, norm)
        sizes = HeadSizes(self.head_dim, self.target["qk_nope_head_dim"], self.target["v_head_dim"])
        heads = fit_heads(weights, compression, decoder_YR, sizes, moments.input_DD, norm.latent_RR)
        query = self._query(index, heads, weights, compression, moments, norm) if self.target["q_lora_rank"] else None
        tensors = portable_tensors(weights, compression, heads, self.head_dim, query)
        weighted, plain = latent_errors(compression, decoder_YR, moments, norm)
        errors = {"latent_error_weighted": weighted, "latent_error": plain}
        errors["rope_energy_kept"] = compression.rope_energy_kept
        return {name: tensor.float() for name, tensor in tensors.items()}, errors | lost

    def _fold(self, weights: Projections, moments: LayerMoments) -> tuple[Projections, LayerMoments, dict[str, float]]:
        """Weights and moments without what the target has no place for, and the energy lost by that."""
        lost: dict[str, float] = {}
        if self.source["qk_norms"]:
            weights, moments, lost["qk_norm_energy_lost"] = fold_norms(weights, moments)
        if self.source["biases"] and not self.target["attention_bias"]:
            weights, moments, lost["bias_energy_lost"] = fold_bias(weights, moments)
        return weights, moments, lost

    def _query(
        self,
        index: int,
        heads: Heads,
        weights: Projections,
        compression: Compression,
        moments: LayerMoments,
        norm: NormMoments,
    ) -> QueryLatent:
        """A query latent: exact at full rank, else refitted behind its norm."""
        rank, gain_D = self.target["q_lora_rank"], self.dense.model.layers[index].input_layernorm.weight.double()
        if exact := exact_query(heads.query_XE, gain_D, rank):
            return exact
        encoder_PE = query_encoder(heads, weights, compression, moments.input_DD, norm.latent_RR, rank)
        return QueryLatent(encoder_PE, refit_decoder(heads.query_XE, norm_moments(moments, encoder_PE)))


def _tell(errors: list[dict[str, Any]]) -> None:
    """Warn of what was approximated because the target has no place for it."""
    for field, what, remedy in (
        ("qk_norm_energy_lost", "q and k norms", "refinement wins most of it back"),
        ("bias_energy_lost", "q, k and v biases", "profile transformers keeps them"),
    ):
        if field in errors[0]:
            most = max(layer[field] for layer in errors)
            log.warning("%s are approximated: up to %.2g of their energy is lost; %s", what, most, remedy)


def assemble(dense: Any, target: dict[str, Any], layers: list[dict[str, Tensor]]) -> DeepseekV3:
    """The converted model in memory, its MLPs dense and every unconverted weight shared with the dense model."""
    config = DeepseekV3Config(**target | {"first_k_dense_replace": len(layers)})
    with torch.device("meta"):
        model = DeepseekV3(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    wanted = model.state_dict()
    state = {name: tensor for name, tensor in dense.state_dict().items() if name in wanted}
    for index, layer in enumerate(layers):
        state |= {f"model.layers.{index}.self_attn.{name}": tensor.float() for name, tensor in layer.items()}
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def mean_loss(model: DeepseekV3 | StockModel, windows_NT: Tensor) -> float:
    """Mean next-token loss over windows, in nats."""
    return measure_quality(model, windows_NT.flatten(), 0, window_tokens=windows_NT.shape[1]).loss


def mean_divergence(model: DeepseekV3, dense: Any, windows_NT: Tensor) -> float:
    """Mean KL(dense ‖ converted) of the next token over windows, in nats."""
    ids_T, size = windows_NT.flatten(), windows_NT.shape[1]
    return measure_divergence(model, StockModel(dense), ids_T, window_tokens=size).kl
