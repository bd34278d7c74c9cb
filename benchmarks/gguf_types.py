"""What each type of GGUF file loses: llama.cpp on exported folders against our own fp32 forward pass.

python benchmarks/gguf_types.py --folders v3 --texts held-out.txt [--out benchmarks/results/DATE-gguf.md]

(The name gguf.py would hide the gguf package from this folder.)

Shapes: T tokens of one window, V vocab_size.
"""

from __future__ import annotations

import datetime
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import tyro
from circumstances import circumstances, command_line
from llamacpp import LlamaCpp
from torch import Tensor

from smolseek.checkpoint.hub import load, load_tokenizer
from smolseek.checkpoint.source import resolve_folder
from smolseek.config import DataSettings
from smolseek.data.packing import pack
from smolseek.data.splits import held_out_documents
from smolseek.evaluation import WINDOW_TOKENS
from smolseek.export.gguf import export_gguf

ROOT = Path(__file__).parent.parent
TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
NEAR_TIE = 0.1
_HEAD = (
    "| type | file, MB | bits per weight | other blocks | perplexity | cost | KL, nats | same top token "
    "| outside near-ties | largest |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Types:
    """Measure every type on converted folders: size, perplexity and distance from our fp32 logits."""

    folders: tuple[str, ...]
    """Converted DeepSeek-V3 folders."""
    texts: tuple[str, ...]
    """Held-out text of each folder, in the same order: a file, or builtin:python."""
    windows: int = 32
    """Windows of 512 tokens (or the model's limit) to read."""
    out: Path | None = None
    """Report to write; by default benchmarks/results/DATE-gguf.md."""


@dataclass(frozen=True)
class Cost:
    """One type of one folder; KL(ours ‖ llama.cpp) and the largest difference of a logit are over all tokens."""

    kind: str
    size_bytes: int
    bits_per_weight: float
    fallbacks: int
    tensors: int
    loss: float
    kl: float
    agreement: float
    clear_agreement: float
    largest: float


def windows_of(folder: str, text: str, count: int) -> list[Tensor]:
    """Returns the first `count` windows of the held-out text, cut as in `smolseek eval`."""
    texts = {"train" if text == "builtin:python" else "held_out": (text,)}
    ids_T, *_ = pack(load_tokenizer(folder), held_out_documents(DataSettings(**texts)))  # type: ignore[arg-type]
    positions = transformers.AutoConfig.from_pretrained(resolve_folder(folder)).max_position_embeddings
    return [window for window in ids_T.split(min(WINDOW_TOKENS, positions))[:count] if len(window) > 1]


@torch.inference_mode()
def measure(folder: str, windows: list[Tensor]) -> tuple[float, list[Cost]]:
    """Returns our own loss, and the cost of each type."""
    model = load(folder)
    ours = [model(window_T[None])[0].float() for window_T in windows]
    costs = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in TYPES:
            out = Path(scratch) / f"{kind}.gguf"
            exported = export_gguf(folder, out, type=kind)
            with LlamaCpp(out) as theirs:
                costs.append(_cost(kind, exported, windows, ours, (theirs.logits(window_T) for window_T in windows)))
    return _loss(windows, ours), costs


def _cost(kind: str, exported: Any, windows: list[Tensor], ours: list[Tensor], theirs: Iterator[Tensor]) -> Cost:
    """Returns the cost of one type; of `theirs` one window is in memory at a time."""
    loss = kl = largest = 0.0
    same = clear = clear_same = tokens = 0
    for window_T, ours_TV, theirs_TV in zip(windows, ours, theirs, strict=True):
        best_T2 = ours_TV.topk(2).values
        is_clear_T = best_T2[:, 0] - best_T2[:, 1] > NEAR_TIE
        same_T = ours_TV.argmax(-1) == theirs_TV.argmax(-1)
        kl += F.kl_div(theirs_TV.log_softmax(-1), ours_TV.log_softmax(-1), reduction="sum", log_target=True).item()
        same, clear = same + int(same_T.sum()), clear + int(is_clear_T.sum())
        clear_same += int((same_T & is_clear_T).sum())
        tokens += len(window_T)
        loss += _loss([window_T], [theirs_TV]) * (len(window_T) - 1)
        largest = max(largest, (ours_TV - theirs_TV).abs().max().item())
    return Cost(
        kind=kind,
        size_bytes=exported.size_bytes,
        bits_per_weight=exported.bits_per_weight,
        fallbacks=len(exported.fallbacks),
        tensors=exported.tensors,
        loss=loss / (tokens - len(windows)),
        kl=kl / tokens,
        agreement=same / tokens,
        clear_agreement=clear_same / clear,
        largest=largest,
    )


def _loss(windows: list[Tensor], logits: list[Tensor]) -> float:
    """Returns nats per token; the first token of a window is not predicted."""
    pairs = list(zip(windows, logits, strict=True))
    total = sum(F.cross_entropy(logits_TV[:-1], window_T[1:], reduction="sum").item() for window_T, logits_TV in pairs)
    return total / sum(len(window_T) - 1 for window_T in windows)


def table(name: str, tokens: int, ours: float, costs: list[Cost]) -> list[str]:
    """Returns one folder's section in Markdown."""
    rows = [
        f"| {cost.kind} | {cost.size_bytes / 1e6:.2f} | {cost.bits_per_weight:.2f} "
        f"| {cost.fallbacks} of {cost.tensors} | {math.exp(cost.loss):.4f} "
        f"| {math.expm1(cost.loss - ours):+.3%} | {cost.kl:.1e} | {cost.agreement:.2%} | {cost.clear_agreement:.2%} "
        f"| {cost.largest:.1e} |"
        for cost in costs
    ]
    return [
        f"## {name}",
        "",
        f"Ours in fp32: perplexity {math.exp(ours):.4f} on {tokens:,} tokens.",
        "",
        *_HEAD,
        *rows,
        "",
    ]


def report(types: Types) -> str:
    """Returns the report in Markdown.

    Raises:
        ValueError: there are not as many texts as folders; or as `export_gguf`.
    """
    if len(types.folders) != len(types.texts):
        raise ValueError(f"{len(types.folders)} folders and {len(types.texts)} texts: name one text for each folder")
    lines = [
        "# What a type of GGUF file costs",
        "",
        f"`{command_line()}`",
        "",
        f"llama.cpp (xllamacpp {version('xllamacpp')}, fp32 cache) on exported folders against our own",
        f"fp32 forward. A near-tie is a token after which our two best logits are less than {NEAR_TIE} apart; *other",
        "blocks*: tensors whose rows the type's blocks of 32 or 256 do not divide; *largest*: difference of any logit.",
        "",
        circumstances(),
        "",
    ]
    for folder, text in zip(types.folders, types.texts, strict=True):
        windows = windows_of(folder, text, types.windows)
        ours, costs = measure(folder, windows)
        lines += table(Path(folder).name, sum(map(len, windows)), ours, costs)
    return "\n".join(lines)


def main() -> int:
    """Measure, write and print the report."""
    types = tyro.cli(Types, description=__doc__)
    transformers.logging.set_verbosity_error()
    try:
        text = report(types)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    out = types.out or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-gguf.md"
    out.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
