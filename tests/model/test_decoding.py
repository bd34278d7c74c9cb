"""Steps of fixed shapes decode what the growing cache decodes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smolseek import generation
from smolseek.generation import generate
from smolseek.model import StockModel, decoding
from smolseek.model.decoding import DecodeStep, columns_for, has_fixed_steps
from smolseek.model.inference import prepare_for_generation
from tests.factories import LIVELY_ROPE, random_ids, tiny_llama, tiny_v3
from tests.fake_cuda import CUDA, cuda_model, fake_cuda

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "latent queries and groups": {"q_lora_rank": 20, "n_group": 4, "topk_group": 2},
    "dense": {"first_k_dense_replace": 3},
}
RAGGED = [random_ids(1, length, seed=length)[0].tolist() for length in (9, 4, 7)]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sizes in a few tokens."""
    monkeypatch.setattr(decoding, "_FEWEST_COLUMNS", 4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3}])
@pytest.mark.usefixtures("small_units")
def test_tokens_are_those_of_the_growing_cache(
    case: str, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_v3(**CASES[case])
    made: list[DecodeStep] = []

    def step(*arguments: Any) -> DecodeStep:
        made.append(DecodeStep(*arguments))
        return made[-1]

    monkeypatch.setattr(generation, "DecodeStep", step)
    for prompts in (RAGGED, random_ids(1, 8), random_ids(2, 3)):
        results = []
        for fixed in (False, True):
            monkeypatch.setattr(generation, "has_fixed_steps", lambda _, fixed=fixed: fixed)
            results.append(generate(model, prompts, max_new_tokens=12, **sampling))
        if isinstance(prompts, Tensor):
            assert torch.equal(*results)
        else:
            assert results[0] == results[1]
    assert len(made) == 3 and all(one.cache.length > 12 for one in made)


@pytest.mark.usefixtures("small_units")
def test_logits_are_those_of_a_full_forward_until_the_cache_is_full() -> None:
    model, ids = tiny_v3(q_lora_rank=20), random_ids(2, 14)
    expected = model(ids)
    prepare_for_generation(model)
    cache = model.new_cache(2, 14)
    step = DecodeStep(model, cache)
    with torch.inference_mode():
        model(ids[:, :5], cache=cache)
        sizes = []
        for position in range(5, 14):
            got = step(ids[:, position : position + 1])
            torch.testing.assert_close(got, expected[:, position], rtol=0, atol=1e-4)
            sizes.append(step.columns)
    assert sizes == [8, 8, 8, 12, 12, 12, 12, 14, 14]
    with pytest.raises(ValueError, match="capacity of 14"):
        step(ids[:, :1])


@given(st.integers(1, 100_000), st.integers(0, 1000))
def test_few_sizes_that_fit(tokens: int, room: int) -> None:
    columns = columns_for(tokens, tokens + room)
    assert tokens <= columns <= tokens + room and columns - tokens < max(tokens / 4, 256)
    sizes = {columns_for(n, 1_000_000) for n in range(tokens, 2 * tokens, max(1, tokens // 50))}
    assert len(sizes) <= 9


def test_only_steps_that_read_no_number_are_captured() -> None:
    assert not has_fixed_steps(tiny_v3()) and not has_fixed_steps(StockModel(tiny_llama()))
    with fake_cuda():
        assert has_fixed_steps(cuda_model(first_k_dense_replace=3))
        assert has_fixed_steps(cuda_model(torch.bfloat16))
        assert not has_fixed_steps(cuda_model())  # fp32 experts
        divided = cuda_model(first_k_dense_replace=3)
        divided.reshard = lambda: None  # as FSDP2 makes it
        assert not has_fixed_steps(divided)
        for rope in ("dynamic", "longrope"):
            assert not has_fixed_steps(cuda_model(rope_parameters=LIVELY_ROPE[rope], first_k_dense_replace=3))


@torch.inference_mode()
def test_a_step_on_a_gpu_waits_for_nothing() -> None:
    with fake_cuda(numbers=False):
        model = cuda_model(torch.bfloat16)
        cache = model.new_cache(2, 14, torch.zeros(2, dtype=torch.int64, device=CUDA))
        cache.length = 5
        step = DecodeStep(model, cache)
        step.run = step._forward
        step.columns, step.fixed = 14, decoding.FixedCache(cache, 14)
        assert step(torch.zeros(2, 1, dtype=torch.int64, device=CUDA)).shape == (2, 96)
