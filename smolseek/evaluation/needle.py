"""Retrieval over distance: how much likelier a span of tokens becomes because it already stood in the context.

The model reads a span, then other tokens, then the span again, d tokens after its first place. In a control sequence
another span stands in the first place. So the difference measures copying alone, for any model and any text:

    gain(d) = mean over the span's tokens but its first of log p(token | it stood d before) - log p(token | it did not)

The span's first token is left out, because nothing tells the model that a copy begins. Damage from channels that a
conversion leaves unrotated would show as a gain that falls with d faster than the dense model's.

Shapes: T tokens, t tokens of the span, D hidden_size, V vocab_size; 2: the sequence with the span and the control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from smolseek.config import SEEDS
from smolseek.data.encoding import check_vocabulary
from smolseek.evaluation.paired import Estimate, estimate
from smolseek.evaluation.quality import Model
from smolseek.generation import evaluating

SPAN_TOKENS = 16

TokenSource = Callable[[int, torch.Generator], Tensor]
"""Draws the given number of tokens, (T,)."""


@dataclass(frozen=True)
class Retrieval:
    """How much a model gains from a span that it read `distance_tokens` before.

    `gains` holds one gain per trial in nats per token. `accuracy` is the share of the span's tokens that the model
    finds likeliest, and `control_accuracy` the same share in the control sequences.
    """

    distance_tokens: int
    gains: tuple[float, ...]
    accuracy: float
    control_accuracy: float

    @property
    def gain(self) -> Estimate:
        """The mean gain over the trials."""
        return estimate(self.gains)

    def to_dict(self) -> dict[str, Any]:
        """The fields, the mean gain and its standard error as a JSON-able dict."""
        return asdict(self) | self.gain._asdict()


def random_tokens(vocab_size: int, special: Sequence[int]) -> TokenSource:
    """Returns a source of tokens drawn uniformly from the vocabulary without the `special` ones."""
    allowed = torch.tensor(sorted(set(range(vocab_size)) - set(special)))
    return lambda count, generator: allowed[torch.randint(len(allowed), (count,), generator=generator)]


def text_pieces(ids_T: Tensor) -> TokenSource:
    """Returns a source of pieces from random places of a text.

    The source raises ValueError if it is asked for a piece that is not shorter than the text.
    """

    def draw(count: int, generator: torch.Generator) -> Tensor:
        if len(ids_T) <= count:
            raise ValueError(f"text of {len(ids_T)} tokens: pieces of {count} are drawn from it; name more text")
        start = int(torch.randint(len(ids_T) - count, (), generator=generator))
        return ids_T[start : start + count]

    return draw


def distances(limit_tokens: int) -> list[int]:
    """Returns the distances to measure: powers of two from the span's length on, and the farthest that fits.

    Raises:
        ValueError: a context too short for two spans.
    """
    farthest = limit_tokens - 2 * SPAN_TOKENS - 1
    if farthest < SPAN_TOKENS:
        raise ValueError(
            f"a context of {limit_tokens} tokens: spans of {SPAN_TOKENS} need {3 * SPAN_TOKENS + 1} or more"
        )
    near = [SPAN_TOKENS << k for k in range(farthest.bit_length()) if SPAN_TOKENS << k < farthest]
    return [*near, farthest]


def measure_retrieval(
    model: Model,
    source: TokenSource,
    *,
    limit_tokens: int | None = None,
    trials: int = 32,
    seed: int = 0,
    start_ids: Sequence[int] = (),
    on_trial: Callable[[int, int], None] = lambda done, count: None,
) -> list[Retrieval]:
    """Returns the gain at every distance within `limit_tokens` (default: the model's limit), from `trials` draws each.

    The draws depend on the seed alone: two models of one vocabulary see the same sequences, trial by trial. Each begins
    with `start_ids`, the BOS that the tokenizer adds to a text, if it adds one.

    Raises:
        ValueError: a context too short for two spans or longer than the model's, no trial, or as `source` does.
    """
    if trials < 1:
        raise ValueError(f"trials {trials}: must be 1 or more")
    if seed not in SEEDS:
        raise ValueError(f"seed {seed}: must be a number of 64 bits")
    limit, most = limit_tokens, model.config.max_position_embeddings
    if limit is not None and limit > most:
        raise ValueError(f"a context of {limit} tokens: the model reads {most}; lower it")
    results, wanted = [], distances(limit or most)
    with evaluating(model):
        for number, distance in enumerate(wanted):
            generator, scores = torch.Generator().manual_seed(seed), []
            for trial in range(trials):
                scores.append(_score_trial(model, *_trial_sequences(start_ids, source, distance, generator)))
                on_trial(number * trials + trial + 1, len(wanted) * trials)
            trial_scores = torch.tensor(scores)  # (trials, 4)
            gains = (trial_scores[:, 0] - trial_scores[:, 1]).tolist()
            results.append(Retrieval(distance, tuple(gains), *trial_scores[:, 2:].mean(0).tolist()))
    return results


def _trial_sequences(
    start_ids: Sequence[int], source: TokenSource, distance: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns two sequences (2, T) that end with the same span, and that span (t,).

    Only the tokens `distance` before the span differ: in the first sequence they are the span, in the second not.
    """
    span_t, other_t, before_t = (source(SPAN_TOKENS, generator) for _ in range(3))
    between_T = source(distance - SPAN_TOKENS, generator) if distance > SPAN_TOKENS else span_t[:0]
    start_T = torch.tensor(start_ids, dtype=span_t.dtype)
    ids_2T = torch.stack([torch.cat([start_T, before_t, first_t, between_T, span_t]) for first_t in (span_t, other_t)])
    return ids_2T, span_t


def _score_trial(model: Model, ids_2T: Tensor, span_t: Tensor) -> list[float]:
    """Returns the mean log-probability of the span's tokens in each sequence, then the share the model finds likeliest
    in each."""
    check_vocabulary(ids_2T, model.config.vocab_size)
    device = next(model.parameters()).device
    hidden_2tD = model.hidden_states(ids_2T.to(device))[:, -len(span_t) : -1]
    scores_2tV = model.lm_head(hidden_2tD).float().log_softmax(-1)
    target_2t1 = span_t[1:].to(device).expand(2, -1)[..., None]
    log_probabilities_2 = scores_2tV.gather(-1, target_2t1).mean(dim=(1, 2))
    hits_2 = (scores_2tV.argmax(-1, keepdim=True) == target_2t1).float().mean(dim=(1, 2))
    return [*log_probabilities_2.tolist(), *hits_2.tolist()]
