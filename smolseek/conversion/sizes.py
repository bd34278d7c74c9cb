"""How wide converted attention is, how many windows and steps a conversion takes. No torch: `plan` reads it too."""

from __future__ import annotations

import math

from smolseek.config import PROSE, SELF, ConvertSettings, DataSettings, check_weights
from smolseek.conversion.expert_sizes import active_share
from smolseek.formats.dense import DenseSource
from smolseek.formats.runtimes import VLLM_HEADS, VLLM_LATENTS

CACHE_SHARE = 0.4
"""Share of the source's cache that a conversion keeps when no sizes are given."""

CALIBRATION_BATCH_TOKENS = {"cpu": 256, "cuda": 1024, "mps": 1024}
"""Tokens in one backward pass of the calibration, whose activations in all layers are held, by device."""
SPILL_BYTES = 2**30
"""Second moments of all layers larger than this are kept in files."""
REFINE_BATCH_TOKENS = 1024
"""Tokens in a step of layer-wise refinement. Half as many steps of twice as many tokens cost the same and end higher
(LOG.md)."""
OPENINGS, OPENING_BATCH_TOKENS = 10_240, 256
"""How many of the shortest texts a large source's refinement reads, and their tokens in a step, beside its windows."""
BEGINNINGS, BEGINNING_TOKENS, BEGINNING_BATCH_TOKENS = 4096, 4, 128
"""How many short windows its end-to-end stage reads, their length, and their tokens in a step, beside its windows."""
DISTILL_BATCH_TOKENS = {True: 2048, False: 1024}
"""Tokens in a step of the end-to-end stage: of a small source, and of others, whose twice as many steps of half as many
tokens cost the same and end lower (LOG.md)."""
CARVE_TOKENS = 16384
"""Tokens by which an MLP is carved in closed form: every k-th, with the largest k that leaves at least so many."""
CARVE_BATCH_TOKENS = {True: 2048, False: 1024}
"""Tokens in a step of the refinement of a carved MLP: of a small source, and of others."""
_CARVE_STEPS = {True: 1, False: 6}
"""Steps of that refinement for each step of an attention block; as many would be too few for a large MLP (LOG.md)."""
DISTILL_STEPS = 600
"""Most steps of the end-to-end stage when their number is not given."""
DISTILL_WORK = DISTILL_STEPS * 4_000_000
"""Most steps times parameters of that stage: about ten minutes on 2 CPU cores."""
_SMALL = DISTILL_WORK // 100
"""Sources of at most so many parameters, 24 million, are trained longer, and on all weights."""
_REFINE_STEPS = {True: 300, False: 40}
"""Steps of layer-wise refinement when their number is not given: of a small source, and of others."""
_LARGE_DISTILL_STEPS = 60
"""Steps of that stage for a source that is not small, at half its cache and above (`_stretch`)."""
_UNSTRETCHED_SHARE, _MOST_STRETCHED = 0.5, 4.0
_LARGEST_DISTILLED = 500_000_000
"""Sources of more parameters have no end-to-end stage unless it is asked for: it holds both models in fp32, and an
optimizer."""
_WINDOW_TOKENS = {True: 512, False: 256}
"""Length at which blocks are refined and losses compared: of a small source, and of others. Twice as many windows of
half the length teach a large one more in less time, also about longer ones (LOG.md)."""
_STREAM_NUMBERS = {True: 2**26, False: 2**24}
"""Most numbers of the residual stream while layers are refined: of a small source, whose end-to-end stage meets the
same windows again and again, and of others."""
_MORE_WINDOW_TOKENS = 1024
"""Length of the windows of named text in a large source's end-to-end stage. One of them in a step teaches more than
four of a quarter its length, also about short ones (LOG.md)."""

JUDGED_WINDOWS = {True: 8, False: 16}
"""Windows to judge by: of a small source, and of others, whose windows are half as long."""
WRITTEN_TOKENS = 2**16
"""Most tokens of calibration text that the model writes itself: on a CPU some hundred a second."""

_WIDE_HEAD = 64
"""From this head_dim on, half a head of rotated key has slots enough for all frequencies (`rope_plans`)."""
_WIDEST_HEAD = 4096
ATTENTION_FIELDS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
"""Fields that size latent attention, in the settings and in config.json."""


def distill_steps(source: DenseSource, settings: ConvertSettings) -> int:
    """Returns the steps of the end-to-end stage; those not given follow from the source's size, never the machine's.

    Raises:
        ValueError: a number of steps is negative, or there are no calibration windows.
    """
    _check_amounts(settings)
    if settings.distill_steps is not None:
        return settings.distill_steps
    parameters = _parameters(source)
    if not refine_steps(source, settings) or parameters > _LARGEST_DISTILLED:
        return 0
    if is_small(source):
        return min(DISTILL_STEPS, DISTILL_WORK // parameters)
    return round(_LARGE_DISTILL_STEPS * _stretch(source, settings))


def _stretch(source: DenseSource, settings: ConvertSettings) -> float:
    """Returns the factor of a large source's end-to-end steps and text: 1 from half the cache on, up to 4 below.

    It is the square of half the cache over what is kept, and of all neurons over those that a token meets: a model that
    keeps less is farther from the dense one when the stage begins (LOG.md).
    """
    if is_small(source):
        return 1.0
    times = 1.0
    if not settings.exact:
        times = max(times, _UNSTRETCHED_SHARE * source.cache_numbers / sum(latent_sizes(source, settings)))
    if settings.experts == "carve":
        times /= active_share(source.intermediate_size, source.num_hidden_layers, settings)
    return min(times**2, _MOST_STRETCHED)


def refine_steps(source: DenseSource, settings: ConvertSettings) -> int:
    """Returns the steps of layer-wise refinement; those not given follow from the source's size."""
    return _REFINE_STEPS[is_small(source)] if settings.refine_steps is None else settings.refine_steps


def carve_steps(source: DenseSource, settings: ConvertSettings) -> int:
    """Returns the steps of the refinement of a carved MLP."""
    return refine_steps(source, settings) * _CARVE_STEPS[is_small(source)]


def matched_layers(source: DenseSource) -> range:
    """Returns the layers whose outputs the end-to-end stage compares: every fifth but the last; of a small source none.

    The many steps of a small source were good without (LOG.md).
    """
    return range(0) if is_small(source) else range(4, source.num_hidden_layers - 1, 5)


def is_small(source: DenseSource) -> bool:
    """Returns whether a source has at most 24 million parameters."""
    return _parameters(source) <= _SMALL


def _parameters(source: DenseSource) -> int:
    hidden, neurons, layers = source.hidden_size, source.intermediate_size, source.num_hidden_layers
    return source.vocab_size * hidden + layers * hidden * (4 * hidden + 3 * neurons)


def _check_amounts(settings: ConvertSettings) -> None:
    """Raises ValueError if a number of steps is negative, or there are no calibration windows."""
    for field in ("refine_steps", "distill_steps"):
        if (getattr(settings, field) or 0) < 0:
            raise ValueError(f"{field} {getattr(settings, field)}: must be 0 or more; 0 leaves the stage out")
    for field, least in (("calibration_windows", 1), ("calibration_window_tokens", 2)):
        if getattr(settings, field) < least:
            raise ValueError(f"{field} {getattr(settings, field)}: must be {least} or more")


def window_lengths(source: DenseSource, settings: ConvertSettings) -> tuple[int, int]:
    """Returns the tokens of a window for the moments, and of a window for refinement (whole windows of the former).

    Raises:
        ValueError: as `distill_steps` does.
    """
    _check_amounts(settings)
    limit = source.max_position_embeddings
    tokens = min(settings.calibration_window_tokens, limit)
    return tokens, max(1, min(_WINDOW_TOKENS[is_small(source)], limit) // tokens) * tokens


def wanted_windows(source: DenseSource, settings: ConvertSettings) -> int:
    """Returns how many refinement windows of text the calibration and the refinement want together."""
    tokens, length = window_lengths(source, settings)
    wanted = -(-settings.calibration_windows * tokens // length)
    if refine_steps(source, settings):
        numbers = _STREAM_NUMBERS[is_small(source)] * _stretch(source, settings)
        wanted = max(wanted, int(numbers) // source.hidden_size // length)
    return wanted


def unnamed_text(source: DenseSource) -> tuple[str, ...]:
    """Returns the calibration text where none is named: what the model writes, and of a large source as much prose.

    A small source knows its own kind of text, and little else.
    """
    return (SELF,) if is_small(source) else (SELF, PROSE)


def own_share(source: DenseSource, settings: ConvertSettings) -> float:
    """Returns the share of the refinement windows that the model writes.

    Raises:
        ValueError: as `check_weights` does.
    """
    if not settings.calibration:
        return 1 / len(unnamed_text(source))
    data = DataSettings(train=settings.calibration, weights=settings.calibration_weights)
    check_weights(data, "calibration", "calibration_weights")
    weights = data.weights or (1.0,) * len(data.train)
    return sum(weight for name, weight in zip(data.train, weights, strict=True) if name == SELF) / sum(weights)


def more_windows(source: DenseSource, settings: ConvertSettings) -> tuple[int, int]:
    """Returns how many windows of named text the end-to-end stage reads beside those of refinement, and their tokens.

    A large source's few steps then hardly meet a window twice: the same steps on more text end lower (LOG.md). What the
    model writes takes time, so there is no more of it. The windows are several times as long as those of refinement,
    which are pieces of them. There are none where refinement reads as much.
    """
    _, length = window_lengths(source, settings)
    long = max(1, min(_MORE_WINDOW_TOKENS, source.max_position_embeddings) // length) * length
    if is_small(source) or (settings.exact and settings.experts != "carve"):
        return 0, long
    refined, own = wanted_windows(source, settings) * length, own_share(source, settings)
    named = distill_steps(source, settings) * DISTILL_BATCH_TOKENS[False] - int(refined * own)
    return (named // long if own < 1 and named > refined * (1 - own) else 0), long


def cache_sizes(source: DenseSource, share: float, profile: str, rope_dim: int | None = None) -> tuple[int, int]:
    """Returns (kv_lora_rank, qk_rope_head_dim) that keep about `share` of the source's cache.

    Under the profile vllm it is the nearest of vLLM's sizes that fit the source. Otherwise the rotated key is as wide
    as a head of the source, or half as wide from 64 on, where that takes at most half of what is kept, else the widest
    divisor that does (LOG.md). `rope_dim` fixes it. The latent gets the rest, in whole 8s (4s in a small cache).
    """
    head_dim, numbers = source.head_dim, source.cache_numbers
    if profile == "vllm":
        fitting = [sizes for sizes in VLLM_LATENTS if sum(sizes) <= numbers and sizes[0] <= source.hidden_size]
        rank, width = min(fitting or VLLM_LATENTS[:1], key=lambda sizes: abs(sum(sizes) - share * numbers))
        return rank, rope_dim or width
    if rope_dim is None:
        widest = min(head_dim if head_dim < _WIDE_HEAD else head_dim // 2, int(share * numbers / 2))
        rope_dim = next((d for d in range(widest // 2 * 2, 0, -2) if head_dim % d == 0), 2)
    unit = 8 if share * numbers >= 64 else 4
    rank = unit * round((share * numbers - rope_dim) / unit)
    return min(rank, source.hidden_size, numbers), rope_dim


def latent_sizes(source: DenseSource, settings: ConvertSettings) -> tuple[int, int]:
    """Returns (kv_lora_rank, qk_rope_head_dim), given or chosen for a share of the cache.

    Raises:
        ValueError: a size is impossible for this source, or both a size and a share are given.
    """
    share, rope_dim, rank = settings.cache, settings.qk_rope_head_dim, settings.kv_lora_rank
    if rope_dim is not None and (not 2 <= rope_dim <= _WIDEST_HEAD or rope_dim % 2):
        raise ValueError(
            f"qk_rope_head_dim {rope_dim}: must be even, for it holds pairs; use 2, 4, 6 and so on to {_WIDEST_HEAD}"
        )
    if share is not None and rank is not None:
        raise ValueError(f"cache {share}: it chooses the kv_lora_rank, which is given too; leave one of them out")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"cache {share}: is a share of the source's cache; use a number above 0 and up to 1")
    numbers = source.cache_numbers
    chosen, rope_dim = cache_sizes(source, share or CACHE_SHARE, settings.profile, rope_dim)
    if share is not None and chosen < 1:
        least = math.ceil(100 * (rope_dim + 8) / numbers) / 100
        raise ValueError(
            f"cache {share}: {share * numbers:.0f} numbers a token and layer, of which the rotated key takes "
            f"{rope_dim}, leave no latent; use {least:g} or more, or a smaller qk_rope_head_dim"
        )
    largest = min(source.hidden_size, numbers)
    if settings.profile == "vllm":
        return _vllm_rank(chosen, rank, largest, numbers), rope_dim
    if rank is None:
        rank = chosen if share is not None else max(chosen, min(8, largest))
    if not 1 <= rank <= largest:
        raise ValueError(f"kv_lora_rank {rank}: this source has at most {largest} directions; use 1 to {largest}")
    return rank, rope_dim


def _vllm_rank(chosen: int, given: int | None, largest: int, numbers: int) -> int:
    """Returns the latent's rank under the profile vllm; one that is given may be wider than the source's directions.

    Raises:
        ValueError: vLLM does not take the given rank, or none is given and its least cache is larger than the source's.
    """
    ranks = [rank for rank, _ in VLLM_LATENTS]
    told = f"{', '.join(map(str, ranks[:-1]))} or {ranks[-1]}"
    if given is not None and given not in ranks:
        raise ValueError(f"kv_lora_rank {given}: vLLM takes {told} only; use one of them, or choose another profile")
    least = sum(VLLM_LATENTS[0])
    if given is None and (chosen > largest or least > numbers):
        raise ValueError(
            f"profile vllm: the least that vLLM caches is {least} numbers a token and layer, and this source caches "
            f"{numbers} with {largest} directions, so nothing is gained; choose another profile, or give kv_lora_rank "
            f"{told}, which is padded with zeros"
        )
    return chosen if given is None else given


def head_sizes(source: DenseSource, settings: ConvertSettings, rope_dim: int) -> tuple[int, int]:
    """Returns (qk_nope_head_dim, v_head_dim): as given, the source's head_dim, or the smallest of vLLM's that hold it.

    Raises:
        ValueError: a size is not positive or wider than any head, or vLLM's kernels have none that fits.
    """
    head_dim, given = source.head_dim, (settings.qk_nope_head_dim, settings.v_head_dim)
    for field, size in zip(("qk_nope_head_dim", "v_head_dim"), given, strict=True):
        if size is not None and not 1 <= size <= _WIDEST_HEAD:
            raise ValueError(f"{field} {size}: must be 1 to {_WIDEST_HEAD}; use {head_dim}, or leave it out")
    if settings.profile != "vllm":
        nope_dim, v_dim = (head_dim if size is None else size for size in given)
        return nope_dim, v_dim
    for nope_dim, rope, v_dim in VLLM_HEADS:
        fits = (given[0] or nope_dim, given[1] or v_dim, rope_dim) == (nope_dim, v_dim, rope)
        if fits and (given[0] or nope_dim >= head_dim) and (given[1] or v_dim >= head_dim):
            return nope_dim, v_dim
    raise ValueError(
        f"head sizes of head_dim {head_dim} with those given (nope {given[0]}, rope {rope_dim}, v {given[1]}): vLLM "
        f"takes (nope, rope, v) of {', '.join(map(str, VLLM_HEADS))} only; leave them out, or choose another profile"
    )
