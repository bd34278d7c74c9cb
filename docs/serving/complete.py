"""Runs a GGUF file in llama.cpp, prebuilt in a wheel: pip install xllamacpp.

python docs/serving/complete.py MODEL.gguf "PROMPT"     # continues a text
python docs/serving/complete.py MODEL.gguf --chat       # answers line by line, and serves the model meanwhile
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

USAGE = 'usage: python docs/serving/complete.py MODEL.gguf "PROMPT", or --chat in place of the prompt'


def start(file: Path) -> Any:
    """Returns llama.cpp's server with the file loaded.

    Raises:
        ValueError: the file does not exist, or xllamacpp is not installed.
    """
    if not file.is_file():
        raise ValueError(f"{file}: no such file; write one with smolseek export gguf FOLDER {file}")
    try:
        import xllamacpp
    except ImportError as error:
        raise ValueError("xllamacpp: not installed; pip install xllamacpp") from error
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.verbosity = -1
    settings.cpuparams.n_threads = max(1, (os.cpu_count() or 2) // 2)  # llama.cpp's threads wait in busy loops
    return xllamacpp.Server(settings)


def complete(server: Any, prompt: str, *, tokens: int = 64, temperature: float = 0.0) -> str:
    """Returns the continuation; temperature 0 is greedy."""
    answer = server.handle_completions({"prompt": prompt, "max_tokens": tokens, "temperature": temperature})
    return answer["choices"][0]["text"]


def chat(server: Any, lines: Iterator[str], *, tokens: int = 256, temperature: float = 0.0) -> Iterator[str]:
    """Yields the answer to each line, by the chat template in the file; the conversation grows with each."""
    messages: list[dict[str, str]] = []
    for line in lines:
        messages.append({"role": "user", "content": line.rstrip("\n")})
        answer = server.handle_chat_completions(
            {"messages": messages, "max_tokens": tokens, "temperature": temperature}
        )
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        yield messages[-1]["content"]


def main() -> int:
    """Print the prompt and its continuation, or the answers to what is typed."""
    try:
        if len(sys.argv) != 3:
            raise ValueError(USAGE)
        server = start(Path(sys.argv[1]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if sys.argv[2] != "--chat":
        print(sys.argv[2] + complete(server, sys.argv[2]))
        return 0
    print(f"serving at {server.listening_address}/v1; type a line, Ctrl-D ends", file=sys.stderr)
    for answer in chat(server, sys.stdin):
        print(answer, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
