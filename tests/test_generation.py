"""Generation gives what transformers' generation gives, and keeps its promises on limits, seeds, modes and EOS."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from smolseek import generation
from smolseek.generation import Sampling, TextDecoder, generate, repetition_rate, stream, stream_text
from smolseek.model import DeepseekV3, StockModel
from tests.factories import LIVELY_ROPE, VOCAB, random_ids, tiny_llama, tiny_v3, tiny_v3_pair
from tests.text import KINDS, kind_of_tokenizer

NEW = 12
MODELS: dict[str, DeepseekV3 | StockModel] = {"V3": tiny_v3(), "stock": StockModel(tiny_llama())}
each_model = pytest.mark.parametrize("kind", MODELS)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_transformers(penalty: float) -> None:
    ours, theirs = tiny_v3_pair(q_lora_rank=20)
    llama = tiny_llama()
    for model, oracle in ((ours, theirs), (StockModel(llama), llama)):
        ids = random_ids(2, 9)
        expected = oracle.generate(ids, max_new_tokens=NEW, do_sample=False, repetition_penalty=penalty)
        assert torch.equal(generate(model, ids, max_new_tokens=NEW, repetition_penalty=penalty), expected)


@pytest.mark.parametrize("ids", [[1, 2], torch.tensor([1, 2]), torch.tensor(1), torch.ones(1, 1, 2), "ab", ["ab"], 7])
@pytest.mark.parametrize("continues", [generate, lambda *arguments: next(stream(*arguments))])
def test_what_is_no_batch_of_prompts_is_refused(continues: Any, ids: Any) -> None:
    with pytest.raises(ValueError, match=r"input_ids must be a tensor of \(batch, tokens\), or a list of lists"):
        continues(MODELS["V3"], ids)


@each_model
def test_rows_of_a_ragged_batch_equal_each_prompt_alone(kind: str) -> None:
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (11, 4, 1)]
    together = generate(MODELS[kind], prompts, max_new_tokens=NEW, repetition_penalty=1.2)
    alone = [generate(MODELS[kind], [prompt], max_new_tokens=NEW, repetition_penalty=1.2)[0] for prompt in prompts]
    assert together == alone
    assert [row[: len(prompt)] for row, prompt in zip(together, prompts, strict=True)] == prompts


@each_model
def test_prefill_in_chunks_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (17, 5)]
    whole = generate(MODELS[kind], prompts, max_new_tokens=NEW)
    monkeypatch.setattr(generation, "_PREFILL_TOKENS", 4)
    assert generate(MODELS[kind], prompts, max_new_tokens=NEW) == whole


def test_a_prompt_whose_angles_depend_on_its_length_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_PREFILL_TOKENS", 4)
    ours, theirs = tiny_v3_pair(rope_parameters=LIVELY_ROPE["longrope"])
    ids = random_ids(2, 20)  # more than the original context of 16
    expected = theirs.generate(ids, max_new_tokens=NEW, do_sample=False)
    for model in (ours, StockModel(theirs)):
        assert torch.equal(generate(model, ids, max_new_tokens=NEW), expected)


@each_model
def test_same_seed_same_text_and_the_global_generator_is_left_alone(kind: str) -> None:
    ids = random_ids(2, 5)
    before = torch.get_rng_state()
    first, again, other, unseeded = (
        generate(MODELS[kind], ids, max_new_tokens=NEW, temperature=1.0, seed=seed) for seed in (1, 1, 2, None)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, unseeded)


@each_model
def test_stream_gives_what_generate_gives_and_keeps_the_mode(kind: str) -> None:
    model, ids = MODELS[kind], random_ids(1, 5)
    model.train()
    try:
        tokens = stream(model, ids, max_new_tokens=NEW, temperature=0.8, top_p=0.9, seed=3)
        first = next(tokens)
        assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        rest = list(tokens)
    finally:
        model.eval()
    whole = generate(model, ids, max_new_tokens=NEW, temperature=0.8, top_p=0.9, seed=3)
    assert [first, *rest] == whole[0, 5:].tolist()


def test_fewer_new_tokens_than_none_are_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens -3: must not be negative"):
        generate(MODELS["V3"], [[1, 2]], max_new_tokens=-3)


def test_a_sequence_ends_with_its_eos() -> None:
    model, prompts = MODELS["V3"], random_ids(2, 6, seed=5)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 1}
    free = generate(model, prompts.tolist(), **options)
    end = free[0][8]  # the first row ends with its third new token, the second does not
    assert end not in free[0][6:8] + free[0][9:] + free[1][6:]
    assert generate(model, prompts.tolist(), eos_token_id=end, **options) == [free[0][:9], free[1]]
    filled = generate(model, prompts, eos_token_id=[end, VOCAB + 1], **options)
    assert filled.tolist() == [free[0][:9] + [end] * (NEW - 3), free[1]]


def test_stream_leaves_the_eos_out() -> None:
    model, prompt = MODELS["V3"], random_ids(1, 6, seed=5)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 1}
    free = list(stream(model, prompt, **options))
    assert list(stream(model, prompt, eos_token_id=free[4], **options)) == free[: free.index(free[4])]


@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 3}, TopKLogitsWarper(3)),
        ({"top_k": 500}, TopKLogitsWarper(500)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"top_p": 1e-6}, TopPLogitsWarper(1e-6)),
        ({"min_p": 0.3}, MinPLogitsWarper(0.3)),
    ],
)
def test_filters_keep_what_transformers_keeps_and_draw_by_chance(options: dict[str, Any], warper: Any) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0, 0.5, 1.5]])
    expected = warper(None, logits.clone() / 0.8).softmax(-1)[0]
    draws = 4000
    sampling, generator = Sampling(temperature=0.8, **options), torch.Generator().manual_seed(0)
    tokens = sample(logits.expand(draws, -1), sampling, generator)
    shares = torch.bincount(tokens, minlength=6) / draws
    assert ((shares > 0) == (expected > 0)).all()
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.03)


def test_penalty_is_transformers_and_spares_padding() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.9, -0.1]])
    seen = torch.tensor([[3, 0, 1]])
    expected = RepetitionPenaltyLogitsProcessor(1.5)(seen[:, 1:], logits.clone())
    seen_BV = generation._seen(seen, torch.tensor([1]), 4)  # 3 is padding
    penalised = generation._penalise(logits, seen_BV, 1.5)
    torch.testing.assert_close(penalised, expected)


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    return generation._sample(logits_BV, None, sampling, generator)


class Letters:
    """A tokenizer whose tokens 0 to 4 are one letter each; any other token is half a character."""

    eos_token_id = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text = "".join("ab<>/"[i] if i < 5 else "?" for i in ids)
        return text.replace("??", "é").replace("?", "�")


def test_text_stops_before_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(tokens: list[int], stop: tuple[str, ...]) -> list[str]:
        monkeypatch.setattr(generation, "stream", lambda model, ids, eos_token_id: iter(tokens))
        return list(stream_text(MODELS["V3"], Letters(), random_ids(1, 2), stop=stop))

    assert pieces([0, 1, 0], ()) == ["a", "b", "a"]
    assert pieces([0, 5, 5, 1], ()) == ["a", "é", "b"]
    assert pieces([0, 5], ()) == ["a", "�"]
    assert pieces([0, 2, 4, 3, 1], ("</>",)) == ["a"]
    assert pieces([0, 2, 4, 1], ("</>",)) == ["a", "</b"]
    assert pieces([0, 2], ("</>",)) == ["a", "<"]
    assert pieces([0, 1, 2, 3], ("<>", "b")) == ["a"]


def test_decoding_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new token costs the decoding of a few, however long prompt and text are."""
    decoded = []

    class Counting(Letters):
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            decoded.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    tokens = [0, 1, 5, 5] * 500
    monkeypatch.setattr(generation, "stream", lambda model, ids, eos_token_id: iter(tokens))
    text = "".join(stream_text(MODELS["V3"], Counting(), random_ids(1, 3000), stop=("<<",)))
    assert text == "abé" * 500
    assert max(decoded) < 40 and sum(decoded) < 40 * len(tokens)


TEXTS = (" a ball é 漢 the cat.\n 5 </s> Ben", "안녕하세요 a 안녕하세요", " ❤️❤️❤️ b")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt_text", ["Anna sees", "안녕하"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_behind_a_prompt_is_transformers(kind: str, prompt_text: str, text: str) -> None:
    """Words in letters that the vocabulary lacks are long runs of bytes, of which the last few tokens are decoded."""
    tokenizer = kind_of_tokenizer(kind)
    prompt = tokenizer(prompt_text)["input_ids"]
    new = tokenizer(text)["input_ids"]
    new = new[1:] if new[0] == tokenizer.bos_token_id else new
    decoder = TextDecoder(tokenizer, prompt)
    said = "".join(decoder.add(token) for token in new) + decoder.rest()
    whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
    assert tokenizer.decode(prompt, skip_special_tokens=True) + said == whole


@each_model
def test_more_tokens_than_positions_are_refused_with_the_numbers(kind: str) -> None:
    limit = MODELS[kind].config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"60 tokens \+ 5 new ones: the model has {limit} positions; shorten"):
        generate(MODELS[kind], random_ids(1, 60), max_new_tokens=5)
    assert generate(MODELS[kind], random_ids(1, 60), max_new_tokens=4).shape == (1, 64)


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_empty_prompts_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="prompt: empty"):
        generate(MODELS["V3"], prompts)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-45},
        {"seed": 2**64},
    ],
)
def test_impossible_sampling_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        generate(MODELS["V3"], random_ids(1, 3), **options)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop '': an empty text is everywhere"):
        next(stream_text(MODELS["V3"], kind_of_tokenizer("adds"), random_ids(1, 3), stop=("",)))


def test_repetition_rate_is_the_share_of_n_grams_seen_before() -> None:
    assert repetition_rate([1, 2, 3, 4, 5, 6]) == 0
    assert repetition_rate([7] * 11) == pytest.approx(7 / 8)
    assert repetition_rate([1, 2, 1, 2, 3], n=2) == pytest.approx(1 / 4)
    assert repetition_rate([1, 2, 3]) == 0


def test_the_coldest_temperatures_are_greedy() -> None:
    model, ids = tiny_v3(), random_ids(1, 4)
    rows = [generate(model, ids, max_new_tokens=8, temperature=cold).tolist() for cold in (0.0, 1e-158)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_weights_that_give_no_numbers_are_refused(temperature: float) -> None:
    model = tiny_v3()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="its weights are broken"):
        generate(model, random_ids(1, 4), max_new_tokens=1, temperature=temperature)
