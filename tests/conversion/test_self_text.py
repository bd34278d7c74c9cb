"""Text that a tiny model writes, against what the same model says without a cache."""

import pytest
import torch

from smolseek.conversion import self_text
from smolseek.conversion.self_text import Openings, cached_attention, read_openings, sample_windows
from tests.factories import VOCAB, random_ids, tiny_dense
from tests.text import ENTRIES, kind_of_tokenizer, tiny_tokenizer

ANY = Openings([], torch.arange(VOCAB))
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def write(model, openings=ANY, windows=6, window_tokens=20, ends=(), seed=0, **options):
    return sample_windows(
        model, openings, windows=windows, window_tokens=window_tokens, end_tokens=ends, seed=seed, **options
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_chances_are_those_of_a_pass_over_the_whole_window(family):
    """Biases, norms on heads, layers without RoPE, heads of another width than hidden_size / heads."""
    model, ids = tiny_dense(family, **FAMILIES[family]), random_ids(3, 12)
    whole = model(ids).logits.softmax(-1)
    with cached_attention(model, 3, 12) as next_probabilities:
        for position in range(12):
            torch.testing.assert_close(next_probabilities(ids[:, position]), whole[:, position], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(ids).logits.softmax(-1), whole)  # its own attention is back


def test_tokens_come_as_often_as_the_model_says(monkeypatch):
    monkeypatch.setattr(self_text, "_COLDEST", 1.0)
    model, only = tiny_dense("llama"), Openings([7], torch.tensor([9]))
    model.lm_head.weight.data *= 6  # so that some tokens are likely
    windows_BT = write(model, only, windows=8000, window_tokens=3)[0][::2]
    assert set(windows_BT[:, 0].tolist()) == {7} and set(windows_BT[:, 1].tolist()) == {9}
    shares = torch.bincount(windows_BT[:, 2], minlength=VOCAB) / len(windows_BT)
    with torch.no_grad():
        chances = model(torch.tensor([[7, 9]])).logits[0, -1].softmax(-1)
    assert chances.max() > 0.1
    torch.testing.assert_close(shares, chances, rtol=0, atol=0.03)


def test_half_of_the_rows_are_colder():
    """Their tokens are those of chances to the power 1 / temperature; the mean of both kinds is met."""
    model, only = tiny_dense("llama"), Openings([7], torch.tensor([9]))
    model.lm_head.weight.data *= 6
    windows_BT = write(model, only, windows=8000, window_tokens=3)[0][::2]
    shares = torch.bincount(windows_BT[:, 2], minlength=VOCAB) / len(windows_BT)
    with torch.no_grad():
        logits = model(torch.tensor([[7, 9]])).logits[0, -1]
    colder = torch.stack([(logits / temperature).softmax(-1) for temperature in torch.linspace(0.6, 1, 101)]).mean(0)
    torch.testing.assert_close(shares, (logits.softmax(-1) + colder) / 2, rtol=0, atol=0.03)


def test_half_of_the_windows_begin_inside_a_text(dense):
    windows_BT, documents = write(dense, Openings([7], torch.tensor([9])), windows=9, ends=(7, 9))
    assert windows_BT.shape == (9, 20) and (windows_BT[::2, :2] == torch.tensor([7, 9])).all()
    assert documents >= 5 and not (windows_BT[1::2, :2] == torch.tensor([7, 9])).all()
    too_long = write(dense, Openings([7], torch.tensor([9])), windows=3, window_tokens=40)[0]
    assert (too_long[:, :2] == torch.tensor([7, 9])).all()


def test_windows_are_drawn_by_the_seed_and_no_two_are_alike(dense):
    (first, _), (again, _), (other, _) = (write(dense, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (6, 20) and torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 6


def test_windows_that_do_not_fit_into_memory_together_are_written_in_turn(dense, monkeypatch):
    monkeypatch.setattr(self_text, "_BATCH_BYTES", 2 * (2 * 4 * 2 * 2 * 8 * 40 + 12 * VOCAB))
    seen = []
    windows_BT, documents = write(dense, windows=5, window_tokens=40, on_progress=lambda *told: seen.append(told))
    assert seen[-1] == (200, 200) and len(seen) == 3 * 40 and documents == 5
    assert len({tuple(row) for row in windows_BT.tolist()}) == 5
    assert int(windows_BT.max()) < VOCAB and int(windows_BT.min()) >= 0


@pytest.mark.parametrize("start", [[], [1]])
def test_a_model_that_always_ends_begins_again_in_the_same_window(start):
    model, end = tiny_dense("llama"), 5
    model.lm_head = torch.nn.Linear(32, VOCAB)  # whatever it has read
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.bias.copy_(100.0 * (torch.arange(VOCAB) == end))
    windows_BT, documents = write(model, Openings(start, torch.tensor([10, 11, 12])), window_tokens=12, ends=(end,))
    length = len(start) + 2
    parts = windows_BT.view(-1, length).tolist()
    assert {tuple(part[:-2]) for part in parts} == {tuple(start)} and {part[-1] for part in parts} == {end}
    assert {part[-2] for part in parts} == {10, 11, 12} and documents == len(parts)


def test_every_end_token_ends_and_text_goes_on_where_there_is_none(dense):
    openings = Openings([], torch.tensor([3]))
    windows_BT, documents = write(dense, openings, windows=20, window_tokens=40, ends=range(50, VOCAB))
    ends_BT = windows_BT[:, :-1] >= 50
    assert ends_BT.any() and (windows_BT[:, 1:][ends_BT] == 3).all() and documents == 20 + int(ends_BT.sum())
    assert write(dense, windows=20)[1] == 10  # of two windows each


@pytest.mark.parametrize("kind", ["adds", "has", "none", "sentencepiece"])
def test_openings_have_the_bos_only_where_the_tokenizer_adds_it(kind):
    tokenizer = kind_of_tokenizer(kind)
    openings = read_openings(tokenizer, 200, [1, 60])
    assert openings.start == ([0] if kind in ("adds", "sentencepiece") else [])
    ordinary = openings.ordinary_Z.tolist()
    special = {0, 1, 60} | ({2} if kind == "sentencepiece" else set())  # the last is its <unk>
    assert set(ordinary) == {*tokenizer.get_vocab().values()} & set(range(200)) - special


def test_special_tokens_that_have_no_role_open_nothing():
    tokenizer = kind_of_tokenizer("has")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.add_tokens(["word"])
    ordinary = read_openings(tokenizer, 1000, []).ordinary_Z.tolist()
    assert tokenizer.convert_tokens_to_ids("word") in ordinary
    assert tokenizer.convert_tokens_to_ids("<tool>") not in ordinary


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="none of its ordinary tokens is among the model's 1; use the model's own"):
        read_openings(tiny_tokenizer(), 1, [])
    assert len(read_openings(tiny_tokenizer(), ENTRIES, []).ordinary_Z) == ENTRIES - 1


def test_a_broken_model_is_refused_and_left_as_it_was():
    model = tiny_dense("llama")
    before = model.config._attn_implementation
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity for a next token"):
        write(model)
    assert model.config._attn_implementation == before
