"""AdamW and Muon, the weights that each of them trains, and the learning rate at a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smolseek.config import TrainSettings
from smolseek.numerics.muon import Muon
from smolseek.numerics.schedule import decayed

GROUPS = ("attention", "experts", "router", "norms", "embeddings")
"""Groups of weights; a recipe can give each its own learning rate."""


def weight_group(name: str, parameter: Tensor) -> str:
    """Returns the group that a parameter belongs to; dense MLPs count as experts, the head as an embedding."""
    if ".self_attn." in name:
        return "attention"
    if name.endswith(".mlp.gate.weight"):
        return "router"
    if ".mlp." in name:
        return "experts"
    return "norms" if parameter.dim() <= 1 else "embeddings"


def choose_trained(model: nn.Module, trains: str) -> None:
    """Let only the weights that `trains` names train: all, attention, or experts with their router."""
    chosen = {"attention": {"attention"}, "experts": {"experts", "router"}}.get(trains, set(GROUPS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(weight_group(name, parameter) in chosen)


def build_optimizers(model: nn.Module, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Returns fused AdamW (Loshchilov & Hutter 2019) with β = (0.9, 0.95) for all trained weights.

    With `settings.optimizer` muon: Muon for the matrices of attention and experts, then AdamW for the rest. Weight
    decay is for matrices only. Every parameter group has a `factor` for the learning rate.
    """
    adamw: dict[Any, dict[str, Any]] = {}
    muon: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = weight_group(name, parameter)
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            factor = settings.learning_rate_factors.get(group, 1.0)
            hidden = parameter.dim() > 1 and parameter.numel() > 0 and group in ("attention", "experts")
            groups = muon if settings.optimizer == "muon" and hidden else adamw
            fresh = {"params": [], "weight_decay": decay, "factor": factor}
            groups.setdefault((decay, factor), fresh)["params"].append((name, parameter))
    rest = [group | {"params": [p for _, p in group["params"]]} for group in adamw.values()]
    optimizers: list[torch.optim.Optimizer] = [Muon(muon.values(), lr=settings.learning_rate)] if muon else []
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True))
    return optimizers


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Returns the learning rate at a step: a linear warm-up to the peak, then the peak times `decay`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    return settings.learning_rate * decay(step, settings)


def decay(step: int, settings: TrainSettings) -> float:
    """Returns the share of the peak rate at a step, as `schedule.decayed` shapes it under these settings."""
    return decayed(
        step,
        settings.steps,
        warmup_steps=settings.warmup_steps,
        final_share=settings.final_learning_rate_share,
        shape=settings.schedule,
        decay_share=settings.decay_share,
    )
