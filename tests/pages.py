"""The commands of README.md and of the pages under docs/, and a folder in which they run on tiny stand-ins."""

import functools
import io
import itertools
import re
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smolseek.checkpoint.hub import save
from smolseek.cli import VERBS, main, parse_verb
from smolseek.conversion.pipeline import convert
from smolseek.data.documents import Document
from smolseek.data.sources import PythonSource
from smolseek.model import StockModel
from tests.factories import tiny_llama
from tests.gguf_files import write_gguf
from tests.text import ENTRIES, tiny_tokenizer, write_stories

ROOT = Path(__file__).parent.parent
DENSE = ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "llama-folder", "builtin:base")
"""Names of dense checkpoints on the pages: folders of these names hold a tiny Llama."""
SIZES = {"vocab_size": ENTRIES, "head_dim": 64, "max_position_embeddings": 128}
"""Of that Llama: heads as wide as SmolLM2's, so that every profile fits. It writes windows of 128 tokens, not 512."""
CONVERTED = ("smol-v3", "runs/quickstart/model")
"""Names of converted ones: so do these folders, but on pages that convert into them."""
SHORT = {
    "train": "--train.steps 2 --train.window-tokens 16 --train.warmup-steps 1 --data.shuffle-windows 8 "
    "--data.held-out-share 0.2 --data.held-out-tokens 200 --sample.max-new-tokens 4",
    "convert": "--calibration-windows 4 --calibration-window-tokens 32 --refine-steps 2 --distill-steps 2",
    "generate": "--max-new-tokens 4",
    "chat": "--max-new-tokens 4",
}
"""Options behind a command that make it short; the command itself is run as it stands on the page."""
NOT_RUN = {
    r"make ": "makes an environment; tests/test_run.py runs the recipe",
    r"(python -m )?pip ": "installs packages",
    r"torchrun .* -m smolseek convert ": "several processes: tests/conversion/test_together.py",
    r"torchrun ": "several processes: tests/training/test_processes.py",
    r".* --device cuda": "needs a GPU",
    r".*\b(smollm2|scratch)-135m\.yaml": "its text is streamed from the hub",
    r".* --tasks ": "the tasks' data is on the hub: tests/evaluation/test_tasks.py",
    r"smolseek push (?!.*--dry-run)": "uploads: tests/checkpoint/test_push.py",
    r"python benchmarks/healing\.py": "many runs: tests/benchmarks/test_healing.py",
    r"python benchmarks/same_bytes\.py": "many conversions",
    r"python benchmarks/gpu\.py": "minutes: tests/benchmarks/test_gpu_bench.py",
    r"pytest ": "runs tests",
    r"python docs/serving/": "needs llama.cpp or a server: tests/test_serving.py",
    r"(llama-|vllm |echo |python -m sglang|transformers |sbatch |kubectl )": "another program",
}
"""Commands that are read and not run, and why."""


def commands(text: str) -> list[str]:
    """The lines of a page's ```sh blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def page_files(text: str) -> dict[str, str]:
    """The files that pages hold: ```yaml blocks whose first line is a comment with a name."""
    return dict(re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@functools.cache
def _workshop() -> tempfile.TemporaryDirectory[str]:
    """What the commands of the pages find beside them, made once: checkpoints, texts, recipes."""
    kept = tempfile.TemporaryDirectory()
    folder = Path(kept.name)
    for name in DENSE:
        save(StockModel(tiny_llama(**SIZES)), folder / name, tokenizer_from=tiny_tokenizer())
    write_gguf(folder / DENSE[0], folder / "model.gguf")
    for seed, name in enumerate(("my-text.txt", "held-out.txt", "other-text.txt")):
        write_stories(folder / name, seed=seed)
    (folder / "prompt.txt").write_text("Anna sees", encoding="utf-8")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name in CONVERTED:
        convert(folder / DENSE[0], folder / name, calibration=folder / "my-text.txt", refine_steps=0)
    return kept


def walk(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], files: str = ""
) -> set[str]:
    """Run a page's commands one after the other in `folder`, read those that are not run, and return the verbs that
    were run; `files` is the text of the pages whose files lie beside them."""
    _furnish(folder, page, monkeypatch)
    for name, content in page_files(files).items():
        (folder / name).write_text(content, encoding="utf-8")
    ran = set()
    for line in commands(page):
        if why_not_run(line):
            read(line)
        else:
            ran.add(_run(line, monkeypatch, capsys))
    return ran


def _furnish(folder: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to `folder`, and put there what a page's commands find beside them, and not what they make."""
    shutil.copytree(_workshop().name, folder, symlinks=True, dirs_exist_ok=True)
    for name in CONVERTED:
        if re.search(rf"^smolseek convert \S+ {name} ", page, re.MULTILINE):
            shutil.rmtree(folder / name)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("smolseek.checkpoint.source.BUILTIN_BASE", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(folder / "assets"))
    monkeypatch.setattr(PythonSource, "records", functools.partialmethod(_beginnings, PythonSource.records))


def _beginnings(
    source: PythonSource, records: Callable[..., Iterator[tuple[Any, Document | None]]], position: Any
) -> Iterator[tuple[Any, Document | None]]:
    """Some of the built-in documents, cut short."""
    for following, document in itertools.islice(records(source, position), 30):
        yield following, document and document._replace(text=document.text[:500])


def why_not_run(line: str) -> str | None:
    """The reason, or None for a command that is run."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, line)), None)


def as_verb(line: str) -> list[str] | None:
    """A command as arguments of smolseek: its own, or train.py's by python or torchrun; None: another program's."""
    words = shlex.split(line)
    if words[0] == "smolseek":
        return words[1:]
    if words[0] == "torchrun" and "smolseek" in words:
        return words[words.index("smolseek") + 1 :]
    return ["train", *words[words.index("train.py") + 1 :]] if "train.py" in words else None


def _run(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command, which must end well, and return its verb."""
    arguments = as_verb(line)
    assert arguments is not None, f"{line}: neither smolseek's nor train.py's; say in NOT_RUN why it is not run"
    monkeypatch.setattr("sys.stdin", io.StringIO("Anna sees\n"))
    status = main([*arguments, *_short(arguments)])
    refused = status == 1 and arguments[0] == "check"  # that is its answer
    assert status == 0 or refused, f"{line}: {capsys.readouterr().err}"
    return arguments[0]


def _short(arguments: list[str]) -> list[str]:
    """Options that make a command short; of a recipe that converts, its conversion too."""
    verb, *rest = arguments
    options = shlex.split(SHORT.get(verb, ""))
    if verb == "train" and parse_verb(VERBS[verb][0], verb, rest).convert:
        options += [option.replace("--", "--convert.") for option in shlex.split(SHORT["convert"])]
    return options


def read(line: str) -> None:
    """Look every part of a command up that is not run: options, targets, extras, scripts."""
    words, arguments = shlex.split(line), as_verb(line)
    if arguments is not None:
        parse_verb(VERBS[arguments[0]][0], arguments[0], arguments[1:])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), line
    elif "pip" in words:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        named = [name for group in re.findall(r"\[(.*?)\]", line) for name in group.split(",")]
        assert set(named) <= set(extras), line
    elif words[0] == "pytest" or (words[0] == "python" and words[1] != "-m"):
        assert (ROOT / words[1]).is_file(), line
