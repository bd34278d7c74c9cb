"""Text from a model: prefill in chunks, then one token at a time through the cache.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smolseek.config import SampleSettings
from smolseek.data.encoding import encode_document
from smolseek.model import DeepseekV3, StockModel

_PREFILL_TOKENS = 2048
"""Prompt tokens read at once, so that a long prompt needs bounded memory."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 is greedy; the filters apply in this order to the tempered scores."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name} {getattr(self, name)}: must be {rule}")


def generate(
    model: DeepseekV3 | StockModel,
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    eos_token_id: int | Sequence[int] | None = None,
    **sampling: Any,
) -> Any:
    """Prompts and their continuations.

    Args:
        input_ids: prompts (B, T) as a tensor, or a list of B lists of unequal length.
        max_new_tokens: tokens drawn per sequence at most.
        eos_token_id: a sequence ends with one of these; None: only at its length.
        sampling: fields of `Sampling`.

    Returns:
        A tensor (B, T + new), ended sequences filled up with their EOS; lists for lists, each ending with its EOS.

    Raises:
        ValueError: an empty prompt, or more tokens than the model has positions.
    """
    prompts = input_ids.tolist() if isinstance(input_ids, Tensor) else [list(ids) for ids in input_ids]
    rows = [list(ids) for ids in prompts]
    ended = [False] * len(rows)
    ends = _ends(eos_token_id)
    for tokens in _steps(model, prompts, max_new_tokens, ends, Sampling(**sampling)):
        for row, token in enumerate(tokens):
            if not ended[row] or isinstance(input_ids, Tensor):
                rows[row].append(rows[row][-1] if ended[row] else token)
            ended[row] = ended[row] or token in ends
    return torch.tensor(rows, device=input_ids.device) if isinstance(input_ids, Tensor) else rows


def stream(
    model: DeepseekV3 | StockModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int = 128,
    eos_token_id: int | Sequence[int] | None = None,
    **sampling: Any,
) -> Iterator[int]:
    """The new tokens of one prompt (1, T) as they come, EOS left out; arguments and errors as `generate`."""
    ends = _ends(eos_token_id)
    for (token,) in _steps(model, input_ids.tolist(), max_new_tokens, ends, Sampling(**sampling)):
        if token in ends:
            return
        yield token


def stream_text(
    model: DeepseekV3 | StockModel,
    tokenizer: Any,
    input_ids: Tensor,
    *,
    stop: Sequence[str] = (),
    on_token: Callable[[int], None] = lambda token: None,
    **options: Any,
) -> Iterator[str]:
    """The text of the new tokens as it comes, up to the first of the `stop` strings, itself left out.

    Half a character waits for its other half, and what may become a stop string for what follows. `on_token` is told
    every token as it is drawn; `options` and errors as `stream`.
    """
    new: list[int] = []
    shown = 0
    for token in stream(model, input_ids, **options):
        on_token(token)
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if text.endswith("�"):
            continue
        end = min((text.index(word) for word in stop if word in text), default=None)
        safe = len(text) - _may_begin(text, stop) if end is None else end
        if safe > shown:
            yield text[shown:safe]
            shown = safe
        if end is not None:
            return
    rest = tokenizer.decode(new, skip_special_tokens=True)[shown:]
    if rest:
        yield rest


def _may_begin(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` are the beginning of a stop string."""
    lengths = (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n]))
    return max(lengths, default=0)


def continue_text(
    model: DeepseekV3 | StockModel, tokenizer: Any, prompt: str, settings: SampleSettings
) -> tuple[str, list[int]]:
    """A continuation of `prompt` as text, the prompt in front, and its new tokens."""
    ids = torch.tensor([encode_document(tokenizer, prompt)])
    new = stream(
        model,
        ids,
        max_new_tokens=max(1, min(settings.max_new_tokens, model.config.max_position_embeddings - ids.shape[1])),
        temperature=settings.temperature,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokens = list(new)
    return tokenizer.decode(ids[0].tolist() + tokens, skip_special_tokens=True), tokens


def repetition_rate(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of `tokens` that stood earlier in them."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the former mode after it."""
    was_training = model.training
    if was_training:  # walking every module costs as much as a small decode step
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def _ends(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _steps(
    model: DeepseekV3 | StockModel, prompts: list[list[int]], max_new_tokens: int, ends: frozenset[int], how: Sampling
) -> Iterator[list[int]]:
    """One token per sequence and step, until the length or until every sequence has ended."""
    longest, limit = max(map(len, prompts), default=0), model.config.max_position_embeddings
    if not min(map(len, prompts), default=0):
        raise ValueError("prompt: empty; give at least one token to start from")
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {longest} tokens + {max_new_tokens} new ones: the model has {limit} positions; shorten the "
            "prompt or ask for fewer new tokens"
        )
    device = model.lm_head.weight.device
    padding_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    seen_BT = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    generator = torch.Generator(device)
    if how.seed is None:
        generator.seed()
    else:
        generator.manual_seed(how.seed)
    cache: Any = model.new_cache(len(prompts), longest + max_new_tokens, padding_B if padding_B.any() else None)
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    ends_E = torch.tensor(sorted(ends), device=device)
    chunks = seen_BT.split(_PREFILL_TOKENS, dim=1)
    for _ in range(max_new_tokens):
        with evaluating(model), torch.inference_mode():
            for chunk_BT in chunks:
                hidden_BTD = model.hidden_states(chunk_BT, cache=cache)
            logits_BV = model.lm_head(hidden_BTD[:, -1]).float()
            token_B = _draw(logits_BV, seen_BT, padding_B, how, generator)
        yield token_B.tolist()
        ended_B = ended_B | torch.isin(token_B, ends_E)
        if ended_B.all():
            return
        chunks = (token_B[:, None],)
        seen_BT = torch.cat([seen_BT, token_B[:, None]], dim=1)


def _draw(logits_BV: Tensor, seen_BT: Tensor, padding_B: Tensor, how: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each sequence, (B,)."""
    if how.repetition_penalty != 1.0:
        logits_BV = _penalise(logits_BV, seen_BT, padding_B, how.repetition_penalty)
    if how.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / how.temperature
    if how.top_k is not None and how.top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(how.top_k).values[:, -1:], float("-inf"))
    if how.top_p is not None and how.top_p < 1:
        ordered_BV, order_BV = logits_BV.softmax(-1).sort(descending=True)
        beyond_BV = ordered_BV.cumsum(-1) - ordered_BV >= how.top_p  # the token that crosses the mass stays
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(1, order_BV, beyond_BV), float("-inf"))
    if how.min_p:
        chances_BV = logits_BV.softmax(-1)
        floor_B1 = how.min_p * chances_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(chances_BV < floor_B1, float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]


def _penalise(logits_BV: Tensor, seen_BT: Tensor, padding_B: Tensor, penalty: float) -> Tensor:
    """Scores of tokens seen before made smaller (Keskar et al. 2019, section 4.1); padding is not text."""
    real_BT = torch.arange(seen_BT.shape[1], device=seen_BT.device) >= padding_B[:, None]
    seen_BV = torch.zeros_like(logits_BV).scatter_add_(1, seen_BT, real_BT.to(logits_BV)) > 0
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)
