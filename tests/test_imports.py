"""Imports go one way: from each package to those that docs/contributing.md lists further up."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
LINES = re.search(r"Imports go one way:\n\n```text\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()
LEVELS = {name: level for level, line in enumerate(LINES) for name in line.split(", ")}


def part(path: Path) -> str:
    """The package, or the module at the top, that a file belongs to."""
    return path.relative_to(ROOT / "smolseek").with_suffix("").parts[0]


def imported(code: str) -> set[str]:
    """The packages and modules under smolseek that a file's code imports, at its head or inside functions."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module]
    return {match[1] for node in nodes if (match := re.match(r"smolseek\.(\w+)", node.module))}


def test_imports_go_one_way():
    edges = {
        (path.relative_to(ROOT).as_posix(), part(path), other)
        for path in (ROOT / "smolseek").rglob("*.py")
        for other in imported(path.read_text(encoding="utf-8")) - {part(path)}
        if not part(path).startswith("__")
    }
    assert len(edges) > 100
    assert {(file, other) for file, own, other in edges if LEVELS[other] >= LEVELS[own]} == set()


def test_an_import_inside_a_function_is_seen():
    assert imported("def f():\n    from smolseek.run import run_recipe\nfrom torch import nn") == {"run"}
