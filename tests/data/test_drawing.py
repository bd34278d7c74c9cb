import dataclasses

import pytest
import torch

from smolseek.config import DataSettings
from smolseek.data.drawing import allocate, calibration_windows, held_out_text
from smolseek.data.splits import held_out_documents
from tests.text import stories, tiny_tokenizer, write_stories

LETTERS = "abcdefgh"


def letters(path, letter, documents=40):
    """A file of documents that are runs of one letter and their own number."""
    path.write_text("<|endoftext|>".join(f"{letter}{number} " * 20 for number in range(documents)))
    return str(path)


def numbers_of(windows_BT):
    """For each letter the numbers of the documents that windows are of; the words that windows may cut are left out."""
    found = {}
    texts = tiny_tokenizer().batch_decode(windows_BT)
    for word in (word for text in texts for word in text.replace("<|endoftext|>", " ").split()[1:-1]):
        if word[0] in LETTERS and word[1:].isdigit():
            found.setdefault(word[0], set()).add(int(word[1:]))
    return found


def draw(data, windows=12, window_tokens=16, seed=0):
    return calibration_windows(tiny_tokenizer(), data, windows=windows, window_tokens=window_tokens, seed=seed)


def test_every_source_gives_its_share_from_everywhere_in_it(tmp_path):
    files = tuple(letters(tmp_path / f"{letter}.txt", letter) for letter in "abc")
    windows_BT, facts = draw(DataSettings(train=files, held_out_share=0.0), windows=60)
    assert [fact["windows"] for fact in facts] == [20, 20, 20] and [fact["source"] for fact in facts] == list(files)
    for numbers in numbers_of(windows_BT).values():
        assert len(numbers) >= 3 and max(numbers) > 15


def test_weights_are_shares_of_the_windows(tmp_path):
    files = tuple(letters(tmp_path / f"{letter}.txt", letter) for letter in "ab")
    _, facts = draw(DataSettings(train=files, weights=(3.0, 1.0), held_out_share=0.0), windows=12)
    assert [fact["windows"] for fact in facts] == [9, 3]
    with pytest.raises(ValueError, match=r"calibration_weights \[1.0\]: 1 for 2 sources of calibration"):
        draw(DataSettings(train=files, weights=(1.0,)))


def test_windows_are_drawn_by_the_seed(tmp_path):
    data = DataSettings(train=(str(write_stories(tmp_path / "a.txt")),), held_out_share=0.0)
    (first, _), (again, _), (other, _) = (draw(data, 6, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (6, 16) and torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match=r"a\.txt: .* tokens, less than one window of 1000000; name more text"):
        draw(data, 1, 10**6)


def test_calibration_lines_without_text_are_told_of_with_their_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "a b"}\n' * 9)
    with pytest.raises(ValueError, match=r"0 tokens, .*it has content: set data\.text_column, or rename one to text"):
        calibration_windows(
            tiny_tokenizer(), DataSettings(train=(str(tmp_path / "a.jsonl"),)), windows=2, window_tokens=8, seed=0
        )


def test_a_book_is_read_from_everywhere_in_it(tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"a{number}" for number in range(40_000)))
    windows_BT, _ = draw(DataSettings(train=(str(tmp_path / "book.txt"),), held_out_share=0.0), windows=30)
    tenths = {number // 4000 for number in numbers_of(windows_BT)["a"]}
    assert len(tenths) >= 6
    short = " ".join(f"b{number}" for number in range(500))  # all of a short text can be used
    (tmp_path / "short.txt").write_text(short)
    windows_BT, _ = draw(DataSettings(train=(str(tmp_path / "short.txt"),), held_out_share=0.0), windows=1000)
    assert windows_BT.numel() >= len(tiny_tokenizer()(short)["input_ids"]) - 16


def test_what_a_run_holds_out_does_not_calibrate(tmp_path):
    data = DataSettings(train=(letters(tmp_path / "a.txt", "a"),), held_out_share=0.5)
    held_out = {int(document.text[1:].split()[0]) for document in held_out_documents(data)}
    windows_BT, _ = draw(data, windows=200)
    assert held_out and not held_out & numbers_of(windows_BT)["a"]


def test_held_out_text_has_a_share_of_each_source(tmp_path):
    files = tuple(letters(tmp_path / f"{letter}.txt", letter) for letter in "ab")
    small = str(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text("c7 " * 5)
    settings = DataSettings(held_out=(*files, small), held_out_tokens=600)
    packed = held_out_text(tiny_tokenizer(), settings)
    found = numbers_of(packed.ids_T[None])
    assert len(packed.ids_T) == 600 and found["c"] == {7}
    assert max(found["a"]) > 10 and max(found["b"]) > 10
    assert held_out_text(tiny_tokenizer(), settings).ids_T.tolist() == packed.ids_T.tolist()


def test_all_held_out_text_is_taken_where_there_is_less(settings):
    kept = {document.text for document in held_out_documents(settings)}
    packed = held_out_text(tiny_tokenizer(), settings)
    assert packed.text_bytes == sum(len(text.encode()) for text in kept)
    assert 0 < len(kept) < len(stories())


@pytest.mark.parametrize(
    ("wanted", "weights", "available", "counts"),
    [
        (10, (1, 1), (100, 100), [5, 5]),
        (10, (3, 1), (100, 100), [7, 3]),
        (10, (1, 1), (2, 100), [2, 8]),
        (100, (1, 1, 2), (5, 6, 7), [5, 6, 7]),
        (2, (1, 1, 1), (9, 9, 9), [1, 1, 0]),
        (0, (1,), (9,), [0]),
    ],
)
def test_shares(wanted, weights, available, counts):
    assert allocate(wanted, weights, available) == counts


@pytest.mark.parametrize("tokens", [0, -5])
def test_no_held_out_tokens_are_refused(settings, tokens):
    with pytest.raises(ValueError, match=f"held_out_tokens {tokens}: must be at least 1"):
        held_out_text(tiny_tokenizer(), dataclasses.replace(settings, held_out_tokens=tokens))
