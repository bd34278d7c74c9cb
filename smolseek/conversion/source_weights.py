"""The weights of a dense checkpoint: checked once, then read block by block.

Shapes: X entries of the block's input, D hidden_size, or D + 1 where biases are a last column.
"""

from __future__ import annotations

import torch

from smolseek.checkpoint.folder import TensorFolder
from smolseek.conversion.mla.weights import Projections
from smolseek.formats.dense import DenseSource


def check_tensors(tensors: TensorFolder, source: DenseSource, *, attention_bias: bool = True) -> None:
    """Reads the whole checkpoint once, before anything heavy runs; `attention_bias` is the target's.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, is quantised, or holds NaN or
            infinity; or the checkpoint has biases that config.json does not know of, or that the target cannot hold.
    """
    names = set(tensors.names())
    expected = source.tensors()
    if biases := sorted(name for name in names - set(expected) if name.endswith(".bias")):
        raise ValueError(f"tensor {biases[0]}: config.json has no such bias; name a model without it")
    for name, shape in expected.items():
        if name not in names:
            tie = ", or set tie_word_embeddings to true" if name == "lm_head.weight" else ""
            raise ValueError(
                f"tensor {name}: not in the checkpoint though config.json asks for it; fetch it again{tie}"
            )
        if tensors.shape(name) != shape:
            raise ValueError(
                f"tensor {name}: shape {tensors.shape(name)} is not {shape} as in config.json; fetch it again"
            )
        tensors.check_float(name)
        if not torch.isfinite(tensors.get(name)).all():
            raise ValueError(f"tensor {name}: holds NaN or infinity; fetch the checkpoint again or name another")
        if name.endswith("o_proj.bias") and not attention_bias and tensors.get(name).any():
            raise ValueError(
                f"tensor {name}: only the transformers profile holds it; try --exact or --profile transformers"
            )


def read_projections(tensors: TensorFolder, source: DenseSource, index: int, device: torch.device) -> Projections:
    """Returns one attention block's weights in float64 on a device; biases of q, k and v are a last column."""
    block = f"model.layers.{index}.self_attn."
    query, key, value, output = (tensors.get(f"{block}{letter}_proj.weight").to(device).double() for letter in "qkvo")
    biases = {letter: tensors.get(f"{block}{letter}_proj.bias").to(device).double() for letter in source.biases}
    if biases:
        columns = (biases[letter][:, None] for letter in "qkv")
        pairs = zip((query, key, value), columns, strict=True)
        query, key, value = (torch.cat(pair, dim=1) for pair in pairs)
    return Projections(query, key, value, output, biases.get("o"))
