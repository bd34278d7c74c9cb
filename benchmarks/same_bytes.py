"""Did a change of the code change what it computes? sha256 of the weights of conversions and of a short run.

    python benchmarks/same_bytes.py --out before.json                          # on the commit before
    python benchmarks/same_bytes.py --out after.json --compare before.json     # on the commit after

The bytes depend on the processor and on the number of threads, so both runs belong on one machine, one after the other.
`--source NAME=FOLDER=TEXT` adds a checkpoint of your own. Exit status 1 where bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
REFINED = ("--refine-steps", "40", "--distill-steps", "0")
CLOSED = ("--refine-steps", "0", "--distill-steps", "0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "closed form": CLOSED,
    "refined": REFINED,
    "end-to-end KL": ("--refine-steps", "4", "--distill-steps", "20"),
    "exact": ("--exact",),
    "upcycle": (*CLOSED, "--experts", "upcycle"),
    "carve": ("--refine-steps", "10", "--distill-steps", "4", "--experts", "carve"),
    "profile vllm": (*CLOSED, "--profile", "vllm", "--kv-lora-rank", "256"),
    "query rank": (*CLOSED, "--q-lora-rank", "24"),
}
FAMILIES = {
    "qwen2": {"closed form": CLOSED, "biases kept": (*CLOSED, "--profile", "transformers"), "exact": ("--exact",)},
    "qwen3": {"refined": ("--refine-steps", "4", "--distill-steps", "0")},
    "smollm3": {"closed form": CLOSED, "exact": ("--exact",)},
}
"""Conversions of tiny random checkpoints, for parts of other families that Llama does not have."""


def main() -> int:
    """Run everything, print, write and compare the hashes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="JSON file of an earlier run")
    parser.add_argument("--code", type=Path, default=ROOT, help="checkout whose code runs")
    parser.add_argument("--source", action="append", default=[], help="NAME=FOLDER=TEXT")
    parser.add_argument("--only", default="", help="part of the names to run")
    options = parser.parse_args()
    sources = {"base": ("builtin:base", "builtin:python")}
    for named in options.source:
        name, folder, text = named.split("=")
        sources[name] = folder, text
    hashes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        plans = [(f"{s}: {v}", *sources[s], how) for s in sources for v, how in VARIANTS.items()]
        for family, ways in FAMILIES.items():
            plans += [
                (f"{family}: {v}", str(tiny(family, Path(scratch))), "builtin:python", h) for v, h in ways.items()
            ]
        for name, source, text, how in plans:
            if options.only in name:
                hashes[name] = convert(options.code, source, Path(scratch) / "out", text, how)
                print(f"{hashes[name][:16]}  {name}", flush=True)
        if options.only in "quickstart, 20 steps":
            hashes["quickstart, 20 steps"] = train(options.code, Path(scratch))
            print(f"{hashes['quickstart, 20 steps'][:16]}  quickstart, 20 steps", flush=True)
    options.out.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    return compare(hashes, json.loads(options.compare.read_text(encoding="utf-8"))) if options.compare else 0


def compare(after: dict[str, str], before: dict[str, str]) -> int:
    """Print which hashes differ; returns 1 if any does."""
    differ = [name for name, value in after.items() if before.get(name) != value]
    print("\n".join(f"differs: {name}" for name in differ) or f"the same {len(after)} hashes")
    return 1 if differ else 0


def convert(code: Path, source: str, out: Path, text: str, how: tuple[str, ...]) -> str:
    """Returns the hash of a converted folder's weights, or the refusal of a source that cannot be converted so."""
    text_options = ("--calibration", text, "--calibration-windows", "32")
    refusal = run(code, "-m", "smolseek", "convert", source, str(out), "--force", *text_options, *how)
    return refusal or sha256(out / "model.safetensors")


def train(code: Path, scratch: Path) -> str:
    """Returns the hash of the weights after 20 steps of recipes/quickstart.yaml."""
    shortened = "--convert.calibration-windows 16 --convert.refine-steps 4 --data.held-out-tokens 8192 --train.steps 20"
    recipe = str(code / "recipes" / "quickstart.yaml")
    options = ("--no-compare-dense", "--runs", str(scratch), *shortened.split())
    refusal = run(code, "-m", "smolseek", "train", recipe, *options)
    assert refusal is None, refusal
    return sha256(scratch / "quickstart" / "model" / "model.safetensors")


def tiny(family: str, scratch: Path) -> Path:
    """Returns the folder of a tiny random checkpoint of a family, with the built-in base's tokenizer."""
    folder = scratch / family
    if not folder.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        more = {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": 4096, "max_position_embeddings": 256}
        tokens = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more, **tokens)).float()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(ROOT / "smolseek" / "assets" / "base-python").save_pretrained(folder)
    return folder


def run(code: Path, *arguments: str) -> str | None:
    """Run Python on the code of that checkout, with two threads; returns what a refusal says, else None."""
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, *arguments], cwd=code, env=environment, capture_output=True, text=True)
    if done.returncode == 2:
        return done.stderr.splitlines()[-1]
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    return None


def sha256(path: Path) -> str:
    """Returns the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
