"""generate and chat."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import tyro

from smolseek.cli.shared import Device, Dtype, check_device, quiet, torch_dtype


@dataclass(frozen=True)
class Generate:
    """Continue a prompt."""

    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base: DeepSeek-V3, or any causal model."""
    prompt: str | None = None
    """Text to continue; left out: read from standard input."""
    max_new_tokens: int = 128
    """Length of the continuation."""
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int | None = None
    """Draw from the k likeliest tokens."""
    top_p: float | None = 0.95
    """Draw from the smallest set of tokens with this much probability."""
    min_p: float | None = None
    """Draw from tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens seen before less likely."""
    seed: int | None = None
    """Same seed, same text."""
    device: Device = "cpu"
    """Where to run."""
    dtype: Dtype = "float32"
    """Of the weights in memory."""


@dataclass(frozen=True)
class Chat(Generate):
    """Talk to a model, by its chat template where it has one; an empty line or Ctrl-D ends."""


def run_generate(command: Generate) -> None:
    quiet()
    prompt = sys.stdin.read() if command.prompt is None else command.prompt
    model, tokenizer = _model(command)
    _print_stream(model, tokenizer, prompt, command, echo=prompt)


def run_chat(command: Chat) -> None:
    quiet()
    model, tokenizer = _model(command)
    messages: list[dict[str, str]] = []
    transcript = ""
    while text := _ask():
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:  # a base model: the conversation is one text that it continues
            prompt = transcript + text + "\n"
        reply = _print_stream(model, tokenizer, prompt, command)
        messages.append({"role": "assistant", "content": reply})
        transcript = prompt + reply + "\n"


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _print_stream(model: Any, tokenizer: Any, prompt: str, command: Generate, echo: str = "") -> str:
    """Print the continuation as it comes and return it."""
    import torch

    from smolseek.data.windows import encode_document
    from smolseek.generation import stream

    template = bool(getattr(tokenizer, "chat_template", None)) and isinstance(command, Chat)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if template else encode_document(tokenizer, prompt)
    if not ids:
        raise ValueError("prompt: empty, and the tokenizer has no BOS token to start from; give some text")
    print(echo, end="", flush=True)
    new: list[int] = []
    shown = ""
    for token in stream(
        model,
        torch.tensor([ids], device=command.device),
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        min_p=command.min_p,
        repetition_penalty=command.repetition_penalty,
        seed=command.seed,
        eos_token_id=model.config.eos_token_id,
    ):
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("�"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(new, skip_special_tokens=True)
    print(text[len(shown) :])
    return text


def _model(command: Generate) -> tuple[Any, Any]:
    from smolseek.checkpoint.hub import load, load_tokenizer

    check_device(command.device)
    return load(command.folder, dtype=torch_dtype(command.dtype), device=command.device), load_tokenizer(command.folder)
