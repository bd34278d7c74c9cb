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
import torch.nn.functional as F
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
from smolseek.model import DeepseekV3
from smolseek.training.loss import divergence

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
        for plan in rope_plans(self.head_dim, self.target["qk_rope_head_dim"]):
            if plan.stride != stride:  # the gradient at the slots depends on their frequencies alone
                stride, slots = plan.stride, plan.slot_frequencies(self.head_dim)
                moments = collect_moments(
                    self.dense, self.windows_NT, angles[slots], seed=self.settings.seed, spill=self.spill
                )
            closed = self.under(plan, moments)
            apart = mean_divergence(
                assemble(self.dense, self.target_under(closed), closed.layers), self.dense, self.judged_NT
            )
            log.info("rope slots %s: KL %.4f", plan.folds, apart)
            if best is None or apart < best[0]:
                best = apart, closed
        assert best is not None
        _tell(best[1].errors)
        return best[1]

    def target_under(self, closed: ClosedForm) -> dict[str, Any]:
        """config.json with the plan's rope base."""
        return target_config(self.config, self.settings, rope_theta=closed.rope_theta)

    def under(self, plan: RopePlan, moments: list[Callable[[], LayerMoments]]) -> ClosedForm:
        """All blocks under one plan: the closed form, then decoders refitted behind the latent norms."""
        sizes = HeadSizes(self.head_dim, self.target["qk_nope_head_dim"], self.target["v_head_dim"])
        blocks, lost = [], []
        for index, read in enumerate(moments):
            weights, layer, lost_here = self._folded(index, read())
            lost.append(lost_here)
            used = plan if self.source["rope_layers"][index] else plan.silent()
            blocks.append((weights, layer, compress(weights, layer, used, self.head_dim, self.target["kv_lora_rank"])))
        norms = collect_norm_moments(self.dense, self.windows_NT, [c.encoder_RD for _, _, c in blocks])
        decoders = [refit_decoder(c.target_YD, norm) for (_, _, c), norm in zip(blocks, norms, strict=True)]
        fitted = [
            fit_heads(weights, compression, decoder_YR, sizes, layer.input_DD, norm.latent_RR)
            for (weights, layer, compression), decoder_YR, norm in zip(blocks, decoders, norms, strict=True)
        ]
        queries = self._queries(blocks, fitted, norms)
        layers, errors = [], []
        for index, (weights, layer, compression) in enumerate(blocks):
            weighted, plain = latent_errors(compression, decoders[index], layer, norms[index])
            tensors = portable_tensors(weights, compression, fitted[index], self.head_dim, queries[index])
            layers.append({name: tensor.float() for name, tensor in tensors.items()})
            errors.append(
                {
                    "latent_error_weighted": weighted,
                    "latent_error": plain,
                    "rope_energy_kept": compression.rope_energy_kept,
                }
                | lost[index]
            )
        return ClosedForm(layers, errors, plan.rope_theta(self.source["rope"]["rope_theta"], self.head_dim), plan.folds)

    def _folded(self, index: int, layer: LayerMoments) -> tuple[Projections, LayerMoments, dict[str, float]]:
        """One block's weights and moments without what the target has no place for, and the energy lost by that."""
        weights, lost = read_projections(self.tensors, self.source, index), {}
        if self.source["qk_norms"]:
            weights, layer, lost["qk_norm_energy_lost"] = fold_norms(weights, layer)
        if self.source["biases"] and not self.target["attention_bias"]:
            weights, layer, lost["bias_energy_lost"] = fold_bias(weights, layer)
        return weights, layer, lost

    def _queries(
        self,
        blocks: list[tuple[Projections, LayerMoments, Compression]],
        fitted: list[Heads],
        norms: list[NormMoments],
    ) -> list[QueryLatent | None]:
        """Per layer the query latent, where the target has one: exact at full rank, else refitted behind its norm."""
        rank = self.target["q_lora_rank"]
        if rank is None:
            return [None] * len(blocks)
        gains = [layer.input_layernorm.weight.double() for layer in self.dense.model.layers]
        exact = [exact_query(heads.query_XE, gain, rank) for heads, gain in zip(fitted, gains, strict=True)]
        if None not in exact:
            return exact
        encoders = [
            query_encoder(heads, weights, compression, layer.input_DD, norm.latent_RR, rank)
            for (weights, layer, compression), heads, norm in zip(blocks, fitted, norms, strict=True)
        ]
        query_norms = collect_norm_moments(self.dense, self.windows_NT, encoders)
        refitted = (refit_decoder(heads.query_XE, norm) for heads, norm in zip(fitted, query_norms, strict=True))
        return [a or QueryLatent(*b) for a, *b in zip(exact, encoders, refitted, strict=True)]


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


@torch.no_grad()
def mean_loss(model: Any, windows_NT: Tensor) -> float:
    """Mean next-token loss over windows, in nats."""
    total = 0.0
    for ids_1T in windows_NT.split(1):
        out = model(ids_1T)
        logits_TV = (out if isinstance(out, Tensor) else out.logits)[0, :-1].float()
        total += F.cross_entropy(logits_TV, ids_1T[0, 1:]).item()
    return total / len(windows_NT)


@torch.no_grad()
def mean_divergence(model: DeepseekV3, dense: Any, windows_NT: Tensor) -> float:
    """Mean KL(dense ‖ converted) of the next token over windows, in nats."""
    total = 0.0
    for ids_1T in windows_NT.split(1):
        target_TD = dense.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
        heads = (model.lm_head.weight, target_TD, dense.get_output_embeddings().weight)
        total += divergence(model.hidden_states(ids_1T)[0], *heads).item()
    return total / len(windows_NT)
