"""The verbs generate and chat."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from smolseek.cli.shared import Device, quiet_libraries, torch_dtype
from smolseek.formats.text import read_text

_NO_UTF8 = "{}: not UTF-8; convert it, for example with iconv -f LATIN1 -t UTF-8"


@dataclass(frozen=True)
class Generate:
    """Continue a prompt. Tokens appear as they are drawn; the speed follows at the end."""

    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base: DeepSeek-V3, or any causal model; or GGUF file of a dense one."""
    prompt: str | None = None
    """Text to continue; none: read from --prompt-file or standard input."""
    prompt_file: Path | None = None
    """File with the text to continue."""
    max_new_tokens: int = 128
    """Most tokens in the continuation."""
    temperature: float = 0.7
    """Sampling temperature; 0: always the likeliest token."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens."""
    top_p: float | None = 0.95
    """Draw from the smallest set of tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Draw from tokens at least this likely, as a share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens less likely that have appeared before."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation; they are not part of it."""
    samples: int = 1
    """Number of continuations, each with the next seed."""
    seed: int | None = None
    """Seed of the draws: the same seed gives the same text."""
    json: bool = False
    """Print one line of JSON for each continuation, with its tokens per second."""
    device: Device = "cpu"
    """Where to run."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights in memory."""


@dataclass(frozen=True)
class Chat(Generate):
    """Talk to a model, with its chat template if it has one. An empty line or Ctrl-D ends the chat."""

    prompt: tyro.conf.Suppress[str | None] = None
    prompt_file: tyro.conf.Suppress[Path | None] = None
    samples: tyro.conf.Suppress[int] = 1
    json: tyro.conf.Suppress[bool] = False


@dataclass(frozen=True)
class Continuation:
    """One continuation and its speed; tokens per second count the tokens after the first."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float | None
    seed: int | None


def run_generate(command: Generate) -> None:
    quiet_libraries()
    if command.samples < 1:
        raise ValueError(f"--samples {command.samples}: must be at least 1")
    prompt = _read_prompt(command)
    model, tokenizer = _load_for_generation(command)
    from smolseek.data.encoding import encode_prompt

    ids = encode_prompt(tokenizer, prompt)
    for number in range(command.samples):
        if number and not command.json:
            print("\n---")
        seed = None if command.seed is None else command.seed + number
        done = _print_continuation(model, tokenizer, ids, command, seed, echo=prompt)
        if command.json:
            print(json.dumps({"prompt": prompt, **asdict(done)}, ensure_ascii=False), flush=True)
        else:
            _print_speed(done)


def _read_prompt(command: Generate) -> str:
    if command.prompt is not None and command.prompt_file is not None:
        raise ValueError(f"--prompt-file {command.prompt_file}: --prompt is given too; give one of them")
    if command.prompt is not None:
        return _checked(command.prompt, "--prompt")
    if command.prompt_file is None and sys.stdin.isatty():
        print("[type the prompt and end it with Ctrl-D, or give one with --prompt]", file=sys.stderr)
    text = _typed(sys.stdin.read) if command.prompt_file is None else read_text(command.prompt_file)
    return text.removesuffix("\n")  # editors and echo end a text with one that its author does not mean


def _checked(text: str, where: str) -> str:
    """Returns a text, unless bytes in it were no UTF-8 (ValueError)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(_NO_UTF8.format(where)) from error
    return text


def _typed(read: Callable[[], str]) -> str:
    """Returns what `read` reads of standard input, which refuses or keeps what is no UTF-8 (ValueError for both)."""
    try:
        return _checked(read(), "standard input")
    except UnicodeDecodeError as error:
        raise ValueError(_NO_UTF8.format("standard input")) from error


def run_chat(command: Chat) -> None:
    quiet_libraries()
    model, tokenizer = _load_for_generation(command)
    positions = model.config.max_position_embeddings
    room = positions - command.max_new_tokens
    if room < 1:
        raise ValueError(f"--max-new-tokens {command.max_new_tokens}: the model has {positions:,} positions; lower it")
    messages: list[dict[str, str]] = []
    while text := _read_line():
        message = {"role": "user", "content": text}
        if (size := len(_conversation_ids(tokenizer, [message]))) > room:
            told = f"[this line is left out: it has {size:,} tokens, and the model reads {room:,}]"
            print(told, file=sys.stderr, flush=True)
            continue
        messages.append(message)
        ids = _forget_oldest(tokenizer, messages, room)
        reply = _print_continuation(model, tokenizer, ids, command, command.seed).text
        messages.append({"role": "assistant", "content": reply})


def _forget_oldest(tokenizer: Any, messages: list[dict[str, str]], room: int) -> list[int]:
    """Removes the oldest turns until the conversation has at most `room` tokens, says so, and returns its ids."""
    ids, forgotten = _conversation_ids(tokenizer, messages), 0
    while len(ids) > room and len(messages) > 1:
        del messages[:2]
        ids, forgotten = _conversation_ids(tokenizer, messages), forgotten + 1
    if forgotten:
        turns = "the oldest turn is" if forgotten == 1 else f"the oldest {forgotten} turns are"
        print(f"[{turns} forgotten: the model reads {room:,} tokens]", file=sys.stderr)
    return ids


def _conversation_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Returns the ids of a conversation up to the assistant's turn; without a chat template, of its lines as a text."""
    from smolseek.data.chat import render_prompt
    from smolseek.data.encoding import encode_prompt

    if tokenizer.chat_template:
        return render_prompt(tokenizer, messages)
    return encode_prompt(tokenizer, "".join(f"{message['content']}\n" for message in messages))


def _read_line() -> str:
    try:
        return _typed(lambda: input("> ").strip())
    except EOFError:
        return ""


def _print_continuation(
    model: Any, tokenizer: Any, ids: list[int], command: Generate, seed: int | None, echo: str = ""
) -> Continuation:
    """Continues `ids`; prints the text as it comes, unless the output is JSON."""
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
        on_token=lambda _: times.append(time.perf_counter()),
    )
    text = next(pieces, "")  # an error comes before any text is shown
    show(echo + text)
    for piece in pieces:
        show(piece)
        text += piece
    show("\n")
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return Continuation(text, len(ids), len(times), times[0] - begin if times else 0.0, speed, seed)


def _print_speed(done: Continuation) -> None:
    """Prints to standard error, so that a pipe receives only the text."""
    speed = "" if done.tokens_per_second is None else f", then {done.tokens_per_second:,.1f} tokens/s"
    print(
        f"[{done.prompt_tokens:,} prompt tokens, first of {done.new_tokens:,} new ones after "
        f"{done.first_token_seconds:.2f} s{speed}]",
        file=sys.stderr,
    )


def _load_for_generation(command: Generate) -> tuple[Any, Any]:
    """Returns the model, with its weights laid out for generation, and its tokenizer."""
    from smolseek.checkpoint.hub import load, load_tokenizer
    from smolseek.model.inference import prepare_for_generation
    from smolseek.numerics.precision import check_device

    check_device(command.device)
    model = load(command.folder, dtype=torch_dtype(command.dtype), device=command.device)
    prepare_for_generation(model)
    return model, load_tokenizer(command.folder)
