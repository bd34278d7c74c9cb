"""Reads models from stock Hugging Face folders and writes them back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from smolseek.checkpoint.folder import FolderWriter, TensorFolder
from smolseek.checkpoint.source import check_tokenizer, read_config, read_conversion, read_end_tokens, resolve_folder
from smolseek.formats.deepseek_v3 import SOFTMAX_MODEL_TYPE, disk_config
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import take_expert_counts


def load_tokenizer(folder: str | Path) -> Any:
    """Returns the fast tokenizer of a folder or hub id.

    Raises:
        ValueError: the folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    path = resolve_folder(folder)
    check_tokenizer(path, folder)
    return AutoTokenizer.from_pretrained(path)


def load_config(folder: str | Path) -> Any:
    """Returns the transformers config of a folder; a `DeepseekV3Config` for V3, with a softmax router too."""
    from transformers import AutoConfig, DeepseekV3Config

    tree = read_config(folder)
    if tree.get("model_type") == SOFTMAX_MODEL_TYPE:
        return DeepseekV3Config(**{**tree, "model_type": "deepseek_v3"})
    return AutoConfig.from_pretrained(folder)


def load(source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DeepseekV3 | StockModel:
    """Loads a model from a folder or hub id: DeepSeek-V3 as our `DeepseekV3`, other causal models by transformers.

    Raises:
        ValueError: as `resolve_folder`, `read_config` and `TensorFolder` do, or the weights do not fit the config.
    """
    folder = resolve_folder(source)
    if read_config(folder).get("model_type") not in ("deepseek_v3", SOFTMAX_MODEL_TYPE):
        return load_stock(folder, dtype=dtype, device=device)
    tensors = TensorFolder(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = DeepseekV3(config)
    model.to_empty(device="cpu")
    # No checkpoint holds the rope table and the expert counts.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    take_expert_counts(model)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                _fill(target, name, tensors)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.end_token_ids = read_end_tokens(folder)
    return model.to(device=device, dtype=dtype).eval()


def load_stock(source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> StockModel:
    """Loads any causal model as unmodified transformers runs it.

    Raises:
        ValueError: as `resolve_folder`, `read_config` and `TensorFolder` do, or transformers does not know the model.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_folder(source)
    model_type = read_config(folder).get("model_type")
    TensorFolder(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint {source}: transformers does not load model_type {model_type!r} ({reason})"
        ) from error
    stock = StockModel(model.to(device)).eval()
    stock.end_token_ids = read_end_tokens(folder)
    return stock


def load_for_evaluation(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> DeepseekV3 | StockModel:
    """Loads a model as unmodified transformers runs it; a softmax-routed folder, which it cannot run, as our model."""
    is_stock = read_config(resolve_folder(source)).get("model_type") != SOFTMAX_MODEL_TYPE
    return (load_stock if is_stock else load)(source, dtype=dtype, device=device)


def save(
    model: DeepseekV3 | StockModel,
    out: str | Path,
    *,
    tokenizer_from: Any = None,
    origin: Path | None = None,
    card: str | None = None,
    force: bool = False,
) -> Path:
    """Writes a model as a stock folder, in its config's dtype (fp32 if it names none), one tensor per expert.

    Args:
        model: the model.
        out: the folder to write.
        tokenizer_from: a folder or hub id with a tokenizer, or a transformers tokenizer.
        origin: the folder that the model was loaded from; its licence files, conversion.json and
            generation_config.json are copied.
        card: the text of README.md.
        force: replace `out` if it exists.

    Raises:
        ValueError: `out` exists and `force` is not set, or `tokenizer_from` cannot be found.
    """
    config = model.config.to_dict()
    dtype = getattr(torch, str(model.config.dtype).removeprefix("torch.")) if model.config.dtype else torch.float32
    with FolderWriter(out, force=force) as writer:
        for name, tensor in named_disk_tensors(model):
            keep_fp32 = name.endswith("e_score_correction_bias")
            writer.add(name, tensor if keep_fp32 else tensor.to(dtype))
        writer.write_json("config.json", disk_config(config) if isinstance(model, DeepseekV3) else config)
        if origin is not None:
            writer.copy_generation_config(origin)
            writer.copy_licence(origin)
            if (conversion := read_conversion(origin)) is not None:
                writer.write_json("conversion.json", conversion)
        if hasattr(tokenizer_from, "save_pretrained"):
            tokenizer_from.save_pretrained(writer.path)
        elif tokenizer_from is not None:
            folder = resolve_folder(tokenizer_from)
            writer.copy_tokenizer(folder)
            writer.copy_generation_config(folder)
        if card is not None:
            writer.write_text("README.md", card)
    return Path(out)


def named_disk_tensors(model: DeepseekV3 | StockModel) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) as written to disk: without a tied head, and with one tensor per expert."""
    state = model.state_dict() if isinstance(model, DeepseekV3) else model.model.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        prefix, _, kind = name.rpartition(".")
        if kind == "gate_up_proj" and prefix.endswith("experts"):
            for expert, gate_up in enumerate(tensor):
                gate, up = gate_up.chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate.clone()
                yield f"{prefix}.{expert}.up_proj.weight", up.clone()
        elif kind == "down_proj" and prefix.endswith("mlp.experts"):
            for expert, down in enumerate(tensor):
                yield f"{prefix}.{expert}.down_proj.weight", down.clone()
        else:  # a head may share the embeddings' memory although the config unties it; safetensors refuses that
            yield name, tensor.clone() if name == "lm_head.weight" else tensor


def _fill(target: Tensor, name: str, tensors: TensorFolder) -> None:
    """Fills one tensor of the model from disk, stacking experts; raises ValueError if the shapes differ."""
    prefix, _, kind = name.rpartition(".")
    if prefix.endswith("mlp.experts"):
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for expert in range(target.shape[0]):
            loaded = torch.cat([tensors.get(f"{prefix}.{expert}.{part}.weight") for part in parts])
            _copy(target[expert], loaded, f"{prefix}.{expert}.{parts[0]}.weight")
    else:
        _copy(target, tensors.get(name), name)


def _copy(target: Tensor, loaded: Tensor, name: str) -> None:
    if target.shape != loaded.shape:
        raise ValueError(
            f"tensor {name}: shape {tuple(loaded.shape)} where config.json asks for {tuple(target.shape)}; "
            "the weights do not fit the config"
        )
    target.copy_(loaded)
