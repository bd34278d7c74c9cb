"""A dense Llama folder as a GGUF file of architecture llama, to run it in llama.cpp beside a converted one.

Only what SmolLM2 needs: grouped heads without biases and unscaled rotary embeddings.

Shapes: H num_attention_heads, F half of head_dim, O outputs and A inputs of a linear map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.quants import quantize
from torch import Tensor

from smolseek.checkpoint.folder import TensorFolder
from smolseek.checkpoint.source import read_config
from smolseek.export.gguf import GgufExport, GgufType, fitting_encoding
from smolseek.export.kquants import BASES, SUBSTITUTES, mixed_encoding, quantise_rows
from smolseek.export.vocabulary import add_vocabulary
from smolseek.formats.rope import rope_parameters

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}


def write_dense_gguf(folder: Path, out: Path, type: GgufType) -> GgufExport:
    """Writes a Llama folder as a GGUF file of a type; returns what `export_gguf` tells of a converted one.

    Raises:
        ValueError: the folder is no Llama with the default rotary embeddings and without biases.
    """
    config, tensors = read_config(folder), TensorFolder(folder)
    rope = rope_parameters(config)
    biased = [name for name in tensors.headers if name.endswith(".bias")]
    if config["model_type"] != "llama" or rope["rope_type"] != "default" or biased:
        raise ValueError(f"{folder}: only a llama without biases and with default rotary embeddings is written")
    heads = config["num_attention_heads"]
    groups, width = config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads
    writer = GGUFWriter(out, "llama")
    writer.add_name(folder.resolve().name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_file_type(_FILE_TYPES[type])
    has_chat_template = add_vocabulary(writer, folder, config["vocab_size"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    fallen: dict[str, GGMLQuantizationType] = {}
    size_bits = numbers = 0
    for tensor in tensors.headers:
        weight = tensors.get(tensor).float()
        if tensor.endswith((".q_proj.weight", ".k_proj.weight")):
            weight = interleaved(weight, heads if ".q_proj." in tensor else groups)
        name = names.get_name(tensor, (".weight",))
        wanted = GGMLQuantizationType.F32 if weight.dim() == 1 else _wanted_encoding(type, name, config)
        encoding = fitting_encoding(wanted, weight.shape[-1])
        if encoding != wanted:
            fallen[name] = encoding
        data = np.ascontiguousarray(weight.numpy())
        data = quantise_rows(data, encoding) if encoding in SUBSTITUTES else quantize(data, encoding)
        writer.add_tensor(name, data, raw_dtype=encoding)
        size_bits, numbers = size_bits + 8 * data.nbytes, numbers + weight.numel()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufExport(
        path=out,
        size_bytes=out.stat().st_size,
        tensors=len(tensors.headers),
        bits_per_weight=size_bits / numbers,
        fallbacks=tuple(fallen),
        fallback_encodings=tuple(dict.fromkeys(encoding.name.lower() for encoding in fallen.values())),
        has_chat_template=has_chat_template,
    )


def _wanted_encoding(type: GgufType, name: str, config: dict[str, Any]) -> GGMLQuantizationType:
    """Returns the encoding of a matrix; in a llama file llama.cpp mixes k-quants of values as of down projections."""
    if type not in BASES:
        return GGMLQuantizationType[type.upper()]
    return mixed_encoding(type, name.replace("attn_v.", "ffn_down."), config | {"n_routed_experts": 0})


def interleaved(weight_OA: Tensor, heads: int) -> Tensor:
    """Returns a query or key projection whose rotated pairs are neighbours.

    transformers rotates channel i of a head with channel i + F, llama.cpp channel 2 i with 2 i + 1.
    """
    weight_H2FA = weight_OA.unflatten(0, (heads, 2, -1))
    return weight_H2FA.transpose(1, 2).reshape(weight_OA.shape)
