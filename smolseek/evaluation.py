"""Held-out loss: one definition of perplexity everywhere; distance from a teacher, and the balance of the experts.

Shapes: N windows, T tokens, V vocabulary, E routed experts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.generation import evaluating, stream
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import (
    expert_weights,
    max_violation,
    recorded_choices,
    routing_information,
    take_expert_counts,
)

WINDOW_TOKENS = 512


@dataclass(frozen=True)
class Quality:
    """Held-out loss in nats per token and what follows from it."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a teacher's: KL(teacher ‖ model) in nats per token, and the
    share of tokens after which both hold the same next token likeliest."""

    kl: float
    agreement: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return asdict(self)


def measure_quality(
    model: DeepseekV3 | StockModel,
    ids_T: Tensor,
    text_bytes: int,
    *,
    on_window: Callable[[int, int], None] | None = None,
) -> Quality:
    """Perplexity over non-overlapping windows of 512 (or the model's limit), each token but a window's first predicted.

    `ids_T` is one stream of packed documents, `text_bytes` their UTF-8 size; `on_window(done, all)` reports progress.

    Raises:
        ValueError: fewer than two tokens, or a loss that is not finite.
    """
    size = min(WINDOW_TOKENS, model.config.max_position_embeddings)
    if len(ids_T) < 2:
        raise ValueError(f"held-out text of {len(ids_T)} tokens: at least 2 are needed; name more text")
    windows = list(ids_T.split(size))
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        for number, window_T in enumerate(windows, start=1):
            if len(window_T) > 1:
                ids_1T = window_T[None].to(device)
                logits_TV = model(ids_1T)[0, :-1].float()
                total += F.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum").item()
                count += len(window_T) - 1
            if on_window is not None:
                on_window(number, len(windows))
    loss = total / count
    if not math.isfinite(loss):
        raise ValueError(f"held-out loss is {loss}: the weights hold NaN or overflow; try --dtype float32")
    bits_per_byte = loss * len(ids_T) / (math.log(2) * max(1, text_bytes))
    return Quality(loss, math.exp(min(loss, 700.0)), bits_per_byte, count)


def measure_divergence(model: DeepseekV3 | StockModel, teacher: DeepseekV3 | StockModel, ids_T: Tensor) -> Divergence:
    """KL to `teacher` and agreement with it over windows of 512 (or either model's limit), every token counted.

    On text of a domain that no training saw, it tells keeping the teacher from learning the training text.

    Raises:
        ValueError: no tokens, or vocabularies of different sizes.
    """
    if not len(ids_T):
        raise ValueError("text of 0 tokens: at least 1 is needed to compare two models; name more text")
    vocabularies = [m.config.vocab_size for m in (model, teacher)]
    if len(set(vocabularies)) > 1:
        raise ValueError(
            f"vocabularies of {vocabularies[0]} and {vocabularies[1]}: only models of one vocabulary can be compared; "
            "name the dense model that this one was made from"
        )
    size = min(WINDOW_TOKENS, *(m.config.max_position_embeddings for m in (model, teacher)))
    kl, agreed = 0.0, 0
    with evaluating(model), evaluating(teacher), torch.inference_mode():
        for window_T in ids_T.split(size):
            student_TV, teacher_TV = (
                m(window_T[None].to(next(m.parameters()).device))[0].float().log_softmax(-1) for m in (model, teacher)
            )
            teacher_TV = teacher_TV.to(student_TV.device)
            kl += F.kl_div(student_TV, teacher_TV, reduction="sum", log_target=True).item()
            agreed += int((student_TV.argmax(-1) == teacher_TV.argmax(-1)).sum())
    return Divergence(kl / len(ids_T), agreed / len(ids_T), len(ids_T))


def measure_balance(model: DeepseekV3, ids_T: Tensor) -> dict[int, float]:
    """MaxVio of each expert layer over all of `ids_T`, in windows of 512 as `measure_quality` cuts them."""
    take_expert_counts(model)
    size = min(WINDOW_TOKENS, model.config.max_position_embeddings)
    with evaluating(model), torch.inference_mode():
        for window_T in ids_T.split(size):
            model.hidden_states(window_T[None].to(next(model.parameters()).device))
    return {layer: max_violation(counts_E) for layer, counts_E in take_expert_counts(model)}


def measure_specialisation(model: DeepseekV3 | StockModel, ids_T: Tensor) -> dict[str, dict[str, float]]:
    """How different the experts are, per layer: `weights` (`balance.weights_apart`) and `routing`
    (`balance.routing_information` over `ids_T`, in windows of 512); empty without expert layers."""
    weights = expert_weights(model)
    if not weights:
        return {}
    size, device = min(WINDOW_TOKENS, model.config.max_position_embeddings), next(model.parameters()).device
    with recorded_choices(model) as choices, evaluating(model), torch.inference_mode():
        for window_T in ids_T.split(size):
            model.hidden_states(window_T[None].to(device))
    take_expert_counts(model)
    tokens_T, routing = ids_T.to(device), {}
    for layer, parts in choices.items():
        copies_TK = torch.cat(parts)
        table_VE = torch.zeros(model.config.vocab_size, model.config.n_routed_experts, device=device)
        ones = torch.ones_like(copies_TK, dtype=table_VE.dtype)
        table_VE.index_put_((tokens_T[:, None].expand_as(copies_TK), copies_TK), ones, accumulate=True)
        routing[layer] = routing_information(table_VE)
    named = {"weights": weights, "routing": routing}
    return {name: {str(layer): round(value, 4) for layer, value in by.items()} for name, by in named.items()}


def measure_decode_speed(
    model: DeepseekV3 | StockModel, ids_T: Tensor, *, new_tokens: int = 64, runs: int = 3
) -> float:
    """Greedy tokens per second of one sequence after the prompt `ids_T`: the median run, prefill left out."""
    room = model.config.max_position_embeddings - len(ids_T)
    speeds = []
    for _ in range(runs):
        tokens = stream(
            model, ids_T[None].to(next(model.parameters()).device), max_new_tokens=min(new_tokens + 1, room)
        )
        next(tokens)  # the prefill and the first token
        start = time.perf_counter()
        count = sum(1 for _ in tokens)
        speeds.append(count / (time.perf_counter() - start))
    return statistics.median(speeds)
