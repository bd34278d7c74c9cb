"""GGUF files of dense models: which ones can be read, and what their keys and tensors are in Hugging Face's terms.

Imports no torch. transformers' own reader is not used: it leaves out the scaling of Llama 3's rotation and attention
biases of Llamas without a word, does not know SmolLM3, and holds the whole model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import MODEL_ARCH, GGUFEndian, GGUFReader, get_tensor_name_map
from gguf.gguf_reader import ReaderTensor

from smolseek.formats.dense import DenseSource, read_source
from smolseek.formats.fields import LAYERS, SIZE, TOKEN_ID, Rule, check_fields, number, shown
from smolseek.formats.foreign import check_no_pointer
from smolseek.formats.refusing import refusing
from smolseek.formats.rope import inverse_frequencies

_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SPECIAL = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_NO_ROPE_INTERVAL = 4  # llama.cpp has it in its code, not in the file
_SIZES: dict[str, Rule] = {
    **dict.fromkeys(("embedding_length", "feed_forward_length", "context_length", "attention.head_count"), SIZE),
    "block_count": LAYERS,
    **dict.fromkeys(("attention.head_count_kv", "attention.key_length", "rope.dimension_count"), SIZE.or_null()),
    "attention.layer_norm_rms_epsilon": number(0, 1),
    "rope.freq_base": number(1, 1e30).or_null(),
    **dict.fromkeys(("rope.scaling.factor", "rope.scale_linear"), number(0, 1e30).or_null()),
    "rope.scaling.original_context_length": SIZE.or_null(),
}
"""What an architecture's keys must hold; those that may be left out may be null."""
_UNSUPPORTED = (
    "expert_count",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
)
"""Keys that change what a model computes, unless they are absent or 0."""


class Architecture(NamedTuple):
    """How a GGUF architecture maps to a family of `FAMILIES`."""

    class_name: str
    names: MODEL_ARCH
    pairs_rows: bool
    """Whether llama.cpp rotates neighbouring rows of queries and keys, so that the file has them in another order."""


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", MODEL_ARCH.LLAMA, pairs_rows=True),
    "smollm3": Architecture("SmolLM3ForCausalLM", MODEL_ARCH.SMOLLM3, pairs_rows=True),
    "qwen2": Architecture("Qwen2ForCausalLM", MODEL_ARCH.QWEN2, pairs_rows=False),
    "qwen3": Architecture("Qwen3ForCausalLM", MODEL_ARCH.QWEN3, pairs_rows=False),
}
"""The architectures that are read, by their GGUF name, which is their `model_type` too. Mistral's is llama."""


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file: its keys, config.json, and its tensors under Hugging Face's names, in the order of the model."""

    keys: Mapping[str, Any]
    config: dict[str, Any]
    dense: DenseSource
    tensors: Mapping[str, ReaderTensor]

    def paired_heads(self, name: str) -> int:
        """Returns the number of heads whose rows stand in another order in the file's tensor; 0 if they do not."""
        if not ARCHITECTURES[self.dense.model_type].pairs_rows:
            return 0
        heads = {".q_proj.": self.dense.num_attention_heads, ".k_proj.": self.dense.num_key_value_heads}
        return next((count for part, count in heads.items() if part in name), 0)


class _Reader(GGUFReader):
    """The library's reader, which takes what lies behind the end of a file for nothing, and may count to 2^64 there."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        if len(found) < count:
            raise ValueError(f"it ends before byte {offset + int(count) * np.dtype(dtype).itemsize:,}")
        return found


def read_gguf(path: Path) -> GgufSource:
    """Returns what a GGUF file holds; no numbers of its tensors are read yet.

    Raises:
        ValueError: it is no GGUF file, a Git LFS pointer, broken, cut short or a part of several; it has an
            architecture, keys, a rotation or tensors that no family has; or a tensor is missing.
    """
    check_no_pointer(path)
    with refusing(f"{path}: cannot be read as GGUF, it may be cut short; fetch the file again"):
        reader = _Reader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
    _check_kind(path, reader, keys)
    kind = keys["general.architecture"]
    own = {name.removeprefix(f"{kind}."): value for name, value in keys.items() if name.startswith(f"{kind}.")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_keys(path, kind, own)
    config = _config(path, kind, own, tensors) | _special_ids(path, keys)
    with refusing(f"{path}: its keys make no model that is read"):
        dense = read_source(config)
    return GgufSource(keys, config, dense, _by_our_names(path, dense, tensors))


def _check_kind(path: Path, reader: GGUFReader, keys: Mapping[str, Any]) -> None:
    """Raises ValueError unless the file is a whole language model of a supported architecture."""
    kind = keys.get("general.architecture")
    if reader.endianess != GGUFEndian.LITTLE:
        raise ValueError(f"{path}: a big-endian GGUF file; name a little-endian one")
    if (parts := keys.get("split.count", 1)) not in (0, 1):
        raise ValueError(
            f"{path}: one of {shown(parts)} parts of a model; join them: llama-gguf-split --merge FIRST-PART ALL.gguf"
        )
    if (type_ := keys.get("general.type", "model")) != "model":
        raise ValueError(f"{path}: a GGUF file of type {shown(type_)}; name one of a whole model")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: GGUF architecture {shown(kind)}: not supported; name a file of one of "
            f"{', '.join(ARCHITECTURES)} (Mistral is llama)"
        )


def _check_keys(path: Path, kind: str, own: Mapping[str, Any]) -> None:
    """Raises ValueError if a key is missing, holds nonsense, or says what no family does."""
    check_fields({f"{kind}.{key}": own.get(key) for key in _SIZES}, _with_prefix(kind), where=str(path))
    head_dim = _head_dim(own)
    for key in _UNSUPPORTED:
        if own.get(key):
            raise ValueError(f"{path}: {kind}.{key} {shown(own[key])}: not supported; name another model")
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{path}: {kind}.{key} {shown(own[key])}: must be the head's size, {head_dim}; name another model"
            )


def _with_prefix(kind: str) -> dict[str, Rule]:
    return {f"{kind}.{key}": rule for key, rule in _SIZES.items()}


def _head_dim(own: Mapping[str, Any]) -> int:
    return own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"]


def _config(path: Path, kind: str, own: Mapping[str, Any], tensors: Mapping[str, ReaderTensor]) -> dict[str, Any]:
    """Returns config.json but for the ids of special tokens."""
    embeddings = tensors.get("token_embd.weight")
    if embeddings is None:
        raise ValueError(f"{path}: no tensor token_embd.weight; name a GGUF file of a whole model")
    rope = {"rope_theta": _decimal(own.get("rope.freq_base") or 10_000.0)}
    rope |= _scaling(path, kind, own, rope["rope_theta"], tensors.get(_ROPE_FACTORS))
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind].class_name],
        "model_type": kind,
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own.get("attention.head_count_kv") or own["attention.head_count"],
        "head_dim": _head_dim(own),
        "vocab_size": int(embeddings.shape[-1]),
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": _decimal(own["attention.layer_norm_rms_epsilon"]),
        "rope_parameters": {"rope_type": "default"} | rope,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _dtype(tensors),
    }
    if kind != "qwen2":  # which always has them
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if kind == "smollm3":
        config["no_rope_layers"] = [int((i + 1) % _NO_ROPE_INTERVAL != 0) for i in range(own["block_count"])]
    return config


def _decimal(value: float) -> float:
    """Returns the shortest decimal that a 32-bit key stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _dtype(tensors: Mapping[str, ReaderTensor]) -> str:
    """Returns the dtype to write: that of the matrices, or fp32 where floats are mixed, so that no number is rounded.

    Quantised matrices become bf16, which is what they were made from: it rounds less than the quantisation did, and
    takes half of fp32's room.
    """
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    if not kinds <= set(_DTYPES):
        return "bfloat16"
    return _DTYPES[kinds.pop()] if len(kinds) == 1 else "float32"


def _scaling(
    path: Path, kind: str, own: Mapping[str, Any], theta: float, factors: ReaderTensor | None
) -> dict[str, Any]:
    """Returns the parameters of a scaled rotation: linear by keys, Llama 3's by a factor for each frequency."""
    named = own.get("rope.scaling.type")
    factor = float(own.get("rope.scaling.factor") or own.get("rope.scale_linear") or 1)
    if named not in (None, "none", "linear"):
        raise ValueError(
            f"{path}: {kind}.rope.scaling.type {shown(named)}: not supported; name a model without scaling or with "
            "linear or Llama 3's"
        )
    if factors is not None:
        return _llama3(path, own, theta, [float(value) for value in factors.data.ravel()])
    is_scaled = named != "none" and factor != 1
    return {"rope_type": "linear", "factor": _decimal(factor)} if is_scaled else {}


def _llama3(path: Path, own: Mapping[str, Any], theta: float, factors: list[float]) -> dict[str, Any]:
    """Returns the parameters of Llama 3's scaling that give these factors; the file has no keys for them."""
    factor = max(factors, default=0.0)
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": own.get("rope.scaling.original_context_length") or 8192,
    }
    head_dim = _head_dim(own)
    plain = inverse_frequencies({"rope_type": "default", "rope_theta": theta}, head_dim)
    scaled = inverse_frequencies(rope | {"rope_theta": theta}, head_dim) if factor > 1 else plain
    wanted = [before / after for before, after in zip(plain, scaled, strict=True)]
    if len(factors) != len(wanted) or not np.allclose(factors, wanted, rtol=1e-4):
        raise ValueError(
            f"{path}: tensor {_ROPE_FACTORS}: not Llama 3's scaling of the rotation, and no other is read from GGUF; "
            "name the checkpoint that it was made from"
        )
    return rope if factor > 1 else {}


def _special_ids(path: Path, keys: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns the ids of BOS, EOS and padding."""
    given = {name: keys.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    check_fields(given, dict.fromkeys(given, TOKEN_ID), where=str(path))
    return given


def _by_our_names(path: Path, dense: DenseSource, tensors: Mapping[str, ReaderTensor]) -> dict[str, ReaderTensor]:
    """Returns the tensors by Hugging Face's names.

    Raises:
        ValueError: one is missing, has another shape or is in the file beside those that the family has.
    """
    names = get_tensor_name_map(ARCHITECTURES[dense.model_type].names, dense.num_hidden_layers)
    found: dict[str, ReaderTensor] = {}
    for name, shape in dense.tensors().items():
        theirs = names.get_name(name, (".weight", ".bias"))
        tensor = tensors.get(str(theirs))
        if tensor is None:
            raise ValueError(f"{path}: no tensor {theirs}, which {dense.model_type} has; name another file")
        if (has := tuple(int(size) for size in reversed(tensor.shape))) != shape:
            raise ValueError(f"{path}: tensor {theirs}: shape {has} where its keys ask for {shape}; fetch it again")
        found[name] = tensor
    known = {tensor.name for tensor in found.values()} | {_ROPE_FACTORS}
    if unknown := sorted(set(tensors) - known):
        raise ValueError(
            f"{path}: tensor {unknown[0]}: {dense.model_type} has none like it; name the checkpoint it was made from"
        )
    return found
