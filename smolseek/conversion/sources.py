"""The tensors of a Llama-family checkpoint: which there must be, that they are whole, and an attention block's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from smolseek.checkpoint.folder import TensorFolder
from smolseek.conversion.attention import Projections

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
    if source["qk_norms"]:
        layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    yield "model.embed_tokens.weight", (source["vocab_size"], hidden)
    for index in range(source["num_hidden_layers"]):
        for name, shape in layer.items():
            yield f"model.layers.{index}.{name}.weight", shape
        for letter in source["biases"]:
            name = f"self_attn.{letter}_proj"
            yield f"model.layers.{index}.{name}.bias", layer[name][:1]
    yield "model.norm.weight", (hidden,)
    if not source["tie_word_embeddings"]:
        yield "lm_head.weight", (source["vocab_size"], hidden)


def check_tensors(tensors: TensorFolder, source: dict[str, Any], *, attention_bias: bool = True) -> None:
    """Read the whole checkpoint once, before anything heavy runs; `attention_bias` is the target's.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, is quantised, or holds NaN or
            infinity; or the checkpoint has biases that config.json does not know of, or that the target cannot hold.
    """
    names = set(tensors.names())
    expected = dict(expected_tensors(source))
    if biases := sorted(name for name in names - set(expected) if name.endswith(".bias")):
        raise ValueError(f"tensor {biases[0]}: config.json has no such bias; name a model without it")
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
        if name.endswith("o_proj.bias") and not attention_bias and tensors.get(name).any():
            raise ValueError(
                f"tensor {name}: only the transformers profile holds it; try --exact or --profile transformers"
            )


def read_projections(tensors: TensorFolder, source: dict[str, Any], index: int) -> Projections:
    """One attention block's weights in float64, biases of q, k and v as a last column."""
    block = f"model.layers.{index}.self_attn."
    query, key, value, output = (tensors.get(f"{block}{letter}_proj.weight").double() for letter in "qkvo")
    biases = {letter: tensors.get(f"{block}{letter}_proj.bias").double() for letter in source["biases"]}
    if biases:
        columns = (biases[letter][:, None] for letter in "qkv")
        pairs = zip((query, key, value), columns, strict=True)
        query, key, value = (torch.cat(pair, dim=1) for pair in pairs)
    return Projections(query, key, value, output, biases.get("o"))
