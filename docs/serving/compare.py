"""Does a server generate what smolseek generates? Compares greedy continuations of 20 prompts.

vllm serve FOLDER --attention-backend TRITON_MLA
python docs/serving/compare.py FOLDER http://localhost:8000

The server has to be OpenAI-compatible. Where two texts part, the script tells how much smolseek prefers its own token:
servers compute in bf16, which can reverse near-ties. Exit status 1 when a text parts at a clear choice.

Shapes: V vocab_size.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from smolseek.checkpoint.hub import load, load_tokenizer
from smolseek.data.encoding import encode_prompt
from smolseek.generation import end_tokens, stream

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "The function returns",
    "In the beginning",
    "She opened the door and",
    "The largest planet in the solar system is",
    "To make bread you need",
    "1, 2, 3, 4,",
    "The most important thing about",
    "import numpy as",
    "A long time ago there lived",
    "The difference between a list and a tuple is",
    "My favourite season is",
    "Photosynthesis is the process by which",
    "He looked at the sky and said",
    "The first step is to",
    "for item in",
    "At the end of the day",
)


@dataclass(frozen=True)
class Compare:
    """Compare a server's greedy text with smolseek's own."""

    folder: tyro.conf.Positional[str]
    """The folder that the server serves."""
    server: tyro.conf.Positional[str]
    """Its address, for example http://localhost:8000."""
    tokens: int = 32
    """Length of the continuations."""
    near_tie: float = 0.2
    """Two tokens this close, in nats, may change places by rounding."""


@dataclass(frozen=True)
class Verdict:
    """One prompt's outcome: tokens in common, and how much likelier our token is at the first difference."""

    prompt: str
    common_tokens: int
    gap_nats: float | None
    """None: the same text. Infinite: no token of the vocabulary continues the server's text."""

    def is_clear(self, near_tie: float) -> bool:
        """Returns whether the texts part at a clear choice."""
        return self.gap_nats is not None and self.gap_nats > near_tie


def ask(server: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Returns the server's JSON answer.

    Raises:
        ValueError: it does not answer, or refuses.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.rstrip("/") + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace")
        raise ValueError(f"{server}{path}: the server says {error.code}: {said}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{server}{path}: no answer ({error}); is the server up?") from error


def compare(model: Any, tokenizer: Any, server: str, name: str, prompt: str, tokens: int) -> Verdict:
    """Returns one prompt's outcome. The request holds token ids, so that both sides start from the same tokens.

    It names the penalty for repetition too: servers would take another from the folder's generation_config.json.
    """
    ids = encode_prompt(tokenizer, prompt)
    body = {"model": name, "prompt": ids, "max_tokens": tokens, "temperature": 0, "repetition_penalty": 1.0}
    choice = ask(server, "/v1/completions", body)["choices"][0]
    text = choice["text"].replace("�", "")
    ends = end_tokens(model, tokenizer)
    ours = list(stream(model, torch.tensor([ids]), max_new_tokens=tokens, eos_token_id=ends))
    ours = [token for token in ours if token not in ends]
    if _text(tokenizer, ids, ours) == text:
        return Verdict(prompt, len(ours), None)
    # Our longest start that the server's text has too, and the server's next token.
    common = max(count for count in range(len(ours) + 1) if text.startswith(_text(tokenizer, ids, ours[:count])))
    with torch.inference_mode():
        logits_V = model(torch.tensor([ids + ours[:common]]))[0, -1].float()
    token = _next_token(tokenizer, ids, ours[:common], text, ends, logits_V.argsort(descending=True).tolist())
    return Verdict(prompt, common, float("inf") if token is None else (logits_V.max() - logits_V[token]).item())


def _next_token(
    tokenizer: Any, ids: list[int], new: list[int], text: str, ends: Sequence[int], ranked: list[int]
) -> int | None:
    """Returns the first token in `ranked` that continues `new` as `text` does; an end where the text ends."""
    begun = _text(tokenizer, ids, new)
    for token in ranked:
        longer = _text(tokenizer, ids, [*new, token])
        if token in ends if begun == text else longer != begun and text.startswith(longer):
            return token
    return None


def _text(tokenizer: Any, ids: list[int], new: list[int]) -> str:
    """Returns the text of `new` after the prompt `ids`, without broken characters, which servers write differently."""
    start = len(tokenizer.decode(ids, skip_special_tokens=True))
    return tokenizer.decode([*ids, *new], skip_special_tokens=True)[start:].replace("�", "")


def run(command: Compare) -> int:
    """Print a line for each prompt and the counts; returns the exit status."""
    model, tokenizer = load(command.folder), load_tokenizer(command.folder)
    name = ask(command.server, "/v1/models")["data"][0]["id"]
    verdicts = []
    for prompt in PROMPTS:
        verdict = compare(model, tokenizer, command.server, name, prompt, command.tokens)
        verdicts.append(verdict)
        said = "same text" if verdict.gap_nats is None else f"parts where ours is {verdict.gap_nats:.3f} nats likelier"
        print(f"{verdict.common_tokens:3} tokens in common, {said}: {prompt}", flush=True)
    same = sum(verdict.gap_nats is None for verdict in verdicts)
    clear = sum(verdict.is_clear(command.near_tie) for verdict in verdicts)
    print(
        f"{same} of {len(verdicts)} the same, {len(verdicts) - same - clear} part at a near-tie, "
        f"{clear} at a clear choice"
    )
    return 1 if clear else 0


def main() -> int:
    """Run the command line."""
    try:
        return run(tyro.cli(Compare))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
