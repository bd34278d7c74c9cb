"""A dense Llama folder as a GGUF file of architecture llama, to run it in llama.cpp beside a converted one.

Only what SmolLM2 needs: grouped heads without biases, unscaled rotary embeddings, f32, f16, bf16 or q8_0.

Shapes: H num_attention_heads, F half of head_dim, O outputs and A inputs of a linear map.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.quants import quantize
from torch import Tensor

from smolseek.checkpoint.folder import TensorFolder
from smolseek.checkpoint.source import read_config
from smolseek.export.vocabulary import add_vocabulary
from smolseek.formats.rope import rope_parameters

_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def write_dense_gguf(folder: Path, out: Path, kind: str) -> None:
    """Writes a Llama folder as a GGUF file of the type `kind`.

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
    writer.add_file_type(_FILE_TYPES[kind])
    add_vocabulary(writer, folder, config["vocab_size"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name in tensors.headers:
        weight = tensors.get(name).float()
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            weight = interleaved(weight, heads if ".q_proj." in name else groups)
        encoding = GGMLQuantizationType["F32" if weight.dim() == 1 else kind.upper()]
        data = quantize(np.ascontiguousarray(weight.numpy()), encoding)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight_OA: Tensor, heads: int) -> Tensor:
    """Returns a query or key projection whose rotated pairs are neighbours.

    transformers rotates channel i of a head with channel i + F, llama.cpp channel 2 i with 2 i + 1.
    """
    weight_H2FA = weight_OA.unflatten(0, (heads, 2, -1))
    return weight_H2FA.transpose(1, 2).reshape(weight_OA.shape)
