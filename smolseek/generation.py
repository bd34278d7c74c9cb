"""Text generation: the prompt is read in chunks, then tokens are drawn one at a time through the cache.

Shapes: B sequences, T tokens in each, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smolseek.config import SEEDS, SampleSettings
from smolseek.data.encoding import check_vocabulary, encode_prompt
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.decoding import ROPES_BY_LENGTH, DecodeStep, has_fixed_steps
from smolseek.numerics.shards import gathers_weights, release_gathered

_COLDEST = 1e-6
"""Temperatures below this are 0: logits over them do not fit fp32, and the likeliest token has all the chance."""
_PREFILL_TOKENS = 2048
"""Most prompt tokens read at once, so that memory does not grow with the prompt; all, where their angles need all."""


_CHARACTER_BYTES = 4
"""Most bytes of a character in UTF-8."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Temperature 0 is greedy. The filters apply in this order (top_k, top_p, min_p), after division by the temperature.
    """

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
            ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "between 1e-6 and 1e6"),
            ("seed", self.seed is None or self.seed in SEEDS, "a number of 64 bits"),
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
    """Returns the prompts with their continuations.

    Args:
        input_ids: prompts (B, T) as a tensor, or a list of B lists of unequal length.
        max_new_tokens: most tokens drawn per sequence.
        eos_token_id: a sequence ends when it draws one of these; with None it ends only at `max_new_tokens`.
        sampling: fields of `Sampling`.

    Returns:
        For a tensor: a tensor (B, T + new), in which ended sequences repeat their EOS. For lists: lists, each of which
        ends with its EOS if it drew one.

    Raises:
        ValueError: `input_ids` is neither of the two, a prompt is empty, there are more tokens than the model has
            positions or fewer than none, or a field of `Sampling` is out of range.
    """
    prompts = _prompts(input_ids)
    rows = [list(ids) for ids in prompts]
    ended = [False] * len(rows)
    end_ids = _end_ids(eos_token_id)
    for tokens in _decode(model, prompts, max_new_tokens, end_ids, Sampling(**sampling)):
        for row, token in enumerate(tokens):
            if not ended[row] or isinstance(input_ids, Tensor):
                rows[row].append(rows[row][-1] if ended[row] else token)
            ended[row] = ended[row] or token in end_ids
    return torch.tensor(rows, device=input_ids.device) if isinstance(input_ids, Tensor) else rows


def _prompts(input_ids: Any) -> list[list[int]]:
    """Returns the prompts of a tensor (B, T), or of a list of lists, as lists; ValueError for anything else."""
    try:
        prompts = [list(ids) for ids in (input_ids.tolist() if isinstance(input_ids, Tensor) else input_ids)]
    except TypeError:
        prompts = [[[]]]
    if any(isinstance(token, list | str) for ids in prompts for token in ids):
        raise ValueError(
            "input_ids must be a tensor of (batch, tokens), or a list of lists of token ids; of what a tokenizer "
            "returns take input_ids, and put one prompt in a list"
        )
    return prompts


def stream(
    model: DeepseekV3 | StockModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int = 128,
    eos_token_id: int | Sequence[int] | None = None,
    **sampling: Any,
) -> Iterator[int]:
    """Yields the new tokens of one prompt (1, T) as they are drawn, without EOS; arguments and errors as `generate`."""
    end_ids = _end_ids(eos_token_id)
    for (token,) in _decode(model, _prompts(input_ids), max_new_tokens, end_ids, Sampling(**sampling)):
        if token in end_ids:
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
    """Yields the text of the new tokens as they are drawn, up to the first of the `stop` strings and without it.

    The text is what the tokens say behind the prompt: a SentencePiece token keeps its space. A token that ends inside a
    character, or in text that may become a stop string, is held back until the next tokens decide. `on_token` is called
    with every token as it is drawn; `options` and errors as `stream`. A text ends at the model's own end tokens unless
    `eos_token_id` names others.

    Raises:
        ValueError: as `stream`, or a stop string is empty.
    """
    if not all(stop):
        raise ValueError("stop '': an empty text is everywhere; leave it out")
    options.setdefault("eos_token_id", end_tokens(model, tokenizer))
    decoder, pending = TextDecoder(tokenizer, input_ids[0].tolist()), ""
    for token in stream(model, input_ids, **options):
        on_token(token)
        pending += decoder.add(token)
        end = min((pending.index(word) for word in stop if word in pending), default=None)
        safe = len(pending) - _undecided_length(pending, stop) if end is None else end
        if safe:
            yield pending[:safe]
            pending = pending[safe:]
        if end is not None:
            return
    if pending := pending + decoder.rest():
        yield pending


class TextDecoder:
    """The text of tokens that follow a prompt, token by token, in time that does not grow with the text.

    Only the last tokens are decoded at each step, with a few before them, because the text of a token depends on its
    neighbours: SentencePiece drops the space of the first one, and a character may have several tokens.
    """

    _CONTEXT_TOKENS = 8

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._ids, self._said = self._context(list(prompt_ids))

    def add(self, token: int) -> str:
        """Returns the text that a token adds; none while it ends inside a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) < 4 * self._CONTEXT_TOKENS:
            return ""
        return self._say(text)

    def rest(self) -> str:
        """Returns the text that `add` holds back, a broken character."""
        return self._say(self._decode(self._ids))

    def _say(self, text: str) -> str:
        new = text[len(self._said) :]
        self._ids, self._said = self._context(self._ids)
        return new

    def _context(self, ids: list[int]) -> tuple[list[int], str]:
        """Returns the last tokens and their text, with a few more where they would begin inside a character.

        SentencePiece reads nothing of a run of bytes that begins there.
        """
        for more in range(_CHARACTER_BYTES):
            kept = ids[-self._CONTEXT_TOKENS - more :]
            if "\ufffd" not in (text := self._decode(kept)):
                return kept, text
        kept = ids[-self._CONTEXT_TOKENS :]
        return kept, self._decode(kept)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def end_tokens(model: DeepseekV3 | StockModel, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end a text: those of the model's folder or config, else the tokenizer's EOS."""
    named = model.end_token_ids or model.config.eos_token_id
    return tuple(sorted(_end_ids(tokenizer.eos_token_id if named is None else named)))


def _undecided_length(text: str, stop: Sequence[str]) -> int:
    """Returns how many characters at the end of `text` are the beginning of a stop string."""
    lengths = (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n]))
    return max(lengths, default=0)


def continue_text(
    model: DeepseekV3 | StockModel, tokenizer: Any, prompt: str, settings: SampleSettings
) -> tuple[str, list[int]]:
    """Returns `prompt` with its continuation (in a chat its answer, behind an empty line), and the new tokens."""
    ids = torch.tensor([encode_prompt(tokenizer, prompt, chat=settings.chat)])
    tokens: list[int] = []
    pieces = stream_text(
        model,
        tokenizer,
        ids,
        on_token=tokens.append,
        max_new_tokens=max(1, min(settings.max_new_tokens, model.config.max_position_embeddings - ids.shape[1])),
        temperature=settings.temperature,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=settings.seed,
    )
    return prompt + "\n\n" * settings.chat + "".join(pieces), tokens


def repetition_rate(tokens: Sequence[int], n: int = 4) -> float:
    """Returns the share of n-grams in `tokens` that repeat an earlier one."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode inside the block, without gradients, and restores its mode afterwards.

    Of a divided model nothing stays gathered.
    """
    was_training = model.training
    if was_training:  # visiting every module costs as much as a small decode step
        model.eval()
    try:  # what FSDP gathers here it uses again in training, which takes no tensors of inference mode
        with torch.no_grad() if gathers_weights(model) else torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()
        release_gathered(model)


def _end_ids(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _decode(
    model: DeepseekV3 | StockModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_ids: frozenset[int],
    sampling: Sampling,
) -> Iterator[list[int]]:
    """Yields at each step one new token per sequence, until `max_new_tokens` or until every sequence has ended."""
    longest, limit = max(map(len, prompts), default=0), model.config.max_position_embeddings
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens}: must not be negative")
    if not min(map(len, prompts), default=0):
        raise ValueError("prompt: empty; give at least one token to start from")
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"prompt of {longest} tokens + {max_new_tokens} new ones: the model has {limit} positions; shorten the "
            "prompt or ask for fewer new tokens"
        )
    check_vocabulary(torch.tensor([token for prompt in prompts for token in prompt]), model.config.vocab_size)
    device = model.lm_head.weight.device
    padding_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ids_BT = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    seen_BV = _seen(ids_BT, padding_B, model.config.vocab_size) if sampling.repetition_penalty != 1.0 else None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    cache: Any = model.new_cache(len(prompts), longest + max_new_tokens, padding_B if padding_B.any() else None)
    step = DecodeStep(model, cache) if has_fixed_steps(model) else None
    ended_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    end_tokens = torch.tensor(sorted(end_ids), device=device)
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    chunks = ids_BT.split(longest if rope in ROPES_BY_LENGTH else _PREFILL_TOKENS, dim=1)
    for _ in range(max_new_tokens):
        with evaluating(model):
            if step is not None and cache.length:
                logits_BV = step(chunks[0])
            else:
                for chunk_BT in chunks:
                    hidden_BTD = model.hidden_states(chunk_BT, cache=cache)
                logits_BV = model.lm_head(hidden_BTD[:, -1])
            token_B = _sample(logits_BV.float(), seen_BV, sampling, generator)
        yield token_B.tolist()
        ended_B = ended_B | torch.isin(token_B, end_tokens)
        if ended_B.all():
            return
        chunks = (token_B[:, None],)
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B[:, None], True)


def _sample(logits_BV: Tensor, seen_BV: Tensor | None, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Returns the next token of each sequence, (B,); `seen_BV` marks the tokens that the penalty makes less likely."""
    if not logits_BV.isfinite().all():
        raise ValueError(
            "the model gives NaN or infinity for a next token: its weights are broken; fetch the checkpoint again"
        )
    if seen_BV is not None:
        logits_BV = _penalise(logits_BV, seen_BV, sampling.repetition_penalty)
    if sampling.temperature < _COLDEST:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(sampling.top_k).values[:, -1:], float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered_BV, order_BV = logits_BV.softmax(-1).sort(descending=True)
        beyond_BV = ordered_BV.cumsum(-1) - ordered_BV >= sampling.top_p  # the token that crosses the mass stays
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(1, order_BV, beyond_BV), float("-inf"))
    if sampling.min_p:
        chances_BV = logits_BV.softmax(-1)
        floor_B1 = sampling.min_p * chances_BV.amax(-1, keepdim=True)
        logits_BV = logits_BV.masked_fill(chances_BV < floor_B1, float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]


def _penalise(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Returns logits in which tokens seen before are less likely (Keskar et al. 2019, section 4.1).

    As in transformers, negative logits are multiplied by the penalty.
    """
    return torch.where(seen_BV, torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def _seen(ids_BT: Tensor, padding_B: Tensor, vocab_size: int) -> Tensor:
    """Returns which tokens each prompt holds, (B, V); padding tokens do not count."""
    real_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) >= padding_B[:, None]
    counts_BV = torch.zeros(len(ids_BT), vocab_size, dtype=torch.int32, device=ids_BT.device)
    return counts_BV.scatter_add_(1, ids_BT, real_BT.int()) > 0
