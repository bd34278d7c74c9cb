"""GGUF files of tiny dense models, written from Hugging Face folders in the order that llama.cpp's converter writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFValueType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smolseek.checkpoint.folder import TensorFolder
from smolseek.checkpoint.hub import save
from smolseek.export.vocabulary import add_vocabulary
from smolseek.model import StockModel
from tests.factories import tiny_dense
from tests.text import ENTRIES, tiny_tokenizer

_TYPES = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
_ARCHS = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
Keys = Mapping[str, Any]


def dense_folder(folder: Path, model_type: str = "llama", tokenizer: Any = None, **overrides: Any) -> Path:
    """Saves a lively dense model with a tokenizer; its rows are whole blocks of a quantisation."""
    sizes = {"vocab_size": ENTRIES, "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    model = StockModel(tiny_dense(model_type, **(sizes | overrides)))
    save(model, folder, tokenizer_from=tokenizer or tiny_tokenizer())
    return folder


def write_gguf(
    folder: Path,
    out: Path,
    kind: str = "F32",
    *,
    keys: Keys | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Writes a folder as a GGUF file, matrices as `kind` and vectors in fp32.

    Args:
        keys: keys to write too, or in place of others; * stands for the architecture, and None leaves a key out.
        tensors: likewise tensors, by their GGUF names.
    """
    config = AutoConfig.from_pretrained(folder)
    writer = GGUFWriter(out, config.model_type)
    add_vocabulary(writer, folder, config.vocab_size)
    for name, value in (_keys(config) | dict(keys or {})).items():
        _put(writer, name.replace("*", config.model_type), value)
    for name, numbers in (_tensors(config, folder) | dict(tensors or {})).items():
        if numbers is not None:
            encoding = GGMLQuantizationType[kind if numbers.ndim > 1 else "F32"]
            writer.add_tensor(name, quantize(numbers, encoding), raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _put(writer: GGUFWriter, name: str, value: Any) -> None:
    """Writes a key, in place of one that is there; None removes it."""
    writer.kv_data[0].pop(name, None)
    if value is not None:
        writer.add_key_value(name, value, GGUFValueType[_TYPES[type(value)]])


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    keys = {
        "general.type": "model",
        "*.block_count": config.num_hidden_layers,
        "*.context_length": config.max_position_embeddings,
        "*.embedding_length": config.hidden_size,
        "*.feed_forward_length": config.intermediate_size,
        "*.attention.head_count": config.num_attention_heads,
        "*.attention.head_count_kv": config.num_key_value_heads,
        "*.attention.key_length": _head_dim(config),
        "*.attention.value_length": _head_dim(config),
        "*.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "*.rope.freq_base": float(rope["rope_theta"]),
        "*.rope.dimension_count": _head_dim(config),
    }
    if rope["rope_type"] == "linear":
        keys |= {"*.rope.scaling.type": "linear", "*.rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "llama3":
        keys["*.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return keys


def _tensors(config: Any, folder: Path) -> dict[str, np.ndarray]:
    """Returns the tensors in fp32 by GGUF's names; of Llamas the rows of queries and keys in pairs."""
    names, weights = get_tensor_name_map(_ARCHS[config.model_type], config.num_hidden_layers), TensorFolder(folder)
    tensors = {}
    for name in weights.names():
        numbers = weights.get(name).float().numpy()
        if config.model_type in ("llama", "smollm3"):
            for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if part in name:  # (head, half, channel, ...) to (head, channel, half, ...)
                    halves = numbers.reshape(heads, 2, _head_dim(config) // 2, *numbers.shape[1:])
                    numbers = halves.swapaxes(1, 2).reshape(numbers.shape)
        tensors[str(names.get_name(name, (".weight", ".bias")))] = np.ascontiguousarray(numbers)
    if config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    return tensors


def _llama3_factors(config: Any) -> np.ndarray:
    """Returns by what transformers divides each frequency."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    places = torch.arange(0, _head_dim(config), 2).float() / _head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -places
    return (plain / scaled).numpy().astype(np.float32)
