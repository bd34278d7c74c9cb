"""The conversion, folder to folder: check, calibrate, convert layer by layer, write a stock DeepSeek-V3 checkpoint.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from smolseek import __version__
from smolseek.card import Card
from smolseek.checkpoint.atomic import refuse_existing
from smolseek.checkpoint.folder import FolderWriter, TensorFolder
from smolseek.checkpoint.hub import load_stock, load_tokenizer, named_disk_tensors
from smolseek.checkpoint.licence import licence_fields
from smolseek.checkpoint.source import read_config, resolve_folder
from smolseek.config import ConvertSettings
from smolseek.conversion.attention import exact_tensors
from smolseek.conversion.carve import carve, load_carving, refine_carving, relative_error
from smolseek.conversion.closed import ClosedForm, ClosedFormConverter, assemble, mean_divergence, mean_loss
from smolseek.conversion.moments import collect_mlp_inputs
from smolseek.conversion.refine import ResidualStream, attention_error, distill, layers_of, refine_attention
from smolseek.conversion.sources import check_tensors, expected_tensors, read_projections
from smolseek.conversion.target import distill_steps, read_source, target_config
from smolseek.conversion.upcycle import balancing_bias, router_rows, upcycle
from smolseek.conversion.work_folder import WorkFolder
from smolseek.data import calibration_windows
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.experts import MixtureOfExperts
from smolseek.numerics.memory import keep_freed_memory, release_memory

log = logging.getLogger(__name__)

_WINDOW_TOKENS = 512
"""Length at which blocks are refined and losses compared: that at which perplexity is measured."""
_JUDGED_WINDOWS = 8
_STREAM_NUMBERS = 2**25
"""Most numbers of the residual stream held while layers are refined, 128 MiB; twice that for the small sources that
the end-to-end stage trains again and again on the same windows."""
_ROUTER_TOKENS = 4096
_CARVE_TOKENS = 16384

OnProgress = Callable[[str, int, int], None]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    settings: ConvertSettings | None = None,
    force: bool = False,
    on_progress: OnProgress = lambda stage, done, count: None,
    **fields: Any,
) -> Path:
    """Write the DeepSeek-V3 form of a Llama-family checkpoint, a stock folder, and return its path.

    `fields` are those of `ConvertSettings`, in place of or on top of `settings`; `calibration` may be one name or
    several. Every refusal comes before anything heavy runs, and `out` is complete or absent: an interrupted conversion
    leaves its finished layers beside `out`, and the same call goes on from there. `on_progress(stage, done, count)`
    tells how far it is.

    Raises:
        TypeError: a field that `ConvertSettings` does not have.
        ValueError: the source is missing, unsupported or broken, the settings do not fit it, there is no calibration
            text, or `out` exists and `force` is not set.
    """
    if "calibration" in fields:
        names = fields["calibration"]
        fields["calibration"] = (str(names),) if isinstance(names, str | Path) else tuple(map(str, names))
    settings = dataclasses.replace(settings or ConvertSettings(), **fields)
    return _Conversion(source, Path(out), settings, force, on_progress).run()


class _Conversion:
    """One conversion: what was read and measured on the way."""

    def __init__(
        self, source: str | Path, out: Path, settings: ConvertSettings, force: bool, on_progress: OnProgress
    ) -> None:
        self.started = time.perf_counter()
        self.name, self.out, self.settings, self.force = str(source), out, settings, force
        self.on_progress = on_progress
        self.folder = resolve_folder(source)
        self.config = read_config(self.folder)
        self.target = target_config(self.config, settings)
        self.source = read_source(self.config)
        self.steps = distill_steps(self.config, settings)
        refuse_existing(out, force)
        self.calibrated = not settings.exact or settings.experts != "none"
        if self.calibrated and not settings.calibration:
            raise ValueError(
                "calibration: none given, and the low-rank cut is weighed by it; name text files or builtin:python"
            )
        self.tensors = TensorFolder(self.folder)
        check_tensors(self.tensors, self.source, attention_bias=self.target["attention_bias"])
        self.calibration: dict[str, Any] = {}
        self.losses: dict[str, float] = {}
        self.layers: list[dict[str, Any]] = [{"layer": index} for index in range(self.source["num_hidden_layers"])]
        self.folds: tuple[tuple[int, ...], ...] | None = None

    def run(self) -> Path:
        """Calibrate, convert, refine, write."""
        if self.settings.exact:
            self.target |= {"dtype": "float32", "torch_dtype": "float32"}  # bf16 would round the exactness away
        if not self.calibrated:
            return self._write(None)
        self._read_calibration()
        with WorkFolder(self.out, self._fingerprint()) as work:
            self.dense = load_stock(self.folder).model.requires_grad_(False)
            self.losses["dense"] = mean_loss(StockModel(self.dense), self.judged_NT)
            return self._write(self._student(work))

    # -- calibration --------------------------------------------------------------------------------------------------

    def _read_calibration(self) -> None:
        """Windows for the moments, for refinement and, apart from both, to judge by."""
        settings, limit = self.settings, self.source["max_position_embeddings"]
        tokens = min(settings.calibration_window_tokens, limit)
        length = max(1, min(_WINDOW_TOKENS, limit) // tokens) * tokens
        wanted = -(-settings.calibration_windows * tokens // length)
        if settings.refine_steps:
            numbers = _STREAM_NUMBERS * (2 if self.steps else 1)
            wanted = max(wanted, numbers // self.source["hidden_size"] // length)
        windows_NT = calibration_windows(
            load_tokenizer(self.folder),
            settings.calibration,
            windows=wanted + _JUDGED_WINDOWS,
            window_tokens=length,
            separator=settings.separator,
            seed=settings.seed,
        )
        judged = max(1, min(_JUDGED_WINDOWS, len(windows_NT) // 4)) if len(windows_NT) > 1 else 0
        self.judged_NT = windows_NT[:judged] if judged else windows_NT
        self.refined_NT = windows_NT[judged:]
        self.windows_NT = self.refined_NT.reshape(-1, tokens)[: settings.calibration_windows]
        digest = hashlib.sha256(windows_NT.to(torch.int64).numpy().tobytes()).hexdigest()
        self.calibration = {
            "windows": len(self.windows_NT),
            "window_tokens": tokens,
            "refinement_tokens": self.refined_NT.numel(),
            "judged_tokens": self.judged_NT.numel(),
            "tokens_sha256": digest,
        }

    def _fingerprint(self) -> dict[str, Any]:
        """All that the finished parts depend on."""
        files = [path.stat() for path in sorted(self.folder.resolve().glob("*.safetensors"))]
        return {
            "settings": dataclasses.asdict(self.settings),
            "source": [str(self.folder.resolve()), self.config, [(f.st_size, f.st_mtime_ns) for f in files]],
            "calibration": self.calibration,
            "version": __version__,
        }

    # -- the converted model ------------------------------------------------------------------------------------------

    def _student(self, work: WorkFolder) -> DeepseekV3:
        """The converted model in memory, all but upcycled experts; every unconverted weight shared with the dense."""
        if self.settings.exact:
            layers = [self._exact_block(index) for index in range(len(self.layers))]
        else:
            closed = self._closed_form(work)
            layers, self.folds = closed.layers, closed.folds
            self.target = target_config(self.config, self.settings, rope_theta=closed.rope_theta)
            for facts, errors in zip(self.layers, closed.errors, strict=True):
                facts |= errors
        student = assemble(self.dense, self.target, layers)
        self.losses["closed_form"] = mean_loss(student, self.judged_NT)
        carving = self.settings.experts == "carve"
        keep_freed_memory()
        if carving or (self.settings.refine_steps and not self.settings.exact):
            self._refine_layers(student, work)
            release_memory()  # the residual stream's, kept for it until here
            self.losses["refined"] = mean_loss(student, self.judged_NT)
        if self.steps and (carving or not self.settings.exact):
            self._distill(student)
        return student

    def _closed_form(self, work: WorkFolder) -> ClosedForm:
        """The closed form of every attention block, from the work folder where it is there."""
        if (kept := work.get("closed-form")) is not None:
            tensors, facts = kept
            layers: list[dict[str, Tensor]] = [{} for _ in self.layers]
            for name, tensor in tensors.items():
                index, _, rest = name.partition(".")
                layers[int(index)][rest] = tensor
            return ClosedForm(layers, facts["errors"], facts["rope_theta"], tuple(map(tuple, facts["folds"])))
        self.on_progress("closed form", 0, 1)
        moments = work.path / "moments"
        shutil.rmtree(moments, ignore_errors=True)  # of an interrupted conversion
        moments.mkdir()
        closed = ClosedFormConverter(
            self.dense,
            self.tensors,
            self.config,
            self.source,
            self.settings,
            self.windows_NT,
            self.judged_NT,
            moments,
        ).best()
        named = {f"{i}.{name}": tensor for i, layer in enumerate(closed.layers) for name, tensor in layer.items()}
        work.put("closed-form", named, {k: getattr(closed, k) for k in ("errors", "rope_theta", "folds")})
        shutil.rmtree(moments)
        release_memory()
        self.on_progress("closed form", 1, 1)
        return closed

    def _refine_layers(self, student: DeepseekV3, work: WorkFolder) -> None:
        """Layer by layer, on the dense model's residual stream: attention refined, then the MLP carved and refined."""
        stream = ResidualStream(self.dense.model, self.refined_NT)
        rope = student.model.rope(self.refined_NT.shape[1])
        student.config = DeepseekV3Config(**self.target)
        for index, layer in enumerate(layers_of(student)):
            self.on_progress("refine layers", index, len(self.layers))
            kept = work.get(f"layer-{index}")
            carved = self.settings.experts == "carve" and index >= self.target["first_k_dense_replace"]
            if carved:
                layer.mlp = MixtureOfExperts(student.config).requires_grad_(False).eval()
            facts = {} if kept is None else kept[1]
            stream.enter(index)
            if kept is None and self.settings.refine_steps and not self.settings.exact:
                facts |= self._refine_attention(layer.self_attn, rope, stream, index)
            stream.pass_attention()
            if kept is None and carved:
                facts |= self._carve(layer.mlp, stream, index)
            stream.pass_mlp()
            parts = {"self_attn": layer.self_attn} | ({"mlp": layer.mlp} if carved else {})
            block = nn.ModuleDict(parts)
            if kept is None:
                work.put(f"layer-{index}", block.state_dict(), facts)
            else:
                block.load_state_dict(kept[0])
            self.layers[index] |= facts
        self.on_progress("refine layers", len(self.layers), len(self.layers))

    def _refine_attention(
        self, block: Any, rope: tuple[Tensor, Tensor], stream: ResidualStream, index: int
    ) -> dict[str, float]:
        """One attention block refined in place; its error relative to the dense output, before and after."""
        before, start = attention_error(block, rope, stream), copy.deepcopy(block.state_dict())
        refine_attention(block, rope, stream, steps=self.settings.refine_steps, seed=self.settings.seed + index)
        after = attention_error(block, rope, stream)
        if after > before:
            block.load_state_dict(start)
        return {"attention_error": before, "attention_error_refined": min(before, after)}

    def _carve(self, block: MixtureOfExperts, stream: ResidualStream, index: int) -> dict[str, float]:
        """One MLP carved and refined into `block`; its error relative to the dense output's, before and after."""
        chosen, steps = self.target["num_experts_per_tok"], self.settings.refine_steps
        mlp = self.dense.model.layers[index].mlp
        weights = {name: getattr(mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")}
        probe_TD, inputs_TD = stream.mlp_inputs()
        generator = torch.Generator().manual_seed(self.settings.seed + index)
        carving = carve(weights, inputs_TD[:: max(1, len(inputs_TD) // _CARVE_TOKENS)], self.target)
        facts = {"mlp_error": relative_error(carving, weights, probe_TD, chosen)}
        if steps:
            refined = refine_carving(carving, weights, inputs_TD, chosen, steps=steps, generator=generator)
            after = relative_error(refined, weights, probe_TD, chosen)
            carving = refined if after < facts["mlp_error"] else carving
            facts["mlp_error_refined"] = min(after, facts["mlp_error"])
        load_carving(block, carving)
        return facts

    def _distill(self, student: DeepseekV3) -> None:
        """The last stage, end to end; undone should the judged windows move away from the dense model by it."""
        before = mean_divergence(student, self.dense, self.judged_NT)
        trained = _own_weights(student, experts_only=self.settings.exact)
        kept = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        distill(
            student,
            self.dense,
            self.refined_NT,
            trained,
            steps=self.steps,
            seed=self.settings.seed,
            on_step=lambda done: self.on_progress("end-to-end KL", done, self.steps),
        )
        after = mean_divergence(student, self.dense, self.judged_NT)
        if after < before:
            self.losses["distilled"] = mean_loss(student, self.judged_NT)
            return
        log.warning("end-to-end KL rose from %.4f to %.4f on other text and is undone; name more text", before, after)
        student.load_state_dict(kept)

    def _exact_block(self, index: int) -> dict[str, Tensor]:
        return exact_tensors(
            read_projections(self.tensors, self.source, index),
            self.source["head_dim"],
            self.target["qk_nope_head_dim"],
            rotates=self.source["rope_layers"][index],
        )

    # -- writing ------------------------------------------------------------------------------------------------------

    def _write(self, student: DeepseekV3 | None) -> Path:
        """The folder, tensor by tensor."""
        target = self.target
        with FolderWriter(self.out, force=self.force) as writer:
            for name, tensor in self._target_tensors(student):
                keep_fp32 = name.endswith("e_score_correction_bias")
                writer.add(name, tensor.to(torch.float32 if keep_fp32 else getattr(torch, target["dtype"])))
            report = self._report()
            writer.write_json("config.json", target)
            writer.write_json("conversion.json", report)
            writer.write_text("README.md", Card(self.out.name, target, licence_fields(self.folder), report).render())
            writer.copy_tokenizer(self.folder)
            writer.copy_licence(self.folder)
        return self.out

    def _target_tensors(self, student: DeepseekV3 | None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the target: the student's, or without one the exact form's; dense MLPs copied if upcycled."""
        routers = self._routers(student) if student is not None and self.settings.experts == "upcycle" else []
        for name, tensor in self._exact_tensors() if student is None else named_disk_tensors(student):
            layer, is_mlp, part = name.partition(".mlp.")
            index = int(layer.rpartition(".")[2]) if is_mlp else 0
            if not (routers and is_mlp) or index < self.target["first_k_dense_replace"]:
                yield name, tensor
            elif part == "gate_proj.weight":
                names = ("gate_proj", "up_proj", "down_proj")
                assert student is not None
                mlp = layers_of(student)[index].mlp
                dense = {n: getattr(mlp, n).weight for n in names}
                for expert, expert_tensor in upcycle(dense, self.target, *routers[index]):
                    yield f"{layer}.mlp.{expert}", expert_tensor

    def _exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The exact form without experts, each source tensor read when its turn comes."""
        for name, _ in expected_tensors(self.source):
            layer, is_attention, part = name.partition(".self_attn.")
            if not is_attention:
                yield name, self.tensors.get(name)
            elif part == "q_proj.weight":
                for converted, tensor in self._exact_block(int(layer.rpartition(".")[2])).items():
                    yield f"{layer}.self_attn.{converted}", tensor

    def _routers(self, student: DeepseekV3) -> list[tuple[Tensor, Tensor]]:
        """Per layer, router rows and bias that spread the converted model's own MLP inputs evenly over the copies."""
        copies, dtype = self.target["n_group"], getattr(torch, self.target["dtype"])
        generator = torch.Generator().manual_seed(self.settings.seed)
        routers = []
        for inputs_NTD in collect_mlp_inputs(student, self.windows_NT, _ROUTER_TOKENS):
            rows_ND = router_rows(inputs_NTD, copies, generator).to(dtype)  # balanced as they will be written
            routers.append((rows_ND, balancing_bias(inputs_NTD.flatten(0, 1), rows_ND.float())))
        return routers

    def _report(self) -> dict[str, Any]:
        """conversion.json."""
        source, target = self.source, self.target
        before = len(self.layers) * 2 * source["num_key_value_heads"] * source["head_dim"]
        after = len(self.layers) * (target["kv_lora_rank"] + target["qk_rope_head_dim"])
        source_bytes, target_bytes = (getattr(torch, tree["dtype"]).itemsize for tree in (source, target))
        sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "rope_theta")
        return {
            "source": self.name,
            "settings": {
                k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.settings).items()
            },
            **{field: target[field] for field in sizes},
            "rope_slots": None if self.folds is None else [list(fold) for fold in self.folds],
            "cache": {
                "source_numbers_per_token": before,
                "source_bytes_per_token": before * source_bytes,
                "numbers_per_token": after,
                "bytes_per_token": after * target_bytes,
            },
            "calibration": self.calibration,
            "losses": self.losses,
            "layers": self.layers,
            "distill_steps": self.steps,
            "versions": {"smolseek": __version__, **{name: version(name) for name in ("torch", "transformers")}},
            "seconds": round(time.perf_counter() - self.started, 3),
        }


def _own_weights(student: DeepseekV3, *, experts_only: bool) -> dict[str, nn.Parameter]:
    """What the end-to-end stage trains, no longer shared with the dense model.

    Everything: it keeps more of the model, on text of another domain too, than attention and experts alone (LOG.md).
    Attention in the exact form has to stand still: then only the experts.
    """
    experts = {name: module for name, module in student.named_modules() if isinstance(module, MixtureOfExperts)}
    owners: dict[str, nn.Module] = {**experts} if experts_only else {"": student}
    trained = {name: p for owner, module in owners.items() for name, p in module.named_parameters(owner)}
    for parameter in trained.values():
        parameter.data = parameter.data.clone()
    return trained
