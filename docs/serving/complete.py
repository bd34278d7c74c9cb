"""Continues a prompt with llama.cpp, prebuilt in a wheel: pip install xllamacpp.

python docs/serving/complete.py MODEL.gguf "PROMPT"
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def complete(file: Path, prompt: str, *, tokens: int = 64, temperature: float = 0.0) -> str:
    """Returns the continuation; temperature 0 is greedy.

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
    server = xllamacpp.Server(settings)
    answer = server.handle_completions({"prompt": prompt, "max_tokens": tokens, "temperature": temperature})
    return answer["choices"][0]["text"]


def main() -> int:
    """Print the prompt and its continuation."""
    try:
        if len(sys.argv) != 3:
            raise ValueError('usage: python docs/serving/complete.py MODEL.gguf "PROMPT"')
        print(sys.argv[2] + complete(Path(sys.argv[1]), sys.argv[2]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
