"""The tensors of a Llama-family checkpoint: which there must be, and that they are whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from smolseek.checkpoint.folder import TensorFolder

_FLOATS = ("F64", "F32", "F16", "BF16")


def expected_tensors(source: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of the source that `target.read_source` describes."""
    hidden, neurons, head_dim = source["hidden_size"], source["intermediate_size"], source["head_dim"]
    query, key = source["num_attention_heads"] * head_dim, source["num_key_value_heads"] * head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (neurons, hidden),
        "mlp.up_proj": (neurons, hidden),
        "mlp.down_proj": (hidden, neurons),
    }
    yield "model.embed_tokens.weight", (source["vocab_size"], hidden)
    for index in range(source["num_hidden_layers"]):
        for name, shape in layer.items():
            yield f"model.layers.{index}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    if not source["tie_word_embeddings"]:
        yield "lm_head.weight", (source["vocab_size"], hidden)


def check_tensors(tensors: TensorFolder, source: dict[str, Any]) -> None:
    """Read the whole checkpoint once, before anything heavy runs.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, is quantised, or holds NaN or
            infinity; or the checkpoint has biases, which are not converted.
    """
    names = set(tensors.names())
    expected = dict(expected_tensors(source))
    if biases := sorted(name for name in names if name.endswith(".bias")):
        raise ValueError(f"tensor {biases[0]}: biases are not converted; name a model without them")
    for name, shape in expected.items():
        if name not in names:
            raise ValueError(f"tensor {name}: not in the checkpoint though config.json asks for it; fetch it again")
        if tensors.shape(name) != shape:
            raise ValueError(
                f"tensor {name}: shape {tensors.shape(name)} is not {shape} as in config.json; fetch it again"
            )
        if tensors.dtype(name) not in _FLOATS:
            raise ValueError(
                f"tensor {name}: dtype {tensors.dtype(name)} is quantised; name the checkpoint it was made from"
            )
        if not torch.isfinite(tensors.get(name)).all():
            raise ValueError(f"tensor {name}: holds NaN or infinity; fetch the checkpoint again or name another")
