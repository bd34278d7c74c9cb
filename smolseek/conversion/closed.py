"""The closed form over all attention blocks: calibrate, convert under each plan of rope slots, keep the best.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

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
from smolseek.conversion.moments import LayerMoments, NormMoments, collect_moments, collect_norm_moments
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


class _FittedBlock(NamedTuple):
    """One block and all that its tensors are made of."""

    weights: Projections
    moments: LayerMoments
    compression: Compression
    norm: NormMoments
    decoder_YR: Tensor
    heads: Heads


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
        spill: Path,
    ) -> None:
        self.dense, self.tensors, self.config, self.source, self.settings = dense, tensors, config, source, settings
        self.windows_NT, self.judged_NT, self.spill = windows_NT, judged_NT, spill
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
                    self.dense, self.windows_NT, angles[slots], seed=self.settings.seed, spill=self.spill
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
        """All blocks under one plan: the closed form, then decoders refitted behind the latent norms."""
        compressions, lost = [], []
        for index, read in enumerate(moments):
            weights, layer, lost_here = self._read(index, read)
            used = plan if self.source["rope_layers"][index] else plan.silent()
            compressions.append(compress(weights, layer, used, self.head_dim, self.target["kv_lora_rank"]))
            lost.append(lost_here)
        norms = collect_norm_moments(self.dense, self.windows_NT, [c.encoder_RD for c in compressions])
        blocks = [partial(self._fit, *block) for block in zip(count(), moments, compressions, norms)]
        del compressions, norms
        queries = self._query_encodings(blocks)
        layers, errors = [], []
        for index in range(len(blocks)):
            block = blocks.pop(0)()  # whose compression then is the last to go: twenty-four of a 1.7B model hold 3 GB
            query = self._query(index, block.heads, queries[index]) if queries else None
            weighted, plain = latent_errors(block.compression, block.decoder_YR, block.moments, block.norm)
            tensors = portable_tensors(block.weights, block.compression, block.heads, self.head_dim, query)
            layers.append({name: tensor.float() for name, tensor in tensors.items()})
            errors.append(
                {
                    "latent_error_weighted": weighted,
                    "latent_error": plain,
                    "rope_energy_kept": block.compression.rope_energy_kept,
                }
                | lost[index]
            )
        return ClosedForm(layers, errors, plan.rope_theta(self.source["rope"]["rope_theta"], self.head_dim), plan.folds)

    def _read(self, index: int, read: Callable[[], LayerMoments]) -> tuple[Projections, LayerMoments, dict[str, float]]:
        """One block's weights and moments without what the target has no place for, and the energy lost by that.

        Read when used, for all do not fit into memory.
        """
        weights, moments = read_projections(self.tensors, self.source, index), read()
        lost: dict[str, float] = {}
        if self.source["qk_norms"]:
            weights, moments, lost["qk_norm_energy_lost"] = fold_norms(weights, moments)
        if self.source["biases"] and not self.target["attention_bias"]:
            weights, moments, lost["bias_energy_lost"] = fold_bias(weights, moments)
        return weights, moments, lost

    def _fit(
        self, index: int, read: Callable[[], LayerMoments], compression: Compression, norm: NormMoments
    ) -> _FittedBlock:
        """One block behind its latent norm."""
        weights, moments, _ = self._read(index, read)
        sizes = HeadSizes(self.head_dim, self.target["qk_nope_head_dim"], self.target["v_head_dim"])
        decoder_YR = refit_decoder(compression.target_YD, norm)
        heads = fit_heads(weights, compression, decoder_YR, sizes, moments.input_DD, norm.latent_RR)
        return _FittedBlock(weights, moments, compression, norm, decoder_YR, heads)

    def _query_encodings(self, blocks: Sequence[Callable[[], _FittedBlock]]) -> list[tuple[Tensor, NormMoments]]:
        """Per layer the encoder of a query latent that is not exact, and the latent's moments; none without a rank."""
        rank = self.target["q_lora_rank"]
        if rank is None:
            return []
        encoders = []
        for fit in blocks:
            block = fit()
            latent_RR = block.norm.latent_RR
            encoders.append(
                query_encoder(block.heads, block.weights, block.compression, block.moments.input_DD, latent_RR, rank)
            )
        return list(zip(encoders, collect_norm_moments(self.dense, self.windows_NT, encoders), strict=True))

    def _query(self, index: int, heads: Heads, encoding: tuple[Tensor, NormMoments]) -> QueryLatent:
        """A query latent: exact at full rank, else refitted behind its norm."""
        encoder_PE, norm = encoding
        gain_D = self.dense.model.layers[index].input_layernorm.weight.double()
        exact = exact_query(heads.query_XE, gain_D, len(encoder_PE))
        return exact or QueryLatent(encoder_PE, refit_decoder(heads.query_XE, norm))


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
