"""How fast a converted model decodes, by count and beside what was measured."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from smolseek.config import ConvertSettings
from smolseek.conversion.target import target_config
from smolseek.formats.deepseek_v3 import count_parameters
from smolseek.formats.dense import read_source
from smolseek.machine import Machine
from smolseek.planning import FASTER, count_decoding, plan, render
from tests.configs import SMOLLM2_135M

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CELL = ("competitor", "kind", "cached", "batch")
FAST_COMPUTE = Machine(flops_per_second=1e15, bytes_per_second=1e12)
FAST_MEMORY = Machine(flops_per_second=1e11, bytes_per_second=1e12)
MEASURED_MACHINE = Machine(flops_per_second=385e9, bytes_per_second=36.26e9, float64_share=0.25, bfloat16=True)
"""What `measure_machine` says of the two cores of the measurements below, with nothing beside."""


def test_decoding_is_counted_in_bytes_and_operations() -> None:
    settings = ConvertSettings(kv_lora_rank=120, qk_rope_head_dim=32)
    target = target_config(read_source(SMOLLM2_135M), settings)

    def seconds(sequences: int, tokens: int, weights: int, numbers: int, flops: int) -> float:
        start = 2 * weights * (1 / 1e12 + sequences / 1e15)
        return start + sequences * tokens * 30 * (2 * numbers / 1e12 + flops / 1e15)

    weights = count_parameters(target)[0]
    for sequences, tokens in ((1, 0), (1, 8192), (8, 512), (64, 8192)):
        dense = seconds(sequences, tokens, 134_515_008, 384, 4 * 9 * 64)
        latent = seconds(sequences, tokens, weights, 152, 2 * 9 * 152 + 2 * 9 * 120)
        counted = count_decoding(SMOLLM2_135M, target, FAST_COMPUTE, sequences, tokens)
        assert counted == pytest.approx(dense / latent)
    for part in plan(SMOLLM2_135M, settings, FAST_COMPUTE).decoding:
        assert part.gain == count_decoding(SMOLLM2_135M, target, FAST_COMPUTE, part.sequences, 8192)
        length = part.faster_from_tokens
        assert length is not None
        gains = [count_decoding(SMOLLM2_135M, target, FAST_COMPUTE, part.sequences, t) for t in (length - 1, length)]
        assert gains[0] < FASTER <= gains[1]


def test_no_gain_where_arithmetic_costs_more_than_the_cache_saves() -> None:
    told = plan(SMOLLM2_135M, ConvertSettings(), FAST_MEMORY)
    assert all(part.gain < 1 and part.faster_from_tokens is None for part in told.decoding)
    assert "2.5 times the tokens or sequences in the same memory" in render(told)
    assert "memory is gained, not time" in render(told)


def test_a_length_that_the_model_does_not_take_is_not_told() -> None:
    short = SMOLLM2_135M | {"max_position_embeddings": 512}
    assert plan(short, ConvertSettings(), FAST_COMPUTE).decoding[0].faster_from_tokens is None


def test_an_untied_embedding_table_is_not_read_while_decoding() -> None:
    wide = SMOLLM2_135M | {"tie_word_embeddings": False}
    gains = [
        plan(source, ConvertSettings(), FAST_COMPUTE).decoding[0].gain
        for source in (SMOLLM2_135M, wide, wide | {"vocab_size": 2 * 49152})
    ]
    assert gains[0] == gains[1] > gains[2]


def test_several_sequences_read_the_experts_of_each() -> None:
    dense, upcycled = (plan(SMOLLM2_135M, ConvertSettings(experts=e), FAST_COMPUTE) for e in ("none", "upcycle"))
    assert upcycled.decoding[0].gain == pytest.approx(dense.decoding[0].gain, rel=0.01)  # but for the router
    assert upcycled.decoding[1].gain < 0.95 * dense.decoding[1].gain


def test_no_gain_in_time_is_told_where_none_was_measured() -> None:
    """SmolLM2-135M at half its cache in llama.cpp, each model with flash attention or without as suits it.

    With it for both, the count is near what was measured up to 4,096 cached tokens. At 8,192 the converted model gains
    more than counted, up to 1.24 times, but there the dense one is faster without.
    """
    told = plan(SMOLLM2_135M, ConvertSettings(cache=0.5), MEASURED_MACHINE)
    assert all(part.faster_from_tokens is None for part in told.decoding)
    lines = (RESULTS / "2026-11-28-llamacpp-speed-smollm2.jsonl").read_text().splitlines()[1:]
    steps: dict[bool, dict[tuple[Any, ...], float]] = {True: {}, False: {}}
    for row in map(json.loads, lines):
        steps[row["flash"]][tuple(row[key] for key in CELL)] = median(row["seconds"])
    cells = [cell[1:] for cell in steps[True] if cell[0] == "dense, llama.cpp"]
    assert len(cells) == 12
    for kind, cached, batch in cells:
        dense, converted = (
            [steps[flash][f"{what}, llama.cpp", kind, cached, batch] for flash in (True, False)]
            for what in ("dense", "converted")
        )
        assert min(dense) < min(converted)
        counted = count_decoding(SMOLLM2_135M, told.config, MEASURED_MACHINE, batch, cached)
        assert counted < FASTER and (cached == 8192 or abs(dense[0] / converted[0] - counted) < 0.1)
