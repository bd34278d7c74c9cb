"""The conversion, folder to folder: check, calibrate, convert layer by layer, write a stock DeepSeek-V3 checkpoint.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config

from smolseek import __version__
from smolseek.checkpoint.atomic import refuse_existing
from smolseek.checkpoint.folder import FolderWriter, TensorFolder
from smolseek.checkpoint.hub import load_stock, load_tokenizer
from smolseek.checkpoint.source import read_config, resolve_folder
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
    exact_tensors,
    fit_heads,
    fold_bias,
    latent_errors,
    portable_tensors,
    query_encoder,
    refit_decoder,
    rope_plans,
)
from smolseek.conversion.card import model_card
from smolseek.conversion.experts import balancing_bias, router_rows, upcycle
from smolseek.conversion.moments import (
    LayerMoments,
    NormMoments,
    collect_mlp_inputs,
    collect_moments,
    collect_norm_moments,
)
from smolseek.conversion.sources import check_tensors, read_projections
from smolseek.conversion.target import inverse_frequencies, read_source, target_config, target_rope
from smolseek.data import calibration_windows
from smolseek.model import DeepseekV3

log = logging.getLogger(__name__)

_HELD_OUT_WINDOWS = 16
_JUDGED_TOKENS = 512  # plans are compared at the length that perplexity is measured at
_ROUTER_TOKENS = 4096


@dataclass
class _Attention:
    """Converted attention blocks, what they cost, and the rope base that they want."""

    layers: list[dict[str, Tensor]]
    errors: list[dict[str, float]] = field(default_factory=list)
    plan: RopePlan | None = None
    rope_theta: float | None = None
    loss: float | None = None


def convert(
    source: str | Path, out: str | Path, *, settings: ConvertSettings | None = None, force: bool = False, **fields: Any
) -> Path:
    """Write the DeepSeek-V3 form of a Llama-family checkpoint, a stock folder, and return its path.

    `fields` are those of `ConvertSettings`, in place of or on top of `settings`; `calibration` may be one name or
    several. Every refusal comes before anything heavy runs, and `out` is complete or absent.

    Raises:
        TypeError: a field that `ConvertSettings` does not have.
        ValueError: the source is missing, unsupported or broken, the settings do not fit it, there is no calibration
            text, or `out` exists and `force` is not set.
    """
    if "calibration" in fields:
        names = fields["calibration"]
        fields["calibration"] = (str(names),) if isinstance(names, str | Path) else tuple(map(str, names))
    settings = dataclasses.replace(settings or ConvertSettings(), **fields)
    return _Conversion(source, Path(out), settings, force).run()


class _Conversion:
    """One conversion: what was read and measured on the way."""

    def __init__(self, source: str | Path, out: Path, settings: ConvertSettings, force: bool) -> None:
        self.started = time.perf_counter()
        self.name, self.out, self.settings, self.force = str(source), out, settings, force
        self.folder = resolve_folder(source)
        self.config = read_config(self.folder)
        target = target_config(self.config, settings)
        self.source = read_source(self.config)
        refuse_existing(out, force)
        self.calibrated = not settings.exact or settings.experts != "none"
        if self.calibrated and not settings.calibration:
            raise ValueError(
                "calibration: none given, and the low-rank cut is weighed by it; name text files or builtin:python"
            )
        self.tensors = TensorFolder(self.folder)
        check_tensors(self.tensors, self.source, attention_bias=target["attention_bias"])

    def run(self) -> Path:
        """Calibrate, convert, write."""
        self.calibration: dict[str, Any] = {}
        if self.calibrated:
            self._read_calibration()
        attention = _Attention([]) if self.settings.exact else self._best_attention()
        routers = self._routers(attention) if self.settings.experts == "upcycle" else None
        target = target_config(self.config, self.settings, rope_theta=attention.rope_theta)
        if self.settings.exact:
            target |= {"dtype": "float32", "torch_dtype": "float32"}  # bf16 would round the exactness away
        with FolderWriter(self.out, force=self.force) as writer:
            for name, tensor in self._target_tensors(attention, routers, target):
                keep_fp32 = name.endswith("e_score_correction_bias")
                writer.add(name, tensor.to(torch.float32 if keep_fp32 else getattr(torch, target["dtype"])))
            report = self._report(attention, target)
            writer.write_json("config.json", target)
            writer.write_json("conversion.json", report)
            writer.write_text("README.md", model_card(self.out.name, report, target["dtype"]))
            writer.copy_tokenizer(self.folder)
        return self.out

    # -- calibration --------------------------------------------------------------------------------------------------

    def _read_calibration(self) -> None:
        """Windows for the moments and, apart from them, windows to judge by; the dense model that reads them."""
        settings = self.settings
        tokens = min(settings.calibration_window_tokens, self.source["max_position_embeddings"])
        windows_NT = calibration_windows(
            load_tokenizer(self.folder),
            settings.calibration,
            windows=settings.calibration_windows + _HELD_OUT_WINDOWS,
            window_tokens=tokens,
            separator=settings.separator,
            seed=settings.seed,
        )
        held_out = max(1, min(_HELD_OUT_WINDOWS, len(windows_NT) // 4))
        self.windows_NT = windows_NT[held_out:] if len(windows_NT) > 1 else windows_NT
        judged_T = windows_NT[:held_out].flatten()
        length = min(len(judged_T), _JUDGED_TOKENS, self.source["max_position_embeddings"])
        self.judged_NT = judged_T[: len(judged_T) // length * length].view(-1, length)
        digest = hashlib.sha256(windows_NT.to(torch.int64).numpy().tobytes()).hexdigest()
        self.calibration = {"windows": len(self.windows_NT), "window_tokens": tokens, "tokens_sha256": digest}
        self.dense = load_stock(self.folder).model

    def _best_attention(self) -> _Attention:
        """The plan of rope slots with the lowest loss on the judged windows; rope_theta is one for the whole model."""
        head_dim = self.source["head_dim"]
        rope_dim = target_config(self.config, self.settings)["qk_rope_head_dim"]
        angles = torch.tensor(inverse_frequencies(target_rope(self.source, self.settings), head_dim))
        best: _Attention | None = None
        stride, moments = 0, []
        for plan in rope_plans(head_dim, rope_dim):
            if plan.stride != stride:  # the gradient at the slots depends on their frequencies alone
                stride, slots = plan.stride, plan.slot_frequencies(head_dim)
                moments = collect_moments(self.dense, self.windows_NT, angles[slots], seed=self.settings.seed)
            attention = self._attention(plan, moments)
            log.info("rope slots %s: loss %.4f", plan.folds, attention.loss)
            if best is None or best.loss is None or (attention.loss or 0.0) < best.loss:
                best = attention
        assert best is not None
        self.calibration["held_out_loss"] = {
            "tokens": self.judged_NT.numel(),
            "dense": _loss(self.dense, self.judged_NT),
            "converted": best.loss,
        }
        return best

    def _attention(self, plan: RopePlan, moments: list[LayerMoments]) -> _Attention:
        """All blocks under one plan: the closed form, then the decoder refitted behind the latent norm."""
        head_dim, target = self.source["head_dim"], target_config(self.config, self.settings)
        sizes = HeadSizes(head_dim, target["qk_nope_head_dim"], target["v_head_dim"])
        blocks, lost = [], 0.0
        for index, layer in enumerate(moments):
            weights = self._projections(index)
            if not target["attention_bias"]:
                weights, layer, lost_here = fold_bias(weights, layer)
                lost = max(lost, lost_here)
            used = plan if self.source["rope_layers"][index] else plan.silent()
            blocks.append((weights, layer, compress(weights, layer, used, head_dim, target["kv_lora_rank"])))
        if self.source["biases"] and not target["attention_bias"]:
            log.warning(
                "q, k and v biases are approximated: up to %.2g of their energy is lost; exact keeps them", lost
            )
        norms = collect_norm_moments(self.dense, self.windows_NT, [c.encoder_RD for _, _, c in blocks])
        decoders = [refit_decoder(c.target_YD, norm) for (_, _, c), norm in zip(blocks, norms, strict=True)]
        fitted = [
            fit_heads(weights, compression, decoder_YR, sizes, layer.input_DD, norm.latent_RR)
            for (weights, layer, compression), decoder_YR, norm in zip(blocks, decoders, norms, strict=True)
        ]
        queries = self._queries(blocks, fitted, norms, target["q_lora_rank"])
        layers, errors = [], []
        for index, (weights, layer, compression) in enumerate(blocks):
            weighted, plain = latent_errors(compression, decoders[index], layer, norms[index])
            tensors = portable_tensors(weights, compression, fitted[index], head_dim, queries[index])
            layers.append({name: tensor.float() for name, tensor in tensors.items()})
            errors.append(
                {
                    "layer": index,
                    "latent_error_weighted": weighted,
                    "latent_error": plain,
                    "rope_energy_kept": compression.rope_energy_kept,
                }
            )
        attention = _Attention(layers, errors, plan, plan.rope_theta(self.source["rope"]["rope_theta"], head_dim))
        attention.loss = _loss(self._assemble(attention), self.judged_NT)
        return attention

    def _queries(
        self,
        blocks: list[tuple[Projections, LayerMoments, Compression]],
        fitted: list[Heads],
        norms: list[NormMoments],
        rank: int | None,
    ) -> list[QueryLatent | None]:
        """Per layer the query latent, where the target has one: exact at full rank, else refitted behind its norm."""
        if rank is None:
            return [None] * len(blocks)
        names = (f"model.layers.{index}.input_layernorm.weight" for index in range(len(blocks)))
        gains = [self.tensors.get(name).double() for name in names]
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

    def _assemble(self, attention: _Attention) -> DeepseekV3:
        """The converted model in memory, its MLPs dense and every unconverted weight shared with the dense model."""
        target = target_config(self.config, self.settings, rope_theta=attention.rope_theta)
        config = DeepseekV3Config(**target | {"first_k_dense_replace": self.source["num_hidden_layers"]})
        with torch.device("meta"):
            model = DeepseekV3(config)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        state = {name: tensor for name, tensor in self.dense.state_dict().items() if name in model.state_dict()}
        for index, layer in enumerate(attention.layers):
            state |= {f"model.layers.{index}.self_attn.{name}": tensor for name, tensor in layer.items()}
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _routers(self, attention: _Attention) -> list[tuple[Tensor, Tensor]]:
        """Per layer, router rows and bias that spread the converted model's own MLP inputs evenly over the copies."""
        model = self.dense if self.settings.exact else self._assemble(attention)
        copies = target_config(self.config, self.settings)["n_group"]
        dtype = getattr(torch, self.source["dtype"])
        generator = torch.Generator().manual_seed(self.settings.seed)
        routers = []
        for inputs_TD in collect_mlp_inputs(model, self.windows_NT, _ROUTER_TOKENS):
            rows_ND = router_rows(inputs_TD, copies, generator).to(dtype)  # balanced as they will be written
            routers.append((rows_ND, balancing_bias(inputs_TD, rows_ND.float())))
        return routers

    # -- writing ------------------------------------------------------------------------------------------------------

    def _target_tensors(
        self, attention: _Attention, routers: list[tuple[Tensor, Tensor]] | None, target: dict[str, Any]
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the target in order, each source tensor read when its turn comes."""
        yield self._source_tensor("model.embed_tokens.weight")
        for index in range(self.source["num_hidden_layers"]):
            layer = f"model.layers.{index}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield self._source_tensor(f"{layer}{norm}.weight")
            if self.settings.exact:
                block = exact_tensors(
                    self._projections(index),
                    self.source["head_dim"],
                    target["qk_nope_head_dim"],
                    rotates=self.source["rope_layers"][index],
                )
            else:
                block = attention.layers[index]
            for name, tensor in block.items():
                yield f"{layer}self_attn.{name}", tensor
            mlp = {name: f"{layer}mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
            if routers is None or index < target["first_k_dense_replace"]:
                yield from (self._source_tensor(name) for name in mlp.values())
            else:
                dense = {name: self.tensors.get(full) for name, full in mlp.items()}
                for name, tensor in upcycle(dense, target, *routers[index]):
                    yield f"{layer}mlp.{name}", tensor
        yield self._source_tensor("model.norm.weight")
        if not target["tie_word_embeddings"]:
            tied = self.source["tie_word_embeddings"]
            yield "lm_head.weight", self.tensors.get("model.embed_tokens.weight" if tied else "lm_head.weight").clone()

    def _source_tensor(self, name: str) -> tuple[str, Tensor]:
        return name, self.tensors.get(name)

    def _projections(self, index: int) -> Projections:
        return read_projections(self.tensors, self.source, index)

    def _report(self, attention: _Attention, target: dict[str, Any]) -> dict[str, Any]:
        """conversion.json."""
        layers, source = self.source["num_hidden_layers"], self.source
        before = layers * 2 * source["num_key_value_heads"] * source["head_dim"]
        after = layers * (target["kv_lora_rank"] + target["qk_rope_head_dim"])
        source_bytes, target_bytes = (getattr(torch, tree["dtype"]).itemsize for tree in (source, target))
        return {
            "source": self.name,
            "settings": {
                k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.settings).items()
            },
            "kv_lora_rank": target["kv_lora_rank"],
            "qk_rope_head_dim": target["qk_rope_head_dim"],
            "rope_theta": target["rope_theta"],
            "rope_slots": None if attention.plan is None else [list(fold) for fold in attention.plan.folds],
            "cache": {
                "source_numbers_per_token": before,
                "source_bytes_per_token": before * source_bytes,
                "numbers_per_token": after,
                "bytes_per_token": after * target_bytes,
            },
            "calibration": self.calibration,
            "layers": attention.errors,
            "versions": {"smolseek": __version__, **{name: version(name) for name in ("torch", "transformers")}},
            "seconds": round(time.perf_counter() - self.started, 3),
        }


@torch.no_grad()
def _loss(model: Any, windows_NT: Tensor) -> float:
    """Mean next-token loss over windows, in nats."""
    total = 0.0
    for ids_1T in windows_NT.split(1):
        out = model(ids_1T)
        logits_TV = (out if isinstance(out, Tensor) else out.logits)[0, :-1].float()
        total += F.cross_entropy(logits_TV, ids_1T[0, 1:]).item()
    return total / len(windows_NT)
