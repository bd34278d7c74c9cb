"""The dense GGUF file, the decoder and the comparison of speeds, on tiny models."""

import llamacpp
import pytest
import torch
from dense_gguf import write_dense_gguf
from llamacpp import Decoder, LlamaCpp
from llamacpp_speed import CONVERTED, DENSE, OURS, Cell, Speed, compare, passes, report

from smolseek.checkpoint.hub import load, save
from smolseek.export.gguf import export_gguf
from smolseek.model import StockModel
from tests.export.folders import ids, tiny_folder
from tests.factories import tiny_dense, tiny_llama
from tests.text import ENTRIES, tiny_tokenizer

try:
    llamacpp.shared_library()
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns the folders of a dense and of a converted model, both with rows that 32 divides."""
    at = tmp_path_factory.mktemp("speed")
    llama = tiny_llama(vocab_size=ENTRIES, hidden_size=64, intermediate_size=96, max_position_embeddings=256)
    save(StockModel(llama), at / "dense", tokenizer_from=tiny_tokenizer())
    tiny_folder(at / "v3", hidden_size=64, kv_lora_rank=32, max_position_embeddings=256)
    return at / "dense", at / "v3"


def greedy(decoder, prompt, tokens):
    """Returns greedy tokens behind the prompt's."""
    new, following = [], None
    for token in prompt:
        following = decoder.step(torch.tensor([[token]]))
    for _ in range(tokens):
        new.append(following.item())
        following = decoder.step(following)
    return new


def test_a_dense_file_gives_transformers_logits_and_greedy_tokens(folders, tmp_path):
    dense, _ = folders
    write_dense_gguf(dense, tmp_path / "m.gguf", "f32")
    stock = load(dense)
    with LlamaCpp(tmp_path / "m.gguf") as theirs, torch.inference_mode():
        assert (theirs.logits(ids()) - stock(ids()[None])[0]).abs().max() < 1e-4
        with Decoder(theirs, tokens=64, sequences=1, threads=1, flash=False) as decoder:
            new = greedy(decoder, ids(20).tolist(), 8)
    ours = stock.model.generate(ids(20)[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert new == ours[0, 20:].tolist()


def test_other_models_have_no_dense_file(tmp_path):
    save(StockModel(tiny_dense("qwen2", vocab_size=ENTRIES)), tmp_path / "m", tokenizer_from=tiny_tokenizer())
    with pytest.raises(ValueError, match="only a llama without biases"):
        write_dense_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32")


@pytest.mark.parametrize("flash", [False, True])
def test_filled_sequences_go_on_as_if_read_and_rewind(folders, tmp_path, flash):
    export_gguf(folders[1], tmp_path / "m.gguf", type="f32")
    draws = [torch.randint(ENTRIES, (60,), generator=torch.Generator().manual_seed(count)) for count in (60, 120)]
    read_T, following = torch.cat(draws), torch.tensor([[5], [6], [7]])
    with (
        LlamaCpp(tmp_path / "m.gguf") as model,
        Decoder(model, tokens=140, sequences=3, threads=1, flash=flash) as decoder,
    ):
        for filled in (60, 120):
            decoder.fill(filled)
            for count in (3, 1):
                wanted = [model.logits(torch.cat([read_T[:filled], ids_1]))[-1].argmax() for ids_1 in following[:count]]
                assert decoder.step(following[:count])[:, 0].tolist() == wanted
                decoder.rewind()


def test_what_tells_most_is_measured_first():
    mine = Speed(dense="a", converted="b")
    cells = [cell for cells in passes(mine) for cell in cells]
    assert len(cells) == len(set(cells)) == 2 * 2 * 3 * 2
    assert cells[:2] == [Cell("f16", True, 512, 1), Cell("f16", True, 512, 8)]
    assert all(cell.cached == 8192 for cell in cells[-8:])


def test_every_competitor_has_a_row_and_a_run_goes_on(folders, tmp_path):
    dense, converted = map(str, folders)
    settings = {"cached": (16, 40), "batches": (1, 2), "rounds": 2, "steps": 2, "threads": 1, "results": tmp_path}
    nothing = compare(Speed(dense, converted, **settings, minutes=0))
    assert nothing.rows == []
    mine = Speed(dense, converted, **settings)
    rows = compare(mine)
    assert len(rows.rows) == 4 * 3 + 12 * 2
    assert {row["competitor"] for row in rows.rows} == {DENSE, CONVERTED, OURS}
    assert all(len(row["seconds"]) == 2 for row in rows.rows)
    assert compare(mine).rows == rows.rows  # nothing is measured twice
    said = report(mine, rows.rows, "command")
    assert "16 of 16 combinations" in said and said.count("| q8_0 | off | 40 | 2 | ") == 2
