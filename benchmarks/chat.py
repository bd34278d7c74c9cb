"""What a model says before and after conversion: ten questions, put to several folders by the chat template.

python benchmarks/chat.py dense=FOLDER converted=FOLDER healed=FOLDER [--out NAME]

Stock transformers generates, always the likeliest token.
"""

from __future__ import annotations

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from circumstances import circumstances, command_line
from rows import present

from smolseek.checkpoint.hub import load_stock, load_tokenizer
from smolseek.data.chat import render_prompt

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I make a cup of tea?",
    "Write three sentences about a dog and a cat who become friends.",
    "What is 12 plus 30?",
    "Name three animals that live in the sea.",
    "What does photosynthesis do?",
    "I slept badly last night. What can I do to sleep better?",
    "Who wrote Romeo and Juliet?",
    "Explain to a child why it is cold in winter.",
)


@dataclass(frozen=True)
class Chat:
    """Put ten questions to each folder."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Checkpoints, NAME=FOLDER each."""
    max_new_tokens: int = 120
    """Most tokens of an answer."""
    out: str = "smollm2"
    """NAME in results/DATE-chat-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where the answers go."""


@torch.inference_mode()
def ask(folder: str, max_new_tokens: int) -> list[str]:
    """Returns a model's answer to every question.

    Raises:
        ValueError: the folder has no model, no tokenizer or no chat template.
    """
    tokenizer = load_tokenizer(folder)
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    stock = load_stock(folder)
    ends = sorted({*stock.end_token_ids, tokenizer.eos_token_id})
    answers = []
    for ids in prompts:
        ids_1T = torch.tensor([ids])
        said_1T = stock.model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
        )
        answers.append(tokenizer.decode(said_1T[0, len(ids) :], skip_special_tokens=True).strip())
    return answers


def render(answers: dict[str, list[str]], max_new_tokens: int) -> str:
    """Returns the answers as Markdown, question by question; `answers` are by model."""
    about = f"Greedy, at most {max_new_tokens} new tokens, by the chat template, through stock transformers in fp32."
    lines = ["# Ten questions", "", f"`{command_line()}`", "", f"{circumstances()} {about}"]
    for number, question in enumerate(QUESTIONS):
        lines += ["", f"## {question}"]
        for name, said in answers.items():
            quoted = "\n".join(f"> {line}".rstrip() for line in said[number].splitlines()) or "> (nothing)"
            lines += ["", f"**{name}**", "", quoted]
    return "\n".join(lines) + "\n"


def main(chat: Chat) -> int:
    """Ask, write, print."""

    def run() -> tuple[Path, str, None]:
        named = dict(folder.partition("=")[::2] for folder in chat.folders)
        if not named or not all(named.values()):
            raise ValueError(f"folders {' '.join(chat.folders)}: must be NAME=FOLDER each; for example dense=smollm2")
        answers = {name: ask(folder, chat.max_new_tokens) for name, folder in named.items()}
        chat.results.mkdir(parents=True, exist_ok=True)
        return chat.results / f"{datetime.date.today()}-chat-{chat.out}.md", render(answers, chat.max_new_tokens), None

    return present(run, plots=False)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Chat, description=__doc__)))
