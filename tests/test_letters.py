"""Shape letters: what tensors' names end in is in the one legend, docs/contributing.md, "Shape letters"."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

SECTION = (
    (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8").split("## Shape letters\n")[1].split("\n## ")[0]
)
LETTERS = set(re.findall(r"`(\w)`", SECTION)) | set("0123456789")
FILES = sorted((ROOT / "smolseek").rglob("*.py"))


def suffixes(code: str) -> set[tuple[str, str]]:
    """The names in a file that end in letters of which one at least is a capital, with those letters."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {str(getattr(node, field)) for node in nodes for field in ("id", "arg", "attr") if hasattr(node, field)}
    found = (re.fullmatch(r"_*[a-z]\w*_(?=\w*[A-Z])([A-Za-z\d]+)", name) for name in names)
    return {(match[0], match[1]) for match in found if match}


def test_letters_are_in_the_legend():
    unknown = {
        f"{path.relative_to(ROOT)}: {name}": sorted(set(letters) - LETTERS)
        for path in FILES
        for name, letters in suffixes(path.read_text(encoding="utf-8"))
        if not set(letters) <= LETTERS
    }
    assert unknown == {}


def test_a_letter_that_is_not_in_the_legend_is_noticed():
    code = "def _f(hidden_BTD, row_1j, fisher_4k4k, LATENT_RMS, _Head):\n    self.up_k_HUC = nn.ReLU"
    assert suffixes(code) == {("hidden_BTD", "BTD"), ("up_k_HUC", "HUC")}
    assert {"B", "T", "D", "i", "4"} <= LETTERS and not {"j", "n"} & LETTERS
