"""The README's commands are run, the hub's model replaced by a tiny local one and the text by a small file."""

import re
import shlex
from pathlib import Path

import pytest

from smolseek.checkpoint.hub import save
from smolseek.cli import main
from smolseek.model import StockModel
from tests.factories import tiny_llama
from tests.text import ENTRIES, tiny_tokenizer, write_stories

ROOT = Path(__file__).parent.parent
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
SHORT = {
    "train": "--train.steps 2 --train.window-tokens 16 --train.warmup-steps 1 --data.shuffle-windows 8 "
    "--data.held-out-share 0.2 --data.held-out-tokens 200 --sample.max-new-tokens 4",
    "convert": "--calibration-windows 4 --calibration-window-tokens 32 --refine-steps 2 --distill-steps 2",
    "generate": "--max-new-tokens 4",
}


def test_the_two_commands_are_first():
    assert [line.split("#")[0].strip() for line in COMMANDS[:2]] == ["make run", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nrun:" in makefile and "\ntest:" in makefile


def test_the_walk_through_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), tmp_path / "tiny", tokenizer_from=tiny_tokenizer())
    write_stories(tmp_path / "my-text.txt")
    write_stories(tmp_path / "held-out.txt", seed=1)
    ran = []
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if words[:1] != ["smolseek"]:
            continue
        words = ["tiny" if word == "HuggingFaceTB/SmolLM2-135M" else word for word in words[1:]]
        words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
        assert main([*words, *shlex.split(SHORT.get(words[0], ""))]) == 0, (line, capsys.readouterr().err)
        ran.append(words[0])
    assert {"plan", "convert", "eval", "train", "generate"} <= set(ran)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python train.py")])
def test_train_commands_name_recipes_that_exist(line):
    recipe = shlex.split(line, comments=True)[2:3]
    assert not recipe or recipe[0].startswith("--") or (ROOT / recipe[0]).is_file()
