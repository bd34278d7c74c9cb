"""What each type of GGUF file loses: llama.cpp on exported folders against our own fp32 forward pass.

python benchmarks/gguf_types.py --folders smol-v3 SmolLM2-135M --texts held-out.txt --out smollm2

Every folder is measured on every text. A folder may be a dense Llama, too: its file is `dense_gguf.py`'s. Each type of
each folder and text is a row, kept when it is there: after `--minutes` no other begins, and the same command goes on.
(The name gguf.py would hide the gguf package from this folder.)

Shapes: T tokens of one window, V vocab_size.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import tyro
from circumstances import circumstances, command_line
from dense_gguf import write_dense_gguf
from llamacpp import LlamaCpp
from rows import Row, Rows, present
from torch import Tensor

from smolseek.checkpoint.hub import load, load_tokenizer
from smolseek.checkpoint.source import read_config, resolve_folder
from smolseek.config import DataSettings
from smolseek.data.packing import pack
from smolseek.data.splits import held_out_documents
from smolseek.evaluation import WINDOW_TOKENS
from smolseek.export.gguf import GgufExport, GgufType, export_gguf
from smolseek.formats.deepseek_v3 import is_latent

NEAR_TIE = 0.1
_HEAD = (
    "| type | file, MB | bits per weight | other blocks | perplexity | cost | KL, nats | same top token "
    "| outside near-ties | largest |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Types:
    """Measure types of GGUF files on folders and texts: size, perplexity and distance from our fp32 logits."""

    folders: tuple[str, ...]
    """Converted DeepSeek-V3 folders, or dense Llamas."""
    texts: tuple[str, ...]
    """Held-out texts: files, or builtin:python."""
    types: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
    """Types of files."""
    windows: int = 8
    """Windows of 512 tokens (or the model's limit) to read of each text."""
    minutes: float = 60.0
    """After so long no other row begins."""
    out: str = "run"
    """NAME in results/DATE-gguf-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report and JSON lines go."""


@dataclass(frozen=True)
class Cost:
    """One type of one folder; KL(ours ‖ llama.cpp) and the largest difference of a logit are over all tokens."""

    size_bytes: int
    bits_per_weight: float
    fallbacks: int
    tensors: int
    tokens: int
    ours: float
    """Our own loss, nats a token."""
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


def compare(types: Types) -> Rows:
    """Measure the rows that are missing, for `minutes` at most and then to the end of the one begun."""
    named = dataclasses.replace(types, texts=tuple(Path(text).name for text in types.texts))
    rows = Rows(types.results, f"gguf-{types.out}", named, free=("folders", "texts", "types", "minutes", "results"))
    end = time.monotonic() + 60 * types.minutes
    for folder in types.folders:
        with tempfile.TemporaryDirectory() as scratch:
            files = _Files(folder, Path(scratch))
            for text in types.texts:
                about = {"folder": Path(folder).name, "text": Path(text).name}
                left = [kind for kind in types.types if not rows.find(**about, kind=kind)]
                if left and time.monotonic() < end:
                    _measure(files, windows_of(folder, text, types.windows), left, rows, about, end)
    return rows


class _Files:
    """The files of one folder, each written when it is first asked for."""

    def __init__(self, folder: str, scratch: Path) -> None:
        self.folder, self._scratch = folder, scratch
        self._written: dict[GgufType, GgufExport] = {}

    def file(self, kind: GgufType) -> GgufExport:
        """Returns what was written as this type."""
        if kind not in self._written:
            source, out = resolve_folder(self.folder), self._scratch / f"{kind}.gguf"
            write = export_gguf if is_latent(read_config(source)) else write_dense_gguf
            self._written[kind] = write(source, out, type=kind)
        return self._written[kind]


@torch.inference_mode()
def _measure(
    files: _Files, windows: list[Tensor], kinds: list[GgufType], rows: Rows, about: dict[str, str], end: float
) -> None:
    """Add a row for each type; our own logits of all windows are in memory meanwhile."""
    model = load(files.folder).eval()
    ours = [model(window_T[None])[0].float() for window_T in windows]
    del model
    for kind in kinds:
        if time.monotonic() >= end:
            return
        began, exported = time.monotonic(), files.file(kind)
        with LlamaCpp(exported.path) as theirs:
            cost = _cost(exported, windows, ours, (theirs.logits(window_T) for window_T in windows))
        rows.add(**about, kind=kind, **dataclasses.asdict(cost), seconds=time.monotonic() - began)
        print(f"  {about['folder']}, {about['text']}, {kind}: KL {cost.kl:.1e}", flush=True)


def _cost(exported: GgufExport, windows: list[Tensor], ours: list[Tensor], theirs: Iterator[Tensor]) -> Cost:
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
        size_bytes=exported.size_bytes,
        bits_per_weight=exported.bits_per_weight,
        fallbacks=len(exported.fallbacks),
        tensors=exported.tensors,
        tokens=tokens,
        ours=_loss(windows, ours),
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


# -- report -----------------------------------------------------------------------------------------------------------


def report(types: Types, rows: Rows, command: str) -> str:
    """Returns the report in Markdown."""
    lines = [
        f"# What a type of GGUF file costs: {types.out}",
        "",
        f"`{command}`",
        "",
        f"llama.cpp (xllamacpp {version('xllamacpp')}, fp32 cache) on exported folders against our own fp32 forward. A",
        f"near-tie is a token after which our two best logits are less than {NEAR_TIE} apart; *other blocks*: tensors",
        "whose rows the type's blocks of 32 or 256 do not divide; *largest*: difference of any logit.",
        "",
        circumstances(),
        "",
    ]
    for folder, text in dict.fromkeys((row["folder"], row["text"]) for row in rows.rows):
        lines += table(f"{folder} on {text}", rows.find(folder=folder, text=text))
    return "\n".join(lines)


def table(name: str, rows: list[Row]) -> list[str]:
    """Returns one folder's section on one text in Markdown."""
    cells = [
        f"| {row['kind']} | {row['size_bytes'] / 1e6:.2f} | {row['bits_per_weight']:.2f} "
        f"| {row['fallbacks']} of {row['tensors']} | {math.exp(row['loss']):.4f} "
        f"| {math.expm1(row['loss'] - row['ours']):+.3%} | {row['kl']:.1e} | {row['agreement']:.2%} "
        f"| {row['clear_agreement']:.2%} | {row['largest']:.1e} |"
        for row in rows
    ]
    ours = f"Ours in fp32: perplexity {math.exp(rows[0]['ours']):.4f} on {rows[0]['tokens']:,} tokens."
    return [f"## {name}", "", ours, "", *_HEAD, *cells, ""]


def main() -> int:
    """Measure, write the report, print it."""
    types = tyro.cli(Types, description=__doc__)

    def measure() -> tuple[Path, str, None]:
        try:
            rows = compare(types)
        except ImportError as error:
            raise ValueError(str(error)) from error
        return rows.path, report(types, rows, command_line()), None

    return present(measure, plots=False)


if __name__ == "__main__":
    sys.exit(main())
