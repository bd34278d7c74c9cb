"""lm-eval's transformers model, but all continuations of one context run through the model together.

Shapes: B contexts, T tokens of a context and its continuations, N predicted tokens, V vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.models.huggingface import HFLM

_BATCH_TOKENS = 4096
_POSITIONS_AT_ONCE = 512  # whose logits are held
_PADDING = -1

Request = tuple[Any, list[int], list[int]]
"""What was asked, the tokens of its context, the tokens of its continuation."""


class SharedContexts(HFLM):
    """Runs each context once, with its continuations side by side, where lm-eval repeats it for every one.

    A continuation stands at the positions behind the context and sees the context and itself alone, so its
    log-likelihood is that of a row of its own. The head runs for predicted tokens only. A request that is longer than
    the model's window, or its sliding window, goes lm-eval's own way.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        window = min(self.max_length, getattr(self.config, "sliding_window", None) or self.max_length)
        groups: dict[tuple[int, ...], list[int]] = {}
        alone: list[int] = []
        for number, (_, context, continuation) in enumerate(requests):
            fits = len(context) + len(continuation) <= window + 1
            (groups.setdefault(tuple(context), []) if fits else alone).append(number)
        own = super()._loglikelihood_tokens([requests[n] for n in alone], disable_tqdm, override_bs) if alone else []
        answers = dict(zip(alone, own, strict=True))
        rows = [_row(context, [(n, requests[n][2]) for n in numbers]) for context, numbers in groups.items()]
        for batch in _batches(rows):
            for number, answer in self._score(batch):
                answers[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return [answers[number] for number in range(len(requests))]

    @torch.no_grad()
    def _score(self, rows: Sequence[_Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yields for each request its number, its log-likelihood, and whether all its tokens are the likeliest."""
        longest = max(len(row.tokens) for row in rows)
        tokens_BT, positions_BT, segments_BT = (
            torch.tensor([[*part, *[filler] * (longest - len(part))] for part in parts], device=self.device)
            for parts, filler in zip(zip(*(row[:3] for row in rows), strict=True), (0, 0, _PADDING), strict=True)
        )
        key_B1T = segments_BT[:, None]
        seen_BTT = ((key_B1T == 0) | (key_B1T == segments_BT[:, :, None])).tril()
        out = self.model.base_model(
            input_ids=tokens_BT, attention_mask=seen_BTT[:, None], position_ids=positions_BT, use_cache=False
        )
        predicted = [(b, *one) for b, row in enumerate(rows) for one in row.predicted]
        row_N, number_N, place_N, label_N = torch.tensor(predicted, device=self.device).unbind(1)
        hidden_ND, head = out.last_hidden_state[row_N, place_N], self.model.get_output_embeddings()
        scores, best = [], []
        parts = zip(*(x.split(_POSITIONS_AT_ONCE) for x in (hidden_ND, label_N)), strict=True)
        for part_ND, label in parts:
            logits_NV = head(part_ND).float()
            scores.append(logits_NV.log_softmax(-1).gather(1, label[:, None])[:, 0])
            best.append(logits_NV.argmax(-1) == label)
        score_N, best_N = torch.cat(scores), torch.cat(best)
        for number in number_N.unique().tolist():
            mine_N = number_N == number
            yield number, (float(score_N[mine_N].sum()), bool(best_N[mine_N].all()))


class _Row(NamedTuple):
    """A context and its continuations, each without its last token, which predicts nothing."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    """0 for the context, then 1, 2 and so on."""
    predicted: list[tuple[int, int, int]]
    """Request number, the place whose output predicts the token, and the token."""


def _row(context: Sequence[int], continuations: Sequence[tuple[int, list[int]]]) -> _Row:
    length = len(context)
    row = _Row([*context], [*range(length)], [0] * length, [])
    for segment, (number, continuation) in enumerate(continuations, start=1):
        begin, more = len(row.tokens), len(continuation) - 1
        places = [length - 1, *range(begin, begin + more)]
        row.predicted.extend((number, place, token) for place, token in zip(places, continuation, strict=True))
        row.tokens.extend(continuation[:-1])
        row.positions.extend(range(length, length + more))
        row.segments.extend([segment] * more)
    return row


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Returns batches of rows, the longest first, of about `_BATCH_TOKENS` tokens with their padding."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batch and len(batch[0].tokens) * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
