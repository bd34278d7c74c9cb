"""Sizes of latent attention and lengths of the stages: shares of the cache, profiles, steps, refusals."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolseek.config import ConvertSettings
from smolseek.conversion.sizes import (
    CACHE_SHARE,
    cache_sizes,
    carve_steps,
    distill_steps,
    more_windows,
    own_share,
    refine_steps,
    unnamed_text,
    wanted_windows,
    window_lengths,
)
from smolseek.conversion.target import target_config
from smolseek.formats.dense import read_source
from tests.configs import SMOLLM2_135M, TINY


@given(
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 32, 64, 96, 128]),
    hidden=st.integers(4, 40).map(lambda n: 64 * n),
)
def test_default_sizes_keep_their_share_of_the_cache(kv_heads: int, group: int, head_dim: int, hidden: int) -> None:
    heads = {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = target_config(read_source({**TINY, **heads, "hidden_size": hidden}), ConvertSettings())
    rank, rope_dim, numbers = config["kv_lora_rank"], config["qk_rope_head_dim"], 2 * kv_heads * head_dim
    assert rope_dim % 2 == 0 and head_dim % rope_dim == 0 and rope_dim <= max(2, CACHE_SHARE * numbers / 2)
    assert rank % (8 if CACHE_SHARE * numbers >= 64 else 4) == 0 or rank == hidden
    assert 8 <= rank <= min(hidden, numbers)
    if 8 < rank < hidden:
        assert abs(rank + rope_dim - CACHE_SHARE * numbers) <= 4


def test_a_share_of_the_cache_picks_the_sizes() -> None:
    """Heads, KV heads and head_dim are 6, 2 and 32; 8, 4 and 8; 9, 3 and 32."""
    first, second, third = (
        read_source(TINY | {"num_attention_heads": h, "num_key_value_heads": g, "head_dim": d, "hidden_size": 192})
        for h, g, d in ((6, 2, 32), (8, 4, 8), (9, 3, 32))
    )
    shares = (0.75, 0.5, 0.375, 0.25)
    assert [cache_sizes(first, share, "portable") for share in shares] == [(64, 32), (32, 32), (32, 16), (16, 16)]
    assert [cache_sizes(second, share, "portable") for share in shares] == [(40, 8), (24, 8), (16, 8), (8, 8)]
    assert [cache_sizes(third, share, "portable") for share in shares] == [(112, 32), (64, 32), (40, 32), (32, 16)]
    wide = [cache_sizes(read_source(SMOLLM2_135M), share, "portable") for share in (0.75, 0.5, 0.3125, 0.125)]
    assert wide == [(256, 32), (160, 32), (88, 32), (32, 16)]


@given(share=st.floats(0.2, 1.0), head_dim=st.sampled_from([16, 24, 64, 80, 96]), kv_heads=st.integers(2, 8))
def test_the_cache_is_the_share_asked_for(share: float, head_dim: int, kv_heads: int) -> None:
    heads = {"num_attention_heads": kv_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = target_config(read_source(TINY | heads | {"hidden_size": 4096}), ConvertSettings(cache=share))
    kept = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert abs(kept - share * 2 * kv_heads * head_dim) <= 4


def test_a_cache_share_and_a_rope_width_leave_the_rank() -> None:
    config = target_config(read_source(SMOLLM2_135M), ConvertSettings(cache=0.5, qk_rope_head_dim=16))
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (176, 16)


@pytest.mark.parametrize(
    ("head_dim", "heads"), [(32, (64, 64, 128)), (64, (64, 64, 128)), (80, (128, 64, 128)), (160, (192, 64, 256))]
)
def test_profile_vllm_takes_its_head_sizes_and_an_untied_head(head_dim: int, heads: tuple[int, ...]) -> None:
    source = TINY | {"head_dim": head_dim, "hidden_size": 640}
    config = target_config(read_source(source), ConvertSettings(profile="vllm", kv_lora_rank=448))
    assert config["kv_lora_rank"] == 448
    assert tuple(config[f] for f in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")) == heads
    assert config["tie_word_embeddings"] is False
    given = {"kv_lora_rank": 256, "qk_nope_head_dim": 192, "v_head_dim": 256}
    wide = target_config(read_source(source), ConvertSettings(profile="vllm", **given))
    assert given.items() <= wide.items()


@pytest.mark.parametrize(
    ("kv_heads", "share", "rank"), [(3, None, 256), (5, 0.5, 256), (8, None, 256), (8, 0.5, 448), (8, 0.6, 512)]
)
def test_profile_vllm_takes_the_nearest_of_its_caches(kv_heads: int, share: float | None, rank: int) -> None:
    heads = {"num_attention_heads": 2 * kv_heads, "num_key_value_heads": kv_heads, "head_dim": 64}
    settings = ConvertSettings(profile="vllm", cache=share)
    config = target_config(read_source(TINY | heads | {"hidden_size": 1024}), settings)
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (rank, 64)


def test_profile_vllm_takes_no_cache_that_the_source_cannot_fill() -> None:
    narrow = read_source(TINY | {"num_key_value_heads": 4, "head_dim": 64, "hidden_size": 320})
    assert cache_sizes(narrow, 1.0, "vllm") == (256, 64)  # 448 + 64 are all 512 numbers, of 320 directions


def test_smollm2_sizes() -> None:
    config = target_config(read_source(SMOLLM2_135M), ConvertSettings())
    wanted = {"qk_rope_head_dim": 32, "kv_lora_rank": 120, "qk_nope_head_dim": 64, "v_head_dim": 64}
    assert {name: config[name] for name in wanted} == wanted
    assert config["first_k_dense_replace"] == config["num_hidden_layers"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"qk_rope_head_dim": 3}, "qk_rope_head_dim 3.*even"),
    ({"qk_nope_head_dim": 0}, "qk_nope_head_dim 0"),
    ({"v_head_dim": -1}, "v_head_dim -1"),
    ({"v_head_dim": 2**40}, "v_head_dim 1099511627776: must be 1 to 4096"),
    ({"cache": 0.0}, "cache 0.0"),
    ({"cache": 1.5}, "cache 1.5"),
    ({"cache": 0.04}, "cache 0.04.*leave no latent; use 0."),
    ({"cache": 0.5, "kv_lora_rank": 8}, "cache 0.5.*kv_lora_rank"),
    ({"profile": "vllm", "v_head_dim": 64, "kv_lora_rank": 256}, "vLLM takes"),
    ({"profile": "vllm", "qk_rope_head_dim": 8, "kv_lora_rank": 256}, "vLLM takes"),
    ({"profile": "vllm", "kv_lora_rank": 24}, "kv_lora_rank 24: vLLM takes 256, 448 or 512 only"),
    ({"profile": "vllm", "cache": 0.5}, "this source caches 64 with 64 directions.*kv_lora_rank 256, 448 or 512"),
    ({"qk_rope_head_dim": 0}, "qk_rope_head_dim 0"),
    ({"qk_rope_head_dim": 98_650_412}, "qk_rope_head_dim 98650412.*and so on to 4096"),
    ({"kv_lora_rank": 0}, "kv_lora_rank 0.*1 to 64"),
    ({"kv_lora_rank": 65}, "kv_lora_rank 65.*1 to 64"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_sizes_that_do_not_fit_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        target_config(read_source(TINY), ConvertSettings(**fields))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("layers", "fields", "steps"),
    [
        (2, {}, 600),
        (400, {}, 172),
        (2000, {"cache": 0.5}, 60),
        (2000, {"cache": 1.0}, 60),
        (2000, {"cache": 0.25}, 240),
        (2000, {"cache": 0.125}, 240),
        (2000, {"exact": True}, 60),
        (2000, {"exact": True, "experts": "carve", "active": 0.75}, 107),
        (10_000, {"refine_steps": 0}, 0),
        (2, {"refine_steps": 0}, 0),
        (2000, {"distill_steps": 7}, 7),
        (2, {"refine_steps": 0, "distill_steps": 7}, 7),
    ],
)
def test_steps_of_the_end_to_end_stage_follow_from_the_size(layers: int, fields: dict[str, Any], steps: int) -> None:
    assert distill_steps(read_source(TINY | {"num_hidden_layers": layers}), ConvertSettings(**fields)) == steps


def test_a_carved_mlp_of_a_large_source_takes_six_steps_for_each_of_attention() -> None:
    for layers, factor in ((2, 1), (2000, 6)):
        source, settings = read_source(TINY | {"num_hidden_layers": layers}), ConvertSettings(refine_steps=7)
        assert carve_steps(source, settings) == 7 * factor


def test_a_smaller_cache_takes_more_text_and_at_most_four_times_as_much() -> None:
    large = read_source(TINY | {"num_hidden_layers": 2000})
    half, quarter, eighth = (wanted_windows(large, ConvertSettings(cache=share)) for share in (0.5, 0.25, 0.125))
    assert quarter == eighth == 4 * half


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"cache": 0.5}, 60),
        ({"cache": 0.25}, 240),
        ({"exact": True, "experts": "carve"}, 107),
        ({"experts": "carve"}, 170),
    ],
)
def test_the_steps_of_a_large_source_hardly_meet_a_window_twice(fields: dict[str, Any], steps: int) -> None:
    source, settings = read_source(SMOLLM2_135M), ConvertSettings(**fields)
    own = wanted_windows(source, settings) * 256 // 2
    more, tokens = more_windows(source, settings)
    assert tokens == 1024 and 0 <= steps * 1024 - own - more * tokens < 1024


@pytest.mark.parametrize(
    "fields",
    [
        {"refine_steps": 0},
        {"exact": True},
        {"exact": True, "experts": "upcycle"},
        {"calibration": ("self",)},
        {"distill_steps": 1},  # refinement reads as much
    ],
)
def test_no_more_text_is_read_without_an_end_to_end_stage_or_where_the_model_writes_it(fields: dict[str, Any]) -> None:
    assert more_windows(read_source(SMOLLM2_135M), ConvertSettings(**fields))[0] == 0
    assert more_windows(read_source(TINY), ConvertSettings())[0] == 0  # a small source meets the same text many times


def test_windows_are_whole_pieces_and_no_longer_than_the_source_reads() -> None:
    short = read_source(SMOLLM2_135M | {"max_position_embeddings": 600})
    assert more_windows(short, ConvertSettings())[1] == 512


def test_prose_stands_beside_what_a_large_source_writes() -> None:
    large, small = read_source(SMOLLM2_135M), read_source(TINY)
    assert unnamed_text(large) == ("self", "builtin:prose") and unnamed_text(small) == ("self",)
    assert own_share(large, ConvertSettings()) == 0.5 and own_share(small, ConvertSettings()) == 1.0
    named = ConvertSettings(calibration=("a.txt", "self"), calibration_weights=(3.0, 1.0))
    assert own_share(large, named) == 0.25 and own_share(large, ConvertSettings(calibration=("a.txt",))) == 0


@pytest.mark.parametrize(("weights", "words"), [((0.0, 0.0), "must be above 0"), ((1.0,), "1 for 2 sources")])
def test_weights_that_fit_no_text_are_refused_before_they_are_counted(weights: Any, words: str) -> None:
    settings = ConvertSettings(calibration=("self", "a.txt"), calibration_weights=weights)
    with pytest.raises(ValueError, match=words):
        own_share(read_source(SMOLLM2_135M), settings)


def test_a_source_of_more_than_500_million_parameters_has_no_end_to_end_stage() -> None:
    source = read_source(TINY | {"num_hidden_layers": 2000, "intermediate_size": 16384})
    assert (
        distill_steps(source, ConvertSettings()) == 0 and distill_steps(source, ConvertSettings(distill_steps=5)) == 5
    )


@pytest.mark.parametrize(("layers", "given", "steps"), [(2, None, 300), (2000, None, 40), (2000, 7, 7), (2, 0, 0)])
def test_steps_of_refinement_follow_from_the_size(layers: int, given: int | None, steps: int) -> None:
    source = read_source(TINY | {"num_hidden_layers": layers})
    assert refine_steps(source, ConvertSettings(refine_steps=given)) == steps


def test_windows_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="calibration_window_tokens 0: must be 2 or more"):
        window_lengths(read_source(TINY), ConvertSettings(calibration_window_tokens=0))


@pytest.mark.parametrize("field", ["refine_steps", "distill_steps"])
def test_negative_steps_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} -1: must be 0 or more"):
        distill_steps(read_source(TINY), ConvertSettings(**{field: -1}))
