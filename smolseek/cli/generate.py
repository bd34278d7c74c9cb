"""generate and chat."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from smolseek.cli.shared import Device, check_device, quiet, torch_dtype


@dataclass(frozen=True)
class Generate:
    """Continue a prompt: tokens appear as they are drawn, the speed after the last."""

    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base: DeepSeek-V3, or any causal model."""
    prompt: str | None = None
    """Text to continue; left out: read from --prompt-file or standard input."""
    prompt_file: Path | None = None
    """File with the text to continue."""
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
    stop: tuple[str, ...] = ()
    """Texts that end the continuation, left out of it."""
    samples: int = 1
    """Continuations, one after the other, each with the next seed."""
    seed: int | None = None
    """Same seed, same text."""
    json: bool = False
    """Print a JSON line a continuation, with its tokens per second."""
    device: Device = "cpu"
    """Where to run."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the weights in memory; int8: 8 bits a weight and bfloat16 beside them."""


@dataclass(frozen=True)
class Chat(Generate):
    """Talk to a model, by its chat template where it has one; an empty line or Ctrl-D ends."""


@dataclass(frozen=True)
class Continuation:
    """One continuation and what it took; the speed is that of the tokens after the first."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float | None
    seed: int | None


def run_generate(command: Generate) -> None:
    quiet()
    if command.samples < 1:
        raise ValueError(f"--samples {command.samples}: must be at least 1")
    prompt = _read_prompt(command)
    model, tokenizer = _model(command)
    from smolseek.data.encoding import encode_document

    ids = encode_document(tokenizer, prompt)
    for number in range(command.samples):
        if number and not command.json:
            print("\n---")
        seed = None if command.seed is None else command.seed + number
        done = _continue(model, tokenizer, ids, command, seed, echo=prompt)
        if command.json:
            print(json.dumps({"prompt": prompt, **asdict(done)}, ensure_ascii=False), flush=True)
        else:
            _print_speed(done)


def _read_prompt(command: Generate) -> str:
    if command.prompt is not None and command.prompt_file is not None:
        raise ValueError(f"--prompt-file {command.prompt_file}: --prompt is given too; give one of them")
    if command.prompt_file is not None:
        return command.prompt_file.read_text(encoding="utf-8")
    return sys.stdin.read() if command.prompt is None else command.prompt


def run_chat(command: Chat) -> None:
    quiet()
    if command.json or command.samples != 1 or command.prompt is not None or command.prompt_file is not None:
        raise ValueError("chat: takes no --prompt, --prompt-file, --samples or --json; smolseek generate has them")
    from smolseek.data.encoding import encode_document

    model, tokenizer = _model(command)
    messages: list[dict[str, str]] = []
    transcript = ""
    while text := _ask():
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:  # a base model: the conversation is one text that it continues
            prompt = transcript + text + "\n"
            ids = encode_document(tokenizer, prompt)
        reply = _continue(model, tokenizer, ids, command, command.seed).text
        messages.append({"role": "assistant", "content": reply})
        transcript = prompt + reply + "\n"


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _continue(
    model: Any, tokenizer: Any, ids: list[int], command: Generate, seed: int | None, echo: str = ""
) -> Continuation:
    """Continue `ids`, printing the text as it comes unless JSON is asked for."""
    import torch

    from smolseek.generation import stream_text

    if not ids:
        raise ValueError("prompt: empty, and the tokenizer has no BOS token to start from; give some text")
    show = (lambda text: None) if command.json else (lambda text: print(text, end="", flush=True))
    times: list[float] = []
    begin = time.perf_counter()
    pieces = stream_text(
        model,
        tokenizer,
        torch.tensor([ids], device=command.device),
        stop=command.stop,
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        min_p=command.min_p,
        repetition_penalty=command.repetition_penalty,
        seed=seed,
        eos_token_id=model.config.eos_token_id,
        on_token=lambda _: times.append(time.perf_counter()),
    )
    text = next(pieces, "")  # refusals come before anything is shown
    show(echo + text)
    for piece in pieces:
        show(piece)
        text += piece
    show("\n")
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return Continuation(text, len(ids), len(times), times[0] - begin if times else 0.0, speed, seed)


def _print_speed(done: Continuation) -> None:
    """On standard error, so that a pipe gets the text alone."""
    speed = "" if done.tokens_per_second is None else f", then {done.tokens_per_second:,.1f} tokens/s"
    print(
        f"[{done.prompt_tokens:,} prompt tokens, first of {done.new_tokens:,} new ones after "
        f"{done.first_token_seconds:.2f} s{speed}]",
        file=sys.stderr,
    )


def _model(command: Generate) -> tuple[Any, Any]:
    """The model, its weights laid out for generating, and its tokenizer."""
    from smolseek.checkpoint.hub import load, load_tokenizer
    from smolseek.model.inference import prepare_for_generation

    check_device(command.device)
    int8 = command.dtype == "int8"
    model = load(command.folder, dtype=torch_dtype("bfloat16" if int8 else command.dtype), device=command.device)
    prepare_for_generation(model, int8=int8)
    return model, load_tokenizer(command.folder)
