"""The weights of a dense checkpoint: checked once, then read block by block.

Shapes: X entries of the block's input, D hidden_size, or D + 1 where biases are a last column.
"""

from __future__ import annotations

from collections.abc import Container

import torch

from smolseek.checkpoint.folder import TensorFolder
from smolseek.conversion.mla.weights import Projections
from smolseek.formats.dense import DenseSource

_HEAD = "lm_head.weight"


def check_tensors(tensors: TensorFolder, source: DenseSource, *, attention_bias: bool = True) -> None:
    """Reads the whole checkpoint once, before anything heavy runs; `attention_bias` is the target's.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, is quantised, or holds NaN or
            infinity; or the checkpoint has tensors that config.json does not know of, or that the target cannot hold.
    """
    expected = source.tensors()
    head = expected.pop(_HEAD, None)
    for name, shape in expected.items():
        _check_header(tensors, name, shape)
    _check_no_others(tensors, expected)
    if head is not None:
        _check_header(tensors, _HEAD, head)
    for name in source.tensors():
        if not torch.isfinite(tensors.get(name)).all():
            raise ValueError(f"tensor {name}: holds NaN or infinity; fetch the checkpoint again or name another")
        if name.endswith("o_proj.bias") and not attention_bias and tensors.get(name).any():
            raise ValueError(
                f"tensor {name}: only the transformers profile holds it; try --exact or --profile transformers"
            )


def _check_header(tensors: TensorFolder, name: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a tensor is there in its shape, and not quantised."""
    if name not in tensors.headers:
        tie = ", or set tie_word_embeddings to true" if name == _HEAD else ""
        raise ValueError(f"tensor {name}: not in the checkpoint though config.json asks for it; fetch it again{tie}")
    if tensors.shape(name) != shape:
        raise ValueError(f"tensor {name}: shape {tensors.shape(name)} is not {shape} as in config.json; fetch it again")
    tensors.check_float(name)


def _check_no_others(tensors: TensorFolder, expected: Container[str]) -> None:
    """Raises ValueError if there are more tensors: biases, norms, layers, or a classifier's head.

    A language model's head may be there, tied or not, and so may what changes nothing: the rope tables of old
    checkpoints, and the value head of reinforcement learning.
    """
    for name in tensors.names():
        if (
            name not in expected
            and not name.startswith("v_head.")
            and not name.endswith((_HEAD, "rotary_emb.inv_freq"))
        ):
            raise ValueError(f"tensor {name}: the language model of config.json has none like it; name another")


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
