"""Models built on torch's meta device, without memory: how they get it, and random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from smolseek.model.balance import routers, take_expert_counts
from smolseek.model.stock import StockModel
from smolseek.model.transformer import DeepseekV3
from smolseek.numerics.shards import own_part

AnyModel = TypeVar("AnyModel", DeepseekV3, StockModel)
Shard = Callable[[Any], Any]
"""Divides a model among processes, as `training.processes.Processes.shard` does."""


def keep_whole(model: Any) -> Any:
    """Returns the model as it is: the `Shard` of a single process."""
    return model


def take_memory(model: AnyModel, device: str | torch.device) -> AnyModel:
    """Gives a model memory on `device`, of a divided one for this process's part, and returns it.

    Buffers that no checkpoint holds (rope tables, expert counts) get their values; all other values are arbitrary.
    """
    model._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t)
    if isinstance(model, DeepseekV3):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
        take_expert_counts(model)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
    else:
        _fill_buffers(model.model)
        model.model.tie_weights()
    return model


def _fill_buffers(stock: Any) -> None:
    """Lets transformers compute the buffers of its model that no checkpoint holds.

    It initialises whatever has no mark that it has its values.
    """
    for tensor in stock.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    stock.initialize_weights()


@torch.no_grad()
def draw_weights(
    model: DeepseekV3 | StockModel, seed: int, *, device: str | torch.device = "cpu", shard: Shard = keep_whole
) -> DeepseekV3 | StockModel:
    """Gives a model without memory random weights and returns it, divided by `shard`.

    Matrices are drawn from normal(0, initializer_range), norms are 1, biases and the embedding of padding 0, as
    transformers does. They are drawn on the CPU in the order of their names, one whole tensor at a time, of which each
    process keeps its part. So a seed gives the same weights to any number of processes.
    """
    model = take_memory(shard(model), device)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        part, bounds = own_part(parameter)
        if parameter.dim() > 1:
            drawn = torch.empty(parameter.shape).normal_(0.0, model.config.initializer_range)
            if name.endswith("embed_tokens.weight") and model.config.pad_token_id is not None:
                drawn[model.config.pad_token_id] = 0
            part.copy_(drawn[bounds])
        else:
            part.fill_(0.0 if name.endswith(".bias") else 1.0)
    for router in routers(model).values():
        router.e_score_correction_bias.zero_()
    return model.eval()
