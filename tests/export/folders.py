"""Tiny folders to export, and a reader for GGUF files."""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader

from smolseek.checkpoint.hub import save
from smolseek.model import DeepseekV3
from tests.factories import tiny_v3
from tests.text import ENTRIES, tiny_tokenizer

YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
"""With these numbers YaRN's ramp lies inside the 8 rope slots of qk_rope_head_dim 16."""
YARN_SIZES = {"qk_rope_head_dim": 16, "max_position_embeddings": 256}


def tiny_folder(folder: Path, **overrides: Any) -> DeepseekV3:
    """Saves a lively model with a tokenizer and returns the model."""
    model = tiny_v3(vocab_size=ENTRIES, eos_token_id=0, bos_token_id=0, **overrides)
    save(model, folder, tokenizer_from=tiny_tokenizer())
    return model


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (keys, tensors) of a GGUF file."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def ids(tokens: int = 60, seed: int = 0) -> torch.Tensor:
    """Returns random token ids, (tokens,)."""
    return torch.randint(ENTRIES, (tokens,), generator=torch.Generator().manual_seed(seed))
