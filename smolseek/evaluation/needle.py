"""Retrieval over distance: how much a span becomes likelier because it stood in the context once before.

A span of tokens is read, then other tokens, then the span again, d tokens behind where it first stood. The same with
another span in the first place is the control, so what is measured is the copying alone, on any model and any text:

    gain(d) = mean over the span's tokens but its first of log p(token | it stood d before) - log p(token | it did not)

Its first token is left out, for nothing says that a copy begins. Channels that a conversion leaves unrotated would show
as a gain that falls with d faster than the dense model's.

Shapes: T tokens, S tokens of the span, V vocabulary; 2: with the span before, and the control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from smolseek.evaluation.paired import Estimate, estimate
from smolseek.evaluation.quality import Model
from smolseek.generation import evaluating

SPAN_TOKENS = 16

Draw = Callable[[int, torch.Generator], Tensor]
"""Gives that many tokens (T,)."""


@dataclass(frozen=True)
class Retrieval:
    """What a model gets out of a span that it read `distance_tokens` before, in nats a token, trial by trial; the share
    of its tokens that are likeliest, and of the control's."""

    distance_tokens: int
    gains: tuple[float, ...]
    accuracy: float
    control_accuracy: float

    @property
    def gain(self) -> Estimate:
        """Mean over the trials."""
        return estimate(self.gains)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the mean gain as a JSON-able dict."""
        return asdict(self) | self.gain._asdict()


def random_tokens(vocab_size: int, special: Sequence[int]) -> Draw:
    """Tokens drawn evenly from the vocabulary but for the `special` ones."""
    allowed_V = torch.tensor(sorted(set(range(vocab_size)) - set(special)))
    return lambda count, generator: allowed_V[torch.randint(len(allowed_V), (count,), generator=generator)]


def pieces_of(ids_T: Tensor) -> Draw:
    """Pieces drawn from a text.

    A text shorter than a piece asked for makes the draw raise ValueError.
    """

    def draw(count: int, generator: torch.Generator) -> Tensor:
        if len(ids_T) <= count:
            raise ValueError(f"text of {len(ids_T)} tokens: pieces of {count} are drawn from it; name more text")
        start = int(torch.randint(len(ids_T) - count, (), generator=generator))
        return ids_T[start : start + count]

    return draw


def distances(limit_tokens: int) -> list[int]:
    """Powers of two from the span's length on, and the farthest that fits into a context."""
    farthest = limit_tokens - 2 * SPAN_TOKENS - 1
    if farthest < SPAN_TOKENS:
        raise ValueError(
            f"a context of {limit_tokens} tokens: spans of {SPAN_TOKENS} need {3 * SPAN_TOKENS + 1} or more"
        )
    near = [SPAN_TOKENS << k for k in range(farthest.bit_length()) if SPAN_TOKENS << k < farthest]
    return [*near, farthest]


def measure_retrieval(
    model: Model,
    draw: Draw,
    *,
    limit_tokens: int | None = None,
    trials: int = 32,
    seed: int = 0,
    on_trial: Callable[[int, int], None] = lambda done, count: None,
) -> list[Retrieval]:
    """The gain at every distance within `limit_tokens` (the model's own limit), `trials` draws each.

    The draws depend on the seed alone: two models of one vocabulary see the same sequences, trial by trial.

    Raises:
        ValueError: a context too short for two spans or longer than the model's, no trial, or as `draw` does.
    """
    if trials < 1:
        raise ValueError(f"trials {trials}: must be 1 or more")
    limit, most = limit_tokens, model.config.max_position_embeddings
    if limit is not None and limit > most:
        raise ValueError(f"a context of {limit} tokens: the model reads {most}; lower it")
    found, wanted = [], distances(limit or most)
    with evaluating(model), torch.inference_mode():
        for number, distance in enumerate(wanted):
            generator, scores = torch.Generator().manual_seed(seed), []
            for trial in range(trials):
                scores.append(_trial(model, *_sequences(model, draw, distance, generator)))
                on_trial(number * trials + trial + 1, len(wanted) * trials)
            scores_24 = torch.tensor(scores)
            gains = (scores_24[:, 0] - scores_24[:, 1]).tolist()
            found.append(Retrieval(distance, tuple(gains), *scores_24[:, 2:].mean(0).tolist()))
    return found


def _sequences(model: Model, draw: Draw, distance: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The sequences (2, T), alike but for what stands `distance` before the span at their end; and the span (S,)."""
    span_S, other_S, before_S = (draw(SPAN_TOKENS, generator) for _ in range(3))
    between_T = draw(distance - SPAN_TOKENS, generator) if distance > SPAN_TOKENS else span_S[:0]
    bos = model.config.bos_token_id
    start_T = torch.tensor([] if bos is None else [bos], dtype=span_S.dtype)
    return torch.stack([torch.cat([start_T, before_S, s, between_T, span_S]) for s in (span_S, other_S)]), span_S


def _trial(model: Model, ids_2T: Tensor, span_S: Tensor) -> list[float]:
    """Log-probability of a token of the span, with it before and without; the share that is likeliest, likewise."""
    device = next(model.parameters()).device
    hidden_2SD = model.hidden_states(ids_2T.to(device))[:, -len(span_S) : -1]
    scores_2SV = model.lm_head(hidden_2SD).float().log_softmax(-1)
    target_2S1 = span_S[1:].to(device).expand(2, -1)[..., None]
    log_probabilities_2 = scores_2SV.gather(-1, target_2S1).mean(dim=(1, 2))
    right_2 = (scores_2SV.argmax(-1, keepdim=True) == target_2S1).float().mean(dim=(1, 2))
    return [*log_probabilities_2.tolist(), *right_2.tolist()]
