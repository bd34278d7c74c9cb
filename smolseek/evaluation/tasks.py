"""Scores on public tasks by lm-eval, and the difference between two models' scores on the same documents."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolseek.evaluation.paired import Estimate, estimate, paired_difference, unpaired_difference
from smolseek.evaluation.quality import Model
from smolseek.model import StockModel

_BOOTSTRAP_SAMPLES = 1000
"""Draws for the standard error of metrics that are not a mean over documents."""


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    `by_document` holds each document's value by the document's number; it is None if the metric is no mean of them.
    """

    task: str
    metric: str
    value: Estimate
    by_document: Mapping[int, float] | None

    def minus(self, other: Score) -> Estimate:
        """Returns self - other; the difference is paired by document if both have values for the same documents."""
        ours, theirs = self.by_document, other.by_document
        if ours and theirs and ours.keys() == theirs.keys():
            return paired_difference([ours[n] for n in ours], [theirs[n] for n in ours])
        return unpaired_difference(self.value, other.value)


def find_tasks(names: Sequence[str], include_path: Path | None = None) -> Any:
    """Returns lm-eval's TaskManager for all of `names`: lm-eval's own tasks, and those in YAML files of `include_path`.

    Raises:
        ValueError: lm-eval is not installed, `include_path` is no folder, or a task is unknown.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--tasks: lm_eval is not installed; run pip install 'smolseek[eval]'")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path {include_path}: no such folder; name one with lm-eval's task files (.yaml)")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about options that we set ourselves
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager  # this way lm-eval's own task files, thousands of them, are not read
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            meant = f"did you mean {', '.join(near)}? " if near else ""
            raise ValueError(f"--tasks {name}: lm-eval knows no such task; {meant}a file of your own: --include-path")
    return manager


def score_tasks(
    model: Model, tokenizer: Any, names: Sequence[str], manager: Any, *, limit: int | None = None, batch_size: int = 8
) -> list[Score]:
    """Returns the scores of `model` on the tasks `names`, on the first `limit` documents of each.

    `manager` comes from `find_tasks`.

    Raises:
        ValueError: a model that unmodified transformers cannot run.
        OSError: a task's documents cannot be fetched.
    """
    if not isinstance(model, StockModel):
        raise ValueError("--tasks: a softmax-routed model is not stock DeepSeek-V3, and lm-eval runs stock models only")
    from lm_eval import simple_evaluate

    from smolseek.evaluation.shared_contexts import SharedContexts

    results = simple_evaluate(
        SharedContexts(pretrained=model.model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=_BOOTSTRAP_SAMPLES,
    )
    return [
        _score(task, key, values, results["samples"].get(task, []))
        for task, values in results["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]


def _score(task: str, key: str, values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Score:
    """Returns the score for one `metric,filter` key of lm-eval's results.

    The standard error comes from the documents' values if the metric is their mean, else from lm-eval.
    """
    metric, _, filtered = key.partition(",")
    own = {s["doc_id"]: s[metric] for s in samples if s["filter"] == filtered and metric in s}
    is_mean = bool(own) and all(isinstance(v, int | float) for v in own.values())
    if is_mean and math.isclose(statistics.fmean(own.values()), values[key], rel_tol=1e-6, abs_tol=1e-9):
        return Score(task, metric, estimate(list(own.values())), own)
    error = values.get(f"{metric}_stderr,{filtered}")
    return Score(task, metric, Estimate(values[key], error if isinstance(error, float) else None), None)
