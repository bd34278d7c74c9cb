"""How a dense MLP is divided into experts: their numbers and widths; no torch."""

from __future__ import annotations

from typing import Any

from smolseek.config import ConvertSettings

ACTIVE_SHARE = 0.75
"""Share of the dense neurons that a token meets after carving, when neither it nor the experts per token are given."""
COPIES = 4
"""Copies of the routed neurons that upcycling makes, when the number of routed experts is not given."""
_CARVED_PARTS = 32  # fine grain keeps more of the model (LOG.md)
_WIDTH_MULTIPLE = 8  # torch's grouped matmul wants strides of 16 bytes, in bf16 too
_MOST_ROUTED = 4096  # a layer of copies; the whole of it is in memory
_EXPERT_FIELDS = (
    "n_shared_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
)


def padded_width(neurons: int) -> int:
    """Returns the moe_intermediate_size that stock runtimes can run: `neurons` and silent ones up to a multiple."""
    return -(-neurons // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def mlp_fields(neurons: int, layers: int, settings: ConvertSettings) -> dict[str, Any]:
    """Returns the MLP fields of config.json; without experts all layers are dense and nothing reads the expert fields.

    Raises:
        ValueError: numbers that do not fit the source's neurons or layers, or that need another kind of experts.
    """
    experts, dense_layers = settings.experts, settings.first_k_dense_replace
    given = [field for field in _EXPERT_FIELDS if getattr(settings, field)]
    if not 0 <= dense_layers < layers:
        raise ValueError(f"first_k_dense_replace {dense_layers}: leaves no layer with experts; use 0 to {layers - 1}")
    if experts == "none" and given:
        raise ValueError(f"{given[0]} {getattr(settings, given[0])}: needs experts; set experts to upcycle or carve")
    if experts != "carve" and settings.active is not None:
        raise ValueError(f"active {settings.active}: needs carved experts; set experts to carve, or leave it out")
    if experts == "upcycle":
        shared, routed, chosen, width = _upcycle(neurons, settings)
    elif experts == "carve":
        shared, routed, chosen, width = _carve(neurons, settings)
    else:
        shared, routed, chosen, width = 1, 2, 2, neurons
    return {
        "n_shared_experts": shared,
        "n_routed_experts": routed,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width if experts == "none" else padded_width(width),
        "n_group": routed // chosen if experts == "upcycle" else 1,
        "topk_group": 1,
        "routed_scaling_factor": float(chosen),
        "first_k_dense_replace": layers if experts == "none" else dense_layers,
    }


def active_share(neurons: int, layers: int, settings: ConvertSettings) -> float:
    """Returns the share of all experts, shared ones included, that a token meets; carved, it is that of the neurons.

    Raises:
        ValueError: as `mlp_fields` does.
    """
    fields = mlp_fields(neurons, layers, settings)
    shared, routed, chosen = (fields[name] for name in ("n_shared_experts", "n_routed_experts", "num_experts_per_tok"))
    return float((shared + chosen) / (shared + routed))


def _upcycle(neurons: int, settings: ConvertSettings) -> tuple[int, int, int, int]:
    """Returns shared experts, routed experts, routed experts per token and neurons of one expert, before padding.

    A token meets `neurons` neurons as before: those of the shared experts and those of one copy of the rest.
    """
    shared, chosen = settings.n_shared_experts, settings.num_experts_per_tok
    width = settings.moe_intermediate_size
    if width is None and shared is not None and chosen is not None:
        width = neurons // max(1, shared + chosen)
    elif width is None:
        width = next((neurons // parts for parts in (8, 4) if neurons % parts == 0), None)
    width = _check_width(neurons, width)
    met = neurons // width
    if chosen is not None and not 2 <= chosen <= met:
        raise ValueError(
            f"num_experts_per_tok {chosen}: a token meets {met} experts of {width} neurons; use 2 to {met}"
        )
    if chosen is None:
        chosen = met // 2 if shared is None else met - shared
    shared = met - chosen if shared is None else shared
    routed = COPIES * chosen if settings.n_routed_experts is None else settings.n_routed_experts
    if chosen < 2 or shared < 0 or shared + chosen != met:
        raise ValueError(
            f"{shared} shared + {chosen} routed experts of {width} neurons: must meet {neurons} neurons, at least 2 of "
            f"them routed; let n_shared_experts + num_experts_per_tok be {met}"
        )
    if not chosen <= routed <= _MOST_ROUTED or routed % chosen:
        raise ValueError(
            f"n_routed_experts {routed}: must be whole copies of {chosen} experts; use a multiple of {chosen} up to "
            f"{_MOST_ROUTED:,}"
        )
    return shared, routed, chosen, width


def _carve(neurons: int, settings: ConvertSettings) -> tuple[int, int, int, int]:
    """Returns shared experts, routed experts, routed experts per token and neurons of one expert, before padding.

    All experts together hold the dense neurons, and silent ones where the width does not divide them. A quarter is
    shared; with its routed experts a token meets the share `active`.
    """
    shared, routed, width = settings.n_shared_experts, settings.n_routed_experts, settings.moe_intermediate_size
    if width is None:
        asked = _CARVED_PARTS if routed is None else routed + (round(routed / 3) if shared is None else shared)
        width = -(-neurons // max(1, asked))
        width = width if routed is not None else padded_width(width)
    if not 1 <= width <= neurons // 2:
        raise ValueError(f"moe_intermediate_size {width}: must cut {neurons} neurons; use 1 to {neurons // 2}")
    parts = -(-neurons // width)
    if shared is None:
        shared = max(1, round(parts / 4)) if routed is None else parts - routed
    routed = parts - shared if routed is None else routed
    if shared < 0 or routed < 2 or shared + routed != parts:
        raise ValueError(
            f"{shared} shared + {routed} routed experts of {width} neurons: must be the {neurons} neurons, at least 2 "
            f"experts of them routed; let n_shared_experts + n_routed_experts be {parts}"
        )
    return shared, routed, _carved_per_token(parts, shared, settings), width


def _carved_per_token(parts: int, shared: int, settings: ConvertSettings) -> int:
    """Returns num_experts_per_tok: as given, or so many that they and the shared experts make the share `active`."""
    active, chosen = settings.active, settings.num_experts_per_tok
    if active is not None and chosen is not None:
        raise ValueError(f"active {active}: it chooses num_experts_per_tok, which is given too; leave one of them out")
    if active is not None and not 0 < active <= 1:
        raise ValueError(f"active {active}: is a share of the dense neurons; use a number above 0 and up to 1")
    if chosen is None:
        chosen = round((active or ACTIVE_SHARE) * parts) - shared
        if active is not None and chosen < 1:
            raise ValueError(
                f"active {active}: the {shared} shared of {parts} experts leave none to route; use "
                f"{(shared + 1) / parts:.3g} or more, or fewer n_shared_experts"
            )
        chosen = max(1, chosen)
    if not 1 <= chosen <= parts - shared:
        raise ValueError(
            f"num_experts_per_tok {chosen}: there are {parts - shared} routed experts; use 1 to {parts - shared}"
        )
    return chosen


def _check_width(neurons: int, width: int | None) -> int:
    if width is None or width < 1 or neurons % width:
        divisors = ", ".join(str(d) for d in range(1, neurons // 2 + 1) if neurons % d == 0)
        raise ValueError(
            f"moe_intermediate_size {width or '(not given)'}: experts must divide intermediate_size {neurons}; "
            f"use one of {divisors}"
        )
    return width
