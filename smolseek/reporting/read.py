"""What the folders of runs and conversions say, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """What the conversion.json of a converted folder says."""

    name: str
    source: str
    cache_share: float
    """Numbers in the key-value cache over the source's."""
    losses: dict[str, float]
    """By stage, on text kept aside; the dense model's under `dense`. Empty where nothing was calibrated."""
    layers: list[dict[str, float]]
    """Errors by their name in conversion.json."""
    settings: Record
    versions: dict[str, str]


@dataclass(frozen=True)
class Run:
    """What a run's folder says, of a run that goes on or was interrupted too."""

    name: str
    lines: list[Record]
    """metrics.jsonl."""
    summary: Record = field(default_factory=dict)
    """summary.json; empty until the run has ended."""
    recipe: Record = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    conversion: Conversion | None = None
    control: Run | None = None
    """The dense source trained on the same tokens."""

    @property
    def models(self) -> dict[str, Record]:
        """The rows of the summary: dense, converted, healed ..."""
        return {name: row for name, row in self.summary.items() if isinstance(row, dict) and "loss" in row}

    @property
    def layers(self) -> list[str]:
        """The layers with experts."""
        return list(next((line["load"] for line in self.lines if "load" in line), {}))

    @property
    def samples(self) -> dict[str, list[tuple[int, str]]]:
        """By prompt the (step, text) of what was drawn while training."""
        drawn: dict[str, list[tuple[int, str]]] = {}
        for line in self.lines:
            if "sample" in line:
                drawn.setdefault(line["sample"]["prompt"], []).append((line["step"], line["sample"]["text"]))
        return drawn

    def series(self, *path: str) -> tuple[list[float], list[Any]]:
        """The steps that say something under `path`, and what they say."""
        steps, values = [], []
        for line in self.lines:
            value: Any = line
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                steps.append(line["step"])
                values.append(value)
        return steps, values


def read(folders: Sequence[Path]) -> tuple[list[Run], list[Conversion]]:
    """The runs and the conversions in folders, those inside of runs too, named apart.

    Raises:
        ValueError: a folder that is neither, or a file in it that cannot be read.
    """
    runs, conversions = [], []
    for folder, name in zip(folders, distinct_names(folders), strict=True):
        if any((folder / file).is_file() for file in ("metrics.jsonl", "run.json")):
            runs.append(read_run(folder, name))
        elif (folder / "conversion.json").is_file():
            conversions.append(read_conversion(folder, name))
        else:
            raise ValueError(
                f"{folder}: neither a run (metrics.jsonl) nor a converted folder (conversion.json); name one of those"
            )
    return runs, [run.conversion for run in runs if run.conversion] + conversions


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's own name, with as many of its parents as it takes to tell it from the others.

    Raises:
        ValueError: a folder named twice.
    """
    parts = [folder.resolve().parts for folder in folders]
    for folder, own in zip(folders, parts, strict=True):
        if parts.count(own) > 1:
            raise ValueError(f"{folder}: named twice; name every folder once")
    counts = [next(n for n in range(1, 1 + len(own)) if _alone(own[-n:], parts)) for own in parts]
    return ["/".join(own[-count:]) for own, count in zip(parts, counts, strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """A run's folder.

    Raises:
        ValueError: a file in it that cannot be read.
    """
    converted, control, about = folder / "converted", folder / "dense", _read_json(folder / "run.json")
    return Run(
        name,
        read_metrics(folder / "metrics.jsonl"),
        summary=_read_json(folder / "summary.json"),
        recipe=about.get("recipe", {}),
        versions=about.get("versions", {}),
        conversion=read_conversion(converted, name) if (converted / "conversion.json").is_file() else None,
        control=Run(f"{name}, dense", read_metrics(control / "metrics.jsonl")) if control.is_dir() else None,
    )


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl, without a last one that a kill left half written; none when there is no file.

    Raises:
        ValueError: another line that is no record of a step.
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


def read_conversion(folder: Path, name: str) -> Conversion:
    """A converted folder, from its conversion.json.

    Raises:
        ValueError: it cannot be read, or lacks what smolseek writes.
    """
    path = folder / "conversion.json"
    tree = _read_json(path)
    try:
        return Conversion(
            name,
            _without_folder(tree["source"]),
            tree["cache"]["numbers_per_token"] / tree["cache"]["source_numbers_per_token"],
            dict(tree["losses"]),
            [{"layer": index, **layer} for index, layer in enumerate(tree["layers"])],
            dict(tree["settings"]),
            dict(tree["versions"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not as smolseek writes it ({error}); convert again") from error


def fair_shares(loads: Iterable[Sequence[float]]) -> list[list[float]]:
    """Shares of the choices as multiples of the fair share: expert by step, from step by expert."""
    return [[share * len(step) for share in step] for step in loads]


def perplexities(losses: dict[str, float]) -> dict[str, float]:
    """Of losses by stage."""
    return {stage: math.exp(min(loss, 700.0)) for stage, loss in losses.items()}


def _alone(end: tuple[str, ...], parts: Sequence[tuple[str, ...]]) -> bool:
    """Whether one path only ends so."""
    return sum(own[-len(end) :] == end for own in parts) == 1


def _read_json(path: Path) -> Record:
    """A JSON file's mapping, empty when there is no file."""
    if not path.is_file():
        return {}
    tree = _parse(path.read_text(encoding="utf-8", errors="replace"))
    if tree is None:
        raise ValueError(f"{path}: not JSON as smolseek writes it; repair or remove it")
    return tree


def _parse(text: str) -> Record | None:
    try:
        tree = json.loads(text)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


def _without_folder(source: str) -> str:
    """A hub id or builtin as it is, of a folder its name: a report says nothing of the machine."""
    return Path(source).name if source.startswith(("/", "~", ".")) else source
