"""What else reads a stock folder: transformers' pipeline, server, save_pretrained, and 8 and 4 bits on a CPU."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, pipeline

import smolseek
from smolseek.checkpoint.hub import save
from smolseek.generation import stream
from tests.export.folders import ids, tiny_folder
from tests.factories import logits_of, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer

PROMPT = "Anna sees"
NEW_TOKENS = 8
QUANTISABLE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
"""Sizes that the CPU kernels for 4 bits take, and a latent that they do not."""


def ours(folder: Path, prompt: str) -> str:
    """Returns the text that our model writes greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    stop = tokenizer.eos_token_id
    new = stream(smolseek.load(folder).eval(), prompt_ids, max_new_tokens=NEW_TOKENS, eos_token_id=stop)
    return tokenizer.decode(list(new))


def biases_of(model: Any) -> list[torch.Tensor]:
    return [bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")]


def test_the_pipeline_writes_our_text(tmp_path):
    tiny_folder(tmp_path / "m")
    write = pipeline("text-generation", str(tmp_path / "m"))
    (answer,) = write(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == ours(tmp_path / "m", PROMPT)


@torch.inference_mode()
def test_transformers_caches_the_latents(tmp_path):
    model = tiny_folder(tmp_path / "m")
    cache = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids(12).view(1, 12), use_cache=True).past_key_values
    shapes = [(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers]
    latent, rotated = model.config.kv_lora_rank, model.config.qk_rope_head_dim
    assert shapes == [((1, 1, 12, latent), (1, 1, 12, rotated))] * 3


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_by_a_script_of_one_s_own(tmp_path, dtype):
    tiny_folder(tmp_path / "m", moe_intermediate_size=24)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype).eval()
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    prompt = ids(24).view(2, 12)
    assert again.dtype == dtype and torch.equal(logits_of(again, prompt), logits_of(model, prompt))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert len(biases_of(again)) == 2
    for mine, theirs in zip(biases_of(again), biases_of(model), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)
    stock = again.float()  # smolseek.load computes in fp32
    torch.testing.assert_close(
        logits_of(smolseek.load(tmp_path / "saved").eval(), prompt), logits_of(stock, prompt), atol=1e-4, rtol=0
    )


def quantised(kind: str) -> Any:
    """Returns transformers' settings for int8 by torchao or bitsandbytes, or for 4 bits by bitsandbytes."""
    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization", reason="needs pip install torchao")
        from transformers import TorchAoConfig

        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
    bits = (
        {"load_in_8bit": True} if kind == "bitsandbytes int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    return BitsAndBytesConfig(**bits, llm_int8_skip_modules=["kv_b_proj", "lm_head"])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "error"), [("torchao int8", 0.15), ("bitsandbytes int8", 0.15), ("bitsandbytes nf4", 0.45)]
)
def test_fewer_bits_keep_the_bias_in_single(tmp_path, kind, error):
    tiny_folder(tmp_path / "m", **QUANTISABLE)
    settings = quantised(kind)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    ).eval()
    (bias,) = biases_of(model)
    assert bias.dtype == torch.float32 and torch.equal(bias, biases_of(whole)[0])
    assert model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16  # no kind has kernels for experts
    prompt = ids(48).view(4, 12)
    wanted, found = logits_of(whole, prompt), logits_of(model, prompt).float()
    assert 0 < (found - wanted).norm() < error * wanted.norm()


@contextmanager
def transformers_serve(folder: Path) -> Iterator[str]:
    """Runs `transformers serve` on the folder and yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        while not is_up(address):
            assert process.poll() is None, "transformers serve has ended"
            time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(address: str, path: str, **body: Any) -> Any:
    """Returns the first choice of the server's answer to a greedy request."""
    tree = body | {"max_tokens": NEW_TOKENS, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + path, json.dumps(tree).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_transformers_serve_writes_our_text(tmp_path):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="needs pip install 'transformers[serving]'")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %} then"
    folder = save(tiny_v3(vocab_size=ENTRIES, bos_token_id=0, eos_token_id=0), tmp_path / "m", tokenizer_from=tokenizer)
    with transformers_serve(folder) as address:
        messages = [{"role": "user", "content": PROMPT}]
        chat = ask(address, "/v1/chat/completions", model=str(folder), messages=messages)["message"]["content"]
        plain = ask(address, "/v1/completions", model=str(folder), prompt=PROMPT)["text"]
    assert chat == ours(folder, f"{PROMPT} then")
    assert plain == ours(folder, PROMPT)
