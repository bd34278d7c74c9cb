"""vLLM itself, on the CPU, gives stock transformers' tokens and log-probabilities; `make vllm` installs and runs it.

Its latent attention takes 512 + 64 alone on a CPU. Other sizes run with VLLM_MLA_DISABLE=1.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from smolseek.checkpoint.hub import load_stock, save
from smolseek.config import ConvertSettings
from smolseek.conversion.pipeline import convert
from smolseek.formats.runtimes import check, verdict
from smolseek.model import StockModel
from tests.export.folders import YARN, tiny_folder
from tests.factories import random_ids, tiny_dense
from tests.text import ENTRIES, tiny_tokenizer, write_stories

PYTHON = Path(os.environ.get("SMOLSEEK_VLLM", Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"))
"""The Python of the environment that has vLLM."""
NEW_TOKENS = 12

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}; `make vllm` makes it"),
]

CONVERTED = {
    "attention alone": {},
    "upcycled": {"experts": "upcycle"},
    "carved": {"experts": "carve"},
    "query rank": {"q_lora_rank": 24},
}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128}
LATENT |= {"hidden_size": 64, "moe_intermediate_size": 32}  # its CPU kernels want 32 to divide both
BUILT = {
    "experts": {},
    "two groups of four": {"n_group": 2, "topk_group": 1},
    "YaRN": {"rope_parameters": YARN | {"mscale_all_dim": 0.7, "mscale": 0.7}, "max_position_embeddings": 256},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    save(StockModel(tiny_dense("llama", vocab_size=ENTRIES)), folder, tokenizer_from=tiny_tokenizer())
    return folder


@pytest.fixture
def converted(source, tmp_path):
    """Returns a function from settings to a folder converted in closed form."""
    text = str(write_stories(tmp_path / "text.txt"))
    closed = {"calibration": (text,), "calibration_windows": 8, "calibration_window_tokens": 32, "refine_steps": 0}
    return lambda **fields: convert(source, tmp_path / "out", settings=ConvertSettings(**closed | fields))


def in_vllm(folder, prompts, *, mla=True):
    """Returns vLLM's tokens and log-probabilities for each prompt.

    Raises:
        RuntimeError: vLLM ended with an error, whose text it is.
    """
    job, out = (folder.with_name(f"{folder.name}-{name}.json") for name in ("job", "answers"))
    job.write_text(json.dumps({"folder": str(folder), "prompts": prompts, "new_tokens": NEW_TOKENS}))
    command = [str(PYTHON), str(Path(__file__).with_name("in_vllm.py")), str(job), str(out)]
    said = subprocess.run(
        command, env=os.environ | {"VLLM_MLA_DISABLE": str(int(not mla))}, capture_output=True, text=True, check=False
    )
    if said.returncode:
        raise RuntimeError(said.stderr)
    return json.loads(out.read_text())


@torch.no_grad()
def in_transformers(folder, prompt):
    """Returns stock transformers' greedy tokens and their log-probabilities."""
    model, ids, chances = load_stock(folder).model, list(prompt), []
    for _ in range(NEW_TOKENS):
        logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(logprobs.argmax()))
        chances.append(float(logprobs.max()))
    return ids[len(prompt) :], chances


def assert_same(folder, *, mla=True):
    """Both give the same tokens, and log-probabilities to four digits."""
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 8, 20)]
    for prompt, (tokens, chances) in zip(prompts, in_vllm(folder, prompts, mla=mla), strict=True):
        wanted, expected = in_transformers(folder, prompt)
        assert tokens == wanted and chances == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("case", CONVERTED)
def test_a_converted_model_says_the_same(case, converted):
    folder = converted(profile="vllm", kv_lora_rank=512, **CONVERTED[case])
    assert verdict(check(json.loads((folder / "config.json").read_text()))["vllm"]) == "loads"
    assert_same(folder)


@pytest.mark.parametrize("case", BUILT)
def test_a_model_of_every_kind_says_the_same(case, tmp_path):
    tiny_folder(tmp_path / "model", **LATENT | BUILT[case])
    assert_same(tmp_path / "model")


def test_a_tied_head_is_not_taken_from_the_embeddings(tmp_path):
    """The table's rule, by running it: the head is whatever memory held, and nothing is said about it."""
    tiny_folder(tmp_path / "model", tie_word_embeddings=True, **LATENT)
    ((tokens, _),) = in_vllm(tmp_path / "model", [[3]])
    assert tokens != in_transformers(tmp_path / "model", [3])[0]


@pytest.mark.parametrize("rank", [256, 448])
def test_other_sizes_say_the_same_without_latent_attention(rank, converted):
    assert_same(converted(profile="vllm", kv_lora_rank=rank), mla=False)


def test_sizes_that_the_table_refuses_are_refused(converted):
    with pytest.raises(RuntimeError, match="Head dimension 24 is not supported by MLA"):
        in_vllm(converted(kv_lora_rank=16, qk_rope_head_dim=8), [[3]])
