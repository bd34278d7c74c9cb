"""The verbs check and export: folders for other programs."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from smolseek.cli.shared import quiet_libraries

Runtime = Literal["transformers", "vllm", "sglang", "llama.cpp"]


@dataclass(frozen=True)
class Check:
    """Show which runtimes load a DeepSeek-V3 folder, and what to change if one refuses.

    Reads config.json and the headers of the weights. The exit status is 1 if a runtime named by --runtime refuses.
    """

    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base."""
    runtime: tuple[Runtime, ...] = ()
    """Runtimes to check; default: all."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Export:
    """Write a DeepSeek-V3 folder as one file for llama.cpp and Ollama."""

    format: Annotated[tyro.conf.Positional[Literal["gguf"]], tyro.conf.arg(metavar="gguf")]
    """Kind of file."""
    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base."""
    out: tyro.conf.Positional[Path]
    """File to write."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = "f16"
    """How matrices are stored; norms, routers and balancing biases stay fp32. The last three need xllamacpp."""
    pre: str | None = None
    """llama.cpp's name for the tokenizer's rule to split text; needed only if smolseek does not know it."""
    force: bool = False
    """Replace OUT if it is a GGUF file."""


def run_check(command: Check) -> int:
    from smolseek.checkpoint.source import read_config, resolve_folder
    from smolseek.formats.headers import read_headers
    from smolseek.formats.runtimes import check, verdict

    folder = resolve_folder(command.folder)
    config = read_config(folder)
    if "kv_lora_rank" not in config:
        raise ValueError(
            f"checkpoint {command.folder}: model_type {config.get('model_type')!r} has no latent attention; convert it "
            "first: smolseek convert"
        )
    findings = check(config, read_headers(folder))
    asked = {runtime: findings[runtime] for runtime in command.runtime or findings}
    refused = [runtime for runtime, said in asked.items() if any(finding.refuses for finding in said)]
    if command.json:
        tree = {
            runtime: {"loads": runtime not in refused, "findings": [dataclasses.asdict(finding) for finding in said]}
            for runtime, said in asked.items()
        }
        print(json.dumps(tree, indent=2))
    else:
        print("\n".join(f"{runtime:13} {verdict(said)}" for runtime, said in asked.items()))
    return 1 if command.runtime and refused else 0


def run_export(command: Export) -> None:
    quiet_libraries()
    from tqdm import tqdm

    from smolseek.export.gguf import export_gguf

    with tqdm(unit="tensor", disable=not sys.stderr.isatty()) as bar:

        def on_tensor(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        exported = export_gguf(
            command.folder, command.out, type=command.type, pre=command.pre, force=command.force, on_tensor=on_tensor
        )
    size = f"{exported.size_bytes / 1e6:.1f} MB, {exported.bits_per_weight:.2f} bits per weight"
    print(f"{exported.path}: {exported.tensors} tensors, {size}, {command.type}")
    if exported.fallbacks:
        kinds = dict.fromkeys(name.removesuffix(".weight").split(".")[-1] for name in exported.fallbacks)
        others, block = ", ".join(exported.fallback_encodings), 32 if command.type == "q8_0" else 256
        count = len(exported.fallbacks)
        print(f"{count} of them as {others}, as blocks of {block} do not divide their rows: {', '.join(kinds)}")
    print("\n".join(next_commands(exported.path, has_template=exported.has_chat_template, options=exported.options)))


def next_commands(out: Path, *, has_template: bool, options: Sequence[str] = ()) -> list[str]:
    """Returns the commands that the user may run next; Ollama has no place for options of llama.cpp."""
    file, name = shlex.quote(str(out)), re.sub(r"[^\w.-]", "-", out.stem)
    modelfile = shlex.quote(f"FROM {out if out.is_absolute() else f'./{out}'}")
    model = " ".join(["-m", file, *options])
    commands = [f"llama-cli {model}"] if has_template else []
    commands += [f'llama-completion {model} -no-cnv -n 64 -p "Once upon a time"', f"llama-server {model}"]
    if not options:
        commands.append(f"echo {modelfile} > Modelfile && ollama create {name} -f Modelfile && ollama run {name}")
    return commands
