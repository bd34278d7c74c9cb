"""Calibration text that the dense model writes itself, sampled from all that it may say.

Shapes: B windows, R rows written side by side, T tokens in each, S tokens attended to, V vocab_size, L
num_hidden_layers, H num_attention_heads, G num_key_value_heads, r = H / G, d head_dim, Z ordinary tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smolseek.conversion.collect import sample_labels
from smolseek.conversion.probe import attending
from smolseek.data.encoding import added_start

_IMPLEMENTATION = "smolseek_cached"
_BATCH_BYTES = 2**31
"""Most memory for the keys, values and probabilities of rows that are written side by side."""
_COLDEST = 0.6
"""Lowest temperature of a row: what the model finds likely is nearer to what people write (LOG.md)."""


@dataclass(frozen=True)
class Openings:
    """What a document begins with, for no model says what a text begins with: a token drawn evenly from ordinary ones.

    In front of it stands the BOS, if the tokenizer adds one.
    """

    start: list[int]
    ordinary_Z: Tensor

    def draw(self, index_B: Tensor, generator: torch.Generator) -> Tensor:
        """Returns tokens (B,) for places in openings; for a place behind the opening any token, to be replaced."""
        token_B = self.ordinary_Z[torch.randint(len(self.ordinary_Z), index_B.shape, generator=generator)]
        for index, token in enumerate(self.start):
            token_B[index_B == index] = token
        return token_B

    def shortest_texts(self, most: int, generator: torch.Generator) -> Tensor:
        """Returns the openings alone (B, T), each with another token, in an order drawn at random; `most` at most."""
        drawn_B = self.ordinary_Z[torch.randperm(len(self.ordinary_Z), generator=generator)[:most]]
        return torch.cat([torch.tensor(self.start).expand(len(drawn_B), -1).long(), drawn_B[:, None]], dim=1)


def read_openings(tokenizer: Any, vocab_size: int, end_tokens: Sequence[int]) -> Openings:
    """Returns the openings of a model's texts; ordinary tokens are those that are neither special nor end tokens.

    Raises:
        ValueError: there is no ordinary token.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= {*tokenizer.all_special_ids, *end_tokens}
    ordinary = sorted(token for token in {*tokenizer.get_vocab().values()} - special if token < vocab_size)
    if not ordinary:
        raise ValueError(
            f"tokenizer: none of its ordinary tokens is among the model's {vocab_size:,}; use the model's own tokenizer"
        )
    return Openings(added_start(tokenizer), torch.tensor(ordinary))


@torch.no_grad()
def sample_windows(
    model: Any,
    openings: Openings,
    *,
    windows: int,
    window_tokens: int,
    end_tokens: Sequence[int],
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, count: None,
) -> tuple[Tensor, int]:
    """Returns windows (B, T) of text that the model writes, and the number of documents that begin in it.

    Behind its opening a document is drawn from the model's full distribution. After one of `end_tokens` the next
    document begins behind it and sees what stands before it, as packed text does in the calibration. Half of the text
    has temperature 1, the rest all temperatures from there down to 0.6. Where the model reads two windows at once, they
    are written as one row and cut: half of all windows then begin inside a text, as windows of people's text do.

    `model` is a transformers Llama-like model, which computes in its own dtype. `on_progress(done, count)` tells how
    many tokens are written.

    Raises:
        ValueError: the model gives NaN or infinity.
    """
    generator = torch.Generator().manual_seed(seed)
    in_row = 2 if 2 * window_tokens <= model.config.max_position_embeddings else 1
    rows_RT = torch.empty(-(-windows // in_row), in_row * window_tokens, dtype=torch.long)
    temperature_R = torch.linspace(_COLDEST, 2 - _COLDEST, len(rows_RT)).clamp(max=1)
    temperature_R = temperature_R[torch.randperm(len(rows_RT), generator=generator)].to(model.device)
    ends = torch.tensor(end_tokens, dtype=torch.long)
    parts = -(-len(rows_RT) // _rows_at_once(model.config, rows_RT.shape[1]))
    documents, done = 0, 0
    for part_RT, part_R in zip(rows_RT.chunk(parts), temperature_R.chunk(parts), strict=True):
        for new_documents in _write(model, openings, part_RT, part_R, ends, generator):
            documents += new_documents
            done += len(part_RT)
            on_progress(done, rows_RT.numel())
    return rows_RT.view(-1, window_tokens)[:windows], documents


def _write(
    model: Any,
    openings: Openings,
    rows_RT: Tensor,
    temperature_R: Tensor,
    ends: Tensor,
    generator: torch.Generator,
) -> Iterator[int]:
    """Fills rows token by token; yields after each how many documents begin with it."""
    opening = len(openings.start) + 1
    index_R = torch.zeros(len(rows_RT), dtype=torch.long)  # of the next token in its document's opening
    with cached_attention(model, *rows_RT.shape) as next_probabilities:
        for position in range(rows_RT.shape[1]):
            token_R, free_R = openings.draw(index_R, generator), index_R == opening
            if position:
                p_RV = next_probabilities(rows_RT[:, position - 1]).pow_(1 / temperature_R[:, None])
                token_R = torch.where(free_R, sample_labels(p_RV, generator)[:, 0].cpu(), token_R)
            rows_RT[:, position] = token_R
            yield int((index_R == 0).sum())
            index_R = (index_R + 1).clamp_(max=opening).masked_fill_(free_R & torch.isin(token_R, ends), 0)


@contextmanager
def cached_attention(model: Any, rows: int, tokens: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a function that takes the next token (B,) of each row and returns the chances (B, V) of the one after it.

    Keys and values lie in memory that is taken once, and the queries that share a key meet it together. transformers'
    own cache is copied at every token, and its attention repeats keys: together that takes longer than all products.

    Raises:
        ValueError: the model gives NaN or infinity; from the function.
    """
    heads, head_dim = _key_shape(model.config)
    shape = (len(model.base_model.layers), rows, heads, tokens, head_dim)
    keys_LBGSd, values_LBGSd = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    length = 0

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        keys_BGSd, values_BGSd = (held[module.layer_idx, :, :, : length + 1] for held in (keys_LBGSd, values_LBGSd))
        keys_BGSd[:, :, -1:], values_BGSd[:, :, -1:] = key, value
        query_BGrd = query[:, :, 0].unflatten(1, (heads, -1))
        out_BGrd = F.scaled_dot_product_attention(query_BGrd, keys_BGSd, values_BGSd, scale=scaling)
        return out_BGrd.flatten(1, 2)[:, None], None

    def next_probabilities(token_B: Tensor) -> Tensor:
        nonlocal length
        position = torch.full((1, 1), length, device=model.device)
        out = model.base_model(token_B[:, None].to(model.device), position_ids=position, use_cache=False)
        length += 1
        p_BV = model.get_output_embeddings()(out.last_hidden_state[:, 0]).float().softmax(-1)
        if not p_BV[:, 0].isfinite().all():  # one such logit makes all chances of its row NaN
            raise ValueError(
                "the model gives NaN or infinity for a next token: its weights are broken; fetch the checkpoint again"
            )
        return p_BV

    with attending(model, _IMPLEMENTATION, attend):
        yield next_probabilities


def _key_shape(config: Any) -> tuple[int, int]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim


def _rows_at_once(config: Any, tokens: int) -> int:
    """Returns how many rows are written side by side, the same on every machine: each has draws of its own."""
    heads, head_dim = _key_shape(config)
    cached = 2 * 4 * config.num_hidden_layers * heads * head_dim * tokens
    return max(1, _BATCH_BYTES // (cached + 3 * 4 * config.vocab_size))
