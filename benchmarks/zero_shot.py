"""Zero-shot tasks on local documents: the task files of `benchmarks/tasks/`, and the answers that a model got right.

A folder of documents has NAME.jsonl for every task. A multiple-choice row has `query`, `choices` and `gold`; a row of
winogrande has `context_options`, `continuation` and `gold`; a row of lambada_openai has `context` and `continuation`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from smolseek.evaluation.paired import Estimate, estimate
from smolseek.evaluation.quality import Model
from smolseek.evaluation.tasks import Score, find_tasks, score_tasks
from smolseek.numerics.precision import autocast

TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "tasks").glob("*.yaml"))}
"""The task files by the tasks' names; DOCUMENTS and CACHE in them stand for paths."""
Answers = Mapping[str, str]
"""For each "task metric" a digit for every document: 1 where the model is right, else 0."""


def write_tasks(documents: Path, out: Path, rows: int) -> Any:
    """Returns lm-eval's TaskManager of all tasks, on `rows` documents of each, drawn over the whole of its file.

    The draw has a fixed seed, so that every model meets the same documents. `out` gets the drawn documents, the task
    files and the cache of the documents.

    Raises:
        ValueError: lm-eval is not installed, or a task has no file in `documents`.
    """
    for name, template in TEMPLATES.items():
        source = documents / f"{name}.jsonl"
        if not source.is_file():
            raise ValueError(f"--tasks {documents}: no {source.name} in it; it needs one for {', '.join(TEMPLATES)}")
        lines = source.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        drawn = sorted(random.Random(0).sample(range(len(lines)), min(rows, len(lines))))
        own = out / source.name
        own.write_text("".join(lines[number] + "\n" for number in drawn), encoding="utf-8")
        text = template.read_text(encoding="utf-8").replace("DOCUMENTS", json.dumps(str(own)))
        (out / template.name).write_text(text.replace("CACHE", json.dumps(str(out / "cache"))), encoding="utf-8")
    return find_tasks(list(TEMPLATES), out)


def answer(model: Model, tokenizer: Any, manager: Any) -> Answers:
    """Returns the answers of `model` to the tasks of a manager from `write_tasks`, in bf16 where that is fast."""
    answers = {}
    with autocast(torch.device("cpu"), "auto"):
        found = score_tasks(model, tokenizer, list(TEMPLATES), manager)
    for score in found:
        assert score.by_document is not None, f"{score.task} is scored by document"
        values = [score.by_document[number] for number in sorted(score.by_document)]
        answers[f"{score.task} {score.metric}"] = "".join(str(int(value)) for value in values)
    return answers


def scores(answers: Answers) -> dict[str, Score]:
    """Returns the score of each task."""
    found = {}
    for name, digits in answers.items():
        values = [float(digit) for digit in digits]
        found[name] = Score(*name.split(" "), estimate(values), dict(enumerate(values)))
    return found


def differences(ours: Answers, theirs: Answers) -> dict[str, Estimate]:
    """Returns ours - theirs for each task, paired by document."""
    mine, others = scores(ours), scores(theirs)
    return {name: mine[name].minus(others[name]) for name in mine}


def task_mean(estimates: Mapping[str, Estimate]) -> Estimate:
    """Returns the mean over tasks; the standard error is that of a mean of independent estimates."""
    errors = [one.error for one in estimates.values() if one.error is not None]
    error = math.hypot(*errors) / len(estimates) if len(errors) == len(estimates) else None
    return Estimate(statistics.fmean(one.mean for one in estimates.values()), error)
