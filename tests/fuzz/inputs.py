"""The sound files that every case begins with, and the commands that read them."""

import atexit
import json
import shutil
from contextlib import chdir
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pyarrow
import pyarrow.parquet

from smolseek.checkpoint.hub import save
from smolseek.model import StockModel
from tests.factories import tiny_llama
from tests.fuzz.engine import call
from tests.gguf_files import dense_folder, write_gguf
from tests.text import ENTRIES, kind_of_tokenizer, stories, write_stories

OTHER_TOKENIZERS = ("inputs/sentencepiece", "inputs/larger")
RUN, RESUMED = "work/runs/tiny", "work/runs/stopped"
OUT = "work/out"
DRAFT = [*"--calibration-windows 1 --calibration-window-tokens 16 --refine-steps 0 --distill-steps 0".split()]
CONVERT = ["convert", "inputs/dense", OUT, *DRAFT, "--calibration"]
TEXT = "inputs/text.txt"
GGUF = "inputs/dense.gguf"
SPEECH = ["--max-new-tokens", "2"]
RECIPE = f"""
name: tiny
source: inputs/dense
convert: {{calibration_windows: 1, calibration_window_tokens: 16, refine_steps: 0, distill_steps: 0}}
data: {{train: {TEXT}, shuffle_windows: 2, held_out_share: 0.2, held_out_tokens: 40}}
train: {{steps: 2, batch_windows: 1, window_tokens: 8, warmup_steps: 0, log_every: 1, checkpoint_every: 1}}
sample: {{every: 0, prompts: [Anna], max_new_tokens: 2}}
"""
HEAL = RECIPE.replace("inputs/dense\nconvert", "inputs/v3\n# convert")
ROW_FILES = ["inputs/rows.jsonl", "inputs/rows.parquet"]
COMMANDS: dict[str, list[str]] = {
    "plan": ["plan", "inputs/dense"],
    "plan recipe": ["plan", "inputs/recipe.yaml"],
    "convert": [*CONVERT, TEXT],
    "convert rows": [*CONVERT, *ROW_FILES],
    "plan gguf": ["plan", GGUF],
    "convert gguf": ["convert", GGUF, OUT, *DRAFT, "--calibration", TEXT],
    "generate gguf": ["generate", GGUF, "--prompt", "Anna sees", *SPEECH],
    "generate dense": ["generate", "inputs/dense", "--prompt", "Anna sees", *SPEECH],
    "generate": ["generate", "inputs/v3", "--prompt", "Anna sees", *SPEECH],
    "generate from a file": ["generate", "inputs/v3", "--prompt-file", "inputs/prompt.txt", *SPEECH],
    "generate from stdin": ["generate", "inputs/v3", *SPEECH],
    "chat": ["chat", "inputs/v3", *SPEECH],
    "eval dense": ["eval", "inputs/dense", "--text", TEXT],
    "eval": ["eval", "inputs/v3", "--text", TEXT],
    "eval rows": ["eval", "inputs/v3", "--text", *ROW_FILES],
    "eval against dense": ["eval", "inputs/v3", "--compare", "inputs/dense", "--text", TEXT],
    "check": ["check", "inputs/v3"],
    "export": ["export", "gguf", "inputs/v3", f"{OUT}.gguf"],
    "push": ["push", "inputs/v3", "someone/model", "--dry-run"],
    "train": ["train", "inputs/recipe.yaml", "--runs", "work/new"],
    "heal": ["train", "inputs/heal.yaml", "--runs", "work/new"],
    "train on rows": ["train", "inputs/heal.yaml", "--runs", "work/new", "--data.train", *ROW_FILES],
    "data stats": ["data", "stats", "inputs/recipe.yaml"],
    "data stats rows": ["data", "stats", "inputs/recipe.yaml", "--data.train", *ROW_FILES],
    "report conversion": ["report", "inputs/v3", "--out", f"{OUT}.html"],
    "report run": ["report", RUN, "--out", f"{OUT}.html"],
    "eval run": ["eval", f"{RUN}/model", "--text", TEXT],
    "resume": "train inputs/recipe.yaml --runs work/runs --name stopped --train.steps 3 --resume".split(),
    "push run": ["push", f"{RUN}/model", "someone/model", "--dry-run"],
}
"""The command line of each kind of call, seen from the folder of a case."""
ROWS = [{"text": text} for text in stories(12, seed=1)]


@cache
def sound_files() -> Path:
    """Returns a folder with everything that COMMANDS read: three models, texts, a recipe and two runs."""
    root = Path(mkdtemp(prefix="smolseek-fuzz-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    inputs = root / "inputs"
    (root / "work" / "beside").mkdir(parents=True)
    (root / "work" / "beside" / "precious.txt").write_text("stays")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": ENTRIES}
    save(StockModel(tiny_llama(**sizes, eos_token_id=1)), inputs / "dense", tokenizer_from=kind_of_tokenizer("adds"))
    (inputs / "dense" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "do_sample": True}))
    write_gguf(dense_folder(inputs / "for gguf"), root / GGUF)
    shutil.rmtree(inputs / "for gguf")
    spare = kind_of_tokenizer("adds")
    spare.add_tokens([f"<extra{number}>" for number in range(300)])
    for folder, tokenizer in zip(OTHER_TOKENIZERS, (kind_of_tokenizer("sentencepiece"), spare), strict=True):
        tokenizer.save_pretrained(root / folder)
    write_stories(inputs / "text.txt", 20)
    (inputs / "prompt.txt").write_text("Anna sees\n")
    (inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), inputs / "rows.parquet")
    (inputs / "recipe.yaml").write_text(RECIPE)
    (inputs / "heal.yaml").write_text(HEAL)
    with chdir(root):
        for command in ([*CONVERT, TEXT], ["train", "inputs/recipe.yaml", "--runs", "work/runs"]):
            outcome = call(command)
            assert outcome.status == 0, outcome
    shutil.move(root / OUT, inputs / "v3")
    shutil.copytree(root / RUN, root / RESUMED)
    return root
