"""Reads the folders of runs and conversions into plain data, without local paths: a report is meant for others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolseek.checkpoint.source import read_conversion
from smolseek.formats.paths import plain_name, plain_names

Record = dict[str, Any]
JUDGED = ("tokens", "dense_perplexity", "perplexity", "ratio", "kl", "agreement")
_NOT_JSON = "{path}: not JSON as smolseek writes it; repair or remove it"


@dataclass(frozen=True)
class Conversion:
    """The contents of a converted folder's conversion.json."""

    name: str
    source: str
    cache_share: float
    """Size of the key-value cache over that of the source."""
    losses: dict[str, float]
    """Loss by stage on text kept aside; `dense` is the dense model's. Empty if there was no calibration."""
    layers: list[dict[str, float]]
    """Errors of each layer under their names in conversion.json."""
    settings: Record
    versions: dict[str, str]
    judged: list[tuple[str, dict[str, float]]]
    """Texts that nothing was learnt from, each with the numbers in `JUDGED`."""


@dataclass(frozen=True)
class Run:
    """The contents of a run's folder; the run may have ended, be going on or have been interrupted."""

    name: str
    lines: list[Record]
    """The lines of metrics.jsonl."""
    summary: Record = field(default_factory=dict)
    """The contents of summary.json; empty until the run has ended."""
    recipe: Record = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    conversion: Conversion | None = None
    control: Run | None = None
    """The dense source, trained on the same tokens."""

    @property
    def models(self) -> dict[str, Record]:
        """The summary's entries for models: dense, converted, healed ..."""
        return {name: row for name, row in self.summary.items() if isinstance(row, dict) and "loss" in row}

    @property
    def layers(self) -> list[str]:
        """The layers with experts."""
        return list(next((line["load"] for line in self.lines if "load" in line), {}))

    @property
    def samples(self) -> dict[str, list[tuple[int, str]]]:
        """For each prompt the (step, text) pairs that were drawn while training."""
        drawn: dict[str, list[tuple[int, str]]] = {}
        for line in self.lines:
            if "sample" in line:
                drawn.setdefault(line["sample"]["prompt"], []).append((line["step"], line["sample"]["text"]))
        return drawn

    def series(self, *path: str) -> tuple[list[float], list[Any]]:
        """Returns the steps whose lines have a value under the keys `path`, and those values."""
        steps, values = [], []
        for line in self.lines:
            value: Any = line
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                steps.append(line["step"])
                values.append(value)
        return steps, values


def read_folders(folders: Sequence[Path]) -> tuple[list[Run], list[Conversion]]:
    """Returns the runs and the conversions in folders, under distinct names; conversions inside of runs are included.

    Raises:
        ValueError: a folder that is neither a run nor a conversion, or a file in it that cannot be read.
    """
    runs, conversions = [], []
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        if any((folder / file).is_file() for file in ("metrics.jsonl", "run.json")):
            runs.append(read_run(folder, name))
        elif (folder / "conversion.json").is_file():
            conversions.append(_conversion(folder, name))
        else:
            raise ValueError(
                f"{folder}: neither a run (metrics.jsonl) nor a converted folder (conversion.json); name one of those"
            )
    return runs, [run.conversion for run in runs if run.conversion] + conversions


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Returns each folder's name, with as many of its parents as distinguish it from the others.

    Raises:
        ValueError: a folder is named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for folder, own in zip(folders, parts, strict=True):
        if parts.count(own) > 1:
            raise ValueError(f"{folder}: named twice; name every folder once")
    counts = [next(n for n in range(1, 1 + len(own)) if _is_unique_ending(own[-n:], parts)) for own in parts]
    return ["/".join(own[-count:]) for own, count in zip(parts, counts, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Returns the contents of a run's folder.

    Raises:
        ValueError: a file in it cannot be read.
    """
    converted, control, about = folder / "converted", folder / "dense", _read_json(folder / "run.json")
    return Run(
        name,
        read_metrics(folder / "metrics.jsonl"),
        summary=_read_json(folder / "summary.json"),
        recipe=plain_names(about.get("recipe", {})),
        versions=about.get("versions", {}),
        conversion=_conversion(converted, name) if (converted / "conversion.json").is_file() else None,
        control=Run(f"{name}, dense", read_metrics(control / "metrics.jsonl")) if control.is_dir() else None,
    )


def read_metrics(path: Path) -> list[Record]:
    """Returns the lines of a metrics.jsonl; none if there is no file.

    A last line that is incomplete, because the run was killed while writing it, is left out.

    Raises:
        ValueError: another line is no record of a step.
    """
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = []
    for number, text in enumerate(texts, start=1):
        line = _parse(text)
        if line is not None and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            raise ValueError(f"{path}: line {number} is no record of a step; repair or remove it")
    return lines


def _conversion(folder: Path, name: str) -> Conversion:
    """Returns the contents of a converted folder's conversion.json.

    Raises:
        ValueError: it cannot be read, or lacks what smolseek writes.
    """
    path = folder / "conversion.json"
    try:
        tree = read_conversion(folder) or {}
    except ValueError as error:
        raise ValueError(_NOT_JSON.format(path=path)) from error
    try:
        return Conversion(
            name,
            plain_name(tree["source"]),
            tree["cache"]["numbers_per_token"] / tree["cache"]["source_numbers_per_token"],
            dict(tree["losses"]),
            [{"layer": index, **layer} for index, layer in enumerate(tree["layers"])],
            plain_names(dict(tree["settings"])),
            dict(tree["versions"]),
            [
                (plain_name(record["source"]), {name: float(record[name]) for name in JUDGED})
                for record in tree.get("judged", ())
            ],
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not as smolseek writes it ({error}); convert again") from error


def fair_shares(loads: Iterable[Sequence[float]]) -> list[list[float]]:
    """Returns the experts' shares of the choices at each step as multiples of the fair share, 1 / experts."""
    return [[share * len(step) for share in step] for step in loads]


def _is_unique_ending(end: tuple[str, ...], parts: Sequence[tuple[str, ...]]) -> bool:
    """Returns whether exactly one path ends in `end`."""
    return sum(own[-len(end) :] == end for own in parts) == 1


def _read_json(path: Path) -> Record:
    """Returns the mapping in a JSON file; empty if there is no file."""
    if not path.is_file():
        return {}
    tree = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if tree is None:
        raise ValueError(_NOT_JSON.format(path=path))
    return tree


def _parse(text: str) -> Record | None:
    try:
        tree = json.loads(text)
    except (RecursionError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
