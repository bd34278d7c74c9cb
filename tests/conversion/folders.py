"""Tiny folders to convert, and how stock transformers reads them."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from smolseek.checkpoint.hub import save
from smolseek.model import StockModel
from tests.factories import tiny_llama
from tests.text import ENTRIES, tiny_tokenizer


def write_source(folder, **overrides):
    """Writes a tiny dense Llama and returns its folder."""
    model = tiny_llama(vocab_size=ENTRIES, **overrides)
    save(StockModel(model), folder, tokenizer_from=tiny_tokenizer())
    return folder


def edit(folder, **changes):
    """Changes fields of the folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def stock(folder):
    """Returns the folder's model in stock transformers, which must find every tensor and no others."""
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def logits(model, text):
    """Returns the logits (1, T, V) of our model or of transformers' on the first 48 tokens of a file."""
    ids = tiny_tokenizer()(Path(text).read_text()[:400], return_tensors="pt")["input_ids"][:, :48]
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits
