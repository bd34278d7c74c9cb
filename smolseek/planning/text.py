"""A plan as text."""

from __future__ import annotations

import dataclasses
from typing import Any

from smolseek.conversion.sizes import ATTENTION_FIELDS
from smolseek.machine import Machine
from smolseek.planning.decoding import FASTER
from smolseek.planning.memory import TrainingMemory
from smolseek.planning.plans import Cost, Plan

_BUSY = 0.1  # share of the processors that others take while they are measured, to be told


def render(plan: Plan) -> str:
    """The plan as text."""
    before, after, config = plan.source, plan.target, plan.config
    context, tokens = plan.max_context_tokens, f"{plan.heal_tokens:,} tokens"
    cache = f"{before.cache_bytes_per_token:,} -> {after.cache_bytes_per_token:,} bytes ({plan.cache_share:.1%})"
    lines = [
        ("attention", ", ".join(f"{name} {config[name]}" for name in ATTENTION_FIELDS if config[name] is not None)),
        ("MLP", _experts(config)),
        (
            "parameters",
            f"{before.total_parameters:,} -> {after.total_parameters:,} ({after.active_parameters:,} active)",
        ),
        ("cache per token", cache),
        (f"at {context:,}", f"{_gb(before.cache_bytes_at_max_context)} -> {_gb(after.cache_bytes_at_max_context)}"),
        ("smaller cache", f"{1 / plan.cache_share:.1f} times the tokens or sequences in the same memory"),
        ("decoding", _speed(plan)),
        ("this machine", _rates(plan.machine)),
        ("convert", _cost(plan.convert)),
        *_stages(plan),
        ("heal", f"{tokens}: {_cost(plan.heal)}" + f" in each of {plan.processes}" * (plan.processes > 1)),
        ("  of which", _memory(plan.heal_memory)),
        ("profile", plan.profile),
        *plan.runtimes.items(),
    ]
    return "\n".join(f"{name:16} {text}" for name, text in lines)


def _memory(memory: TrainingMemory) -> str:
    """The parts of a process's memory that are there."""
    return ", ".join(f"{name} {_gb(size)}" for name, size in dataclasses.asdict(memory).items() if size)


def _stages(plan: Plan) -> list[tuple[str, str]]:
    """The parts of a conversion that take a second or more, as a line if there are any."""
    parts = [f"{name} {_duration(part)}" for name, part in plan.stages.items() if part >= 1]
    return [("  of which", ", ".join(parts))] if parts else []


def _speed(plan: Plan) -> str:
    """What the smaller cache buys of time by count, where the rates that it counts with mean something."""
    if plan.machine.others > _BUSY:
        return "not counted while other programs use this machine"
    gains = "/".join(f"{part.gain:.2f}" for part in plan.decoding)
    counts = "/".join(str(part.sequences) for part in plan.decoding)
    told = f"{gains} times the dense speed with {counts} sequences of {plan.max_context_tokens:,} tokens"
    faster = [part for part in plan.decoding if part.faster_from_tokens is not None]
    if not faster:
        return f"by count {told}: memory is gained, not time"
    lengths = ", ".join(f"from {part.faster_from_tokens:,} tokens with {part.sequences}" for part in faster)
    return f"by count, not measured: {told} ({FASTER} times {lengths})"


def _experts(config: dict[str, Any]) -> str:
    """What a token meets of the MLPs."""
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    if dense >= layers:
        return f"dense, {config['intermediate_size']:,} neurons"
    shared, chosen = config["n_shared_experts"], config["num_experts_per_tok"]
    behind = f" behind {dense} dense layers" if dense else ""
    routed, width = config["n_routed_experts"], config["moe_intermediate_size"]
    return f"{shared} shared + {chosen} of {routed} routed experts of {width} neurons{behind}"


def _rates(machine: Machine) -> str:
    place = "" if machine.device == "cpu" else f"{machine.device}, "
    busy = f"; others took {machine.others:.0%} of the processors meanwhile, so idle it is faster"
    rates = f"{place}{machine.flops_per_second / 1e9:,.0f} GFLOP/s, {_gb(machine.bytes_per_second)}/s"
    return rates + busy * (machine.others > _BUSY)


def _cost(cost: Cost) -> str:
    return f"about {_duration(cost.seconds)}, {_gb(cost.memory_bytes)} of memory"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"
