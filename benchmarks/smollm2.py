"""What conversion keeps of a real model: perplexity, KL and zero-shot tasks against the dense model.

python benchmarks/smollm2.py --source FOLDER --texts NAME=FILE ... --calibration FILE ... --tasks FOLDER

Stock transformers loads every folder. Tokens are those of `tokenizer(text)`, without a BOS where the tokenizer adds
none; documents are joined by EOS. Every measurement is at once written as a JSON line, with the answer to each document
of the tasks, and the same command goes on from there. Converted and healed folders stay in `--work`.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from baselines import FEW_WINDOWS, Sizes, TransMLA, mean_loss, supports, ways_to_split, x_ecomla
from chat import QUESTIONS
from circumstances import command_line, without_folders
from rows import Row, Rows, present
from smollm2_report import plot, render
from torch import Tensor
from zero_shot import answer, write_tasks

from smolseek.checkpoint.hub import load_stock, load_tokenizer, save
from smolseek.checkpoint.source import read_config, resolve_folder
from smolseek.config import (
    SEPARATOR,
    ConvertSettings,
    DataSettings,
    Recipe,
    SampleSettings,
    TrainSettings,
    load_recipe,
    recipes_folder,
)
from smolseek.conversion.calibrate import read_calibration, read_named_text
from smolseek.conversion.job import read_job
from smolseek.conversion.pipeline import convert
from smolseek.conversion.target import target_config
from smolseek.conversion.work_folder import WorkFolder
from smolseek.data.splits import held_out_documents
from smolseek.evaluation import compare
from smolseek.formats.dense import read_source
from smolseek.model import StockModel
from smolseek.run import run_recipe
from smolseek.training.stages import step_tokens

Stage = Literal["closed", "converted", "healed", "baselines"]
WINDOWS = (512, 2048)
TRANSMLA, SVD = "TransMLA, gain repaired", "X-EcoMLA's initialisation"
DENSE = "dense"
EXPERTS: dict[str, dict[str, Any]] = {
    "carve 75%": {"experts": "carve", "active": 0.75, "exact": True},
    "upcycle + 50%": {"experts": "upcycle", "cache": 0.5},
}


@dataclass(frozen=True)
class RealModel:
    """Convert a real checkpoint in several sizes, and measure every stage against the dense model."""

    source: str
    """Dense checkpoint: a folder or hub id."""
    texts: tuple[str, ...]
    """Texts to measure on, NAME=FILE each; none may be calibrated or trained on."""
    calibration: tuple[str, ...] = ()
    """Text to calibrate on; none: the conversion's own."""
    sizes: tuple[str, ...] = ("50%", "31.25%", "256+64", "12.5%", "25%")
    """Sizes in their order: a share of the source's cache (SHARE%), RANK+ROPE, "carve 75%" (experts, exact attention),
    "upcycle + 50%" (experts, half the cache), or "dense", which healing trains on the same tokens without a teacher."""
    stages: tuple[Stage, ...] = ("closed", "converted", "healed", "baselines")
    """What to measure of each size, in this order; healed needs --heal-text."""
    heal_text: tuple[str, ...] = ()
    """Texts to heal on, in equal shares."""
    heal_tokens: tuple[int, ...] = (250_000, 1_000_000, 3_000_000)
    """Tokens of healing after which to measure; one run, given more steps each time."""
    heal_learning_rate: float | None = None
    """Peak learning rate of healing; none: that of recipes/heal.yaml."""
    heal_trains: Literal["all", "attention"] = "all"
    """Weights that healing trains."""
    heal_distill_weight: float | None = None
    """Weight of distillation in healing; 0: learn the text alone, as the dense model does; none: that of heal.yaml."""
    tasks: Path | None = None
    """Folder with the documents of the tasks, one JSONL file for each of benchmarks/tasks; none: no tasks."""
    task_rows: int = 500
    """Documents of each task, drawn over the whole of it; 0: no tasks."""
    tokens: int = 8192
    """Tokens to measure on in each text, in windows of 512."""
    long_tokens: int = 4096
    """Tokens to measure on in each text, in windows of 2,048; 0: none."""
    calibration_windows: int = ConvertSettings.calibration_windows
    """Windows of calibration text, for ours and the baselines alike."""
    calibration_window_tokens: int = ConvertSettings.calibration_window_tokens
    """Tokens in one of them."""
    refine_steps: int | None = None
    """Layer-wise steps; none: the conversion's own number."""
    distill_steps: int | None = None
    """End-to-end KL steps; none: the conversion's own number."""
    out: str = "smollm2"
    """NAME in results/DATE-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report, plot and JSON lines go."""
    work: Path = Path("runs/smollm2")
    """Where converted and healed folders go."""


class Remembering(StockModel):
    """The dense model, which computes each window once: all models are compared with it on the same windows."""

    def __init__(self, dense: StockModel) -> None:
        super().__init__(dense.model)
        self.end_token_ids = dense.end_token_ids
        self.hidden_by_ids: dict[tuple[int, ...], Tensor] = {}

    def hidden_states(self, input_ids: Tensor, **others: Any) -> Tensor:
        """Returns the hidden states of windows; not to be written to."""
        if others:
            return super().hidden_states(input_ids, **others)
        key = (*input_ids.shape, *input_ids.flatten().tolist())
        if key not in self.hidden_by_ids:
            self.hidden_by_ids[key] = super().hidden_states(input_ids)
        return self.hidden_by_ids[key]


class Bench:
    """The dense model, the texts, the tasks and the rows measured so far."""

    def __init__(self, mine: RealModel, task_folder: Path) -> None:
        self.mine, self.work = mine, mine.work / mine.out
        named = dict(text.partition("=")[::2] for text in mine.texts)
        if not all(named.values()):
            raise ValueError(f"texts {' '.join(mine.texts)}: must be NAME=FILE each; for example prose=prose.txt")
        if both := set(named.values()) & {*mine.calibration, *mine.heal_text}:
            raise ValueError(f"texts {min(both)}: is calibrated or trained on too; name text that no conversion sees")
        if "healed" in mine.stages and not mine.heal_text:
            raise ValueError("stages healed: there is no text to heal on; name some with --heal-text, or leave it out")
        self.folder = resolve_folder(mine.source)
        self.config = read_config(self.folder)
        self.source = read_source(self.config)
        self.sizes = {size: read_size(size, self.source.cache_numbers) for size in mine.sizes}
        self.tokenizer = load_tokenizer(self.folder)
        self.manager = write_tasks(mine.tasks, task_folder, mine.task_rows) if mine.tasks and mine.task_rows else None
        free = [name for name in vars(mine) if name.startswith("heal_")]
        self.kept = Rows(mine.results, mine.out, _without_folders(mine), ("sizes", "stages", *free, "results", "work"))
        self.chats = bool(self.tokenizer.chat_template)
        self.ids = {name: read_tokens(self.tokenizer, file, mine.tokens) for name, file in named.items()}
        self.dense = Remembering(load_stock(self.folder))
        self.rotated = functools.cache(lambda rope: TransMLA(self.dense.model, self.config, self.windows_BT, rope))

    def measure(self, model: StockModel, *, tasks: bool = True, **about: Any) -> None:
        """Keep the row of a model: distance from the dense one on every text, and its answers to the tasks."""
        row: Row = {"windows": {}}
        for size, tokens in zip(WINDOWS, (self.mine.tokens, self.mine.long_tokens), strict=True):
            if tokens:
                texts = {name: ids_T[:tokens] for name, ids_T in self.ids.items()}
                window = min(size, self.source.max_position_embeddings)
                by_text = compare(model, self.dense, texts, window_tokens=window).by_text
                row["windows"][str(size)] = {name: difference.to_dict() for name, difference in by_text.items()}
        row["tasks"] = answer(model, self.tokenizer, self.manager) if self.manager and tasks else {}
        self.kept.add(**about, **row)
        ratios = [math.exp(one["loss"] - one["teacher_loss"]) for one in row["windows"][str(WINDOWS[0])].values()]
        told = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"{about['size']} {about['stage']}, {about['tokens']:,} tokens: {told}", flush=True)

    def settings(self, **fields: Any) -> ConvertSettings:
        """Returns the settings of one conversion."""
        mine = self.mine
        own = {"refine_steps": mine.refine_steps, "distill_steps": mine.distill_steps}
        fields = {name: steps for name, steps in own.items() if steps is not None} | fields
        return ConvertSettings(
            calibration=mine.calibration,
            calibration_windows=mine.calibration_windows,
            calibration_window_tokens=min(mine.calibration_window_tokens, self.source.max_position_embeddings),
            **fields,
        )

    def converted(self, name: str, **fields: Any) -> tuple[Path, Row]:
        """Returns the folder of a conversion, which is made if it is not there, and what it says of itself."""
        folder = self.work / name
        if not folder.exists():
            convert(self.mine.source, folder, settings=self.settings(**fields))
        report, target = (json.loads((folder / f"{file}.json").read_text("utf-8")) for file in ("conversion", "config"))
        return folder, self.cache(Sizes(target["kv_lora_rank"], target["qk_rope_head_dim"])) | {
            "seconds": report["seconds"]
        }

    def cache(self, sizes: Sizes) -> Row:
        """Returns what a row says of its cache."""
        return {"cache": sum(sizes) / self.source.cache_numbers, "split": f"{sizes.rank}+{sizes.rope}"}

    @functools.cached_property
    def windows_BT(self) -> Tensor:
        """The text that the baselines calibrate on: the conversion's own."""
        job = read_job(
            self.mine.source, self.work / "text", self.settings(), device="cpu", force=True, on_progress=lambda *_: None
        )
        text = read_named_text(job)
        with WorkFolder(job.out, text.facts) as work:
            return read_calibration(job, text, work).moments_BT


def read_size(size: str, whole: int) -> dict[str, Any]:
    """Returns the conversion's settings of a size: SHARE%, RANK+ROPE or one of `EXPERTS`; none of "dense".

    Raises:
        ValueError: it is none of them, or not above 0 and at most the source's cache, `whole` numbers.
    """
    if size == DENSE or size in EXPERTS:
        return EXPERTS.get(size, {})
    rank, _, rope = size.partition("+")
    try:
        if size.endswith("%") and 0 < float(size[:-1]) <= 100:
            return {"cache": float(size[:-1]) / 100}
        if int(rank) > 0 and int(rope) > 0 and int(rank) + int(rope) <= whole:
            return {"kv_lora_rank": int(rank), "qk_rope_head_dim": int(rope)}
    except ValueError:
        pass
    named = ", ".join([*EXPERTS, DENSE])
    raise ValueError(f"sizes {size}: must be SHARE% or RANK+ROPE, at most {whole} in all, or {named}; for example 50%")


def read_tokens(tokenizer: Any, file: str, tokens: int) -> Tensor:
    """Returns the first tokens of a text, its documents joined by EOS."""
    ids: list[int] = []
    documents = held_out_documents(DataSettings(held_out=(file,), separator=SEPARATOR))
    for document in documents:
        ids += tokenizer(document.text[: 20 * tokens], verbose=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * document.ends  # a long text comes in parts
        if len(ids) >= tokens:
            break
    return torch.tensor(ids[:tokens])


def _without_folders(mine: RealModel) -> RealModel:
    """Returns the settings as the results show them."""
    texts, calibration = (tuple(map(without_folders, names)) for names in (mine.texts, mine.calibration))
    tasks = Path(without_folders(str(mine.tasks))) if mine.tasks else None
    source = without_folders(mine.source)
    return dataclasses.replace(mine, source=source, texts=texts, calibration=calibration, tasks=tasks)


# -- measurements -----------------------------------------------------------------------------------------------------


def measure(mine: RealModel) -> Bench:
    """Measure what has no row yet, the most telling first."""
    with tempfile.TemporaryDirectory() as task_folder:
        bench = Bench(mine, Path(task_folder))
        if not bench.kept.find(stage="dense"):
            bench.measure(bench.dense, size="", stage="dense", cache=1.0, split="", tokens=0, seconds=None)
        stages = {"closed": _closed, "converted": _converted, "healed": _healed, "baselines": _baselines}
        for size, fields in bench.sizes.items():
            for stage in mine.stages:
                if (size == DENSE and stage != "healed") or (size in EXPERTS and stage == "baselines"):
                    continue
                stages[stage](bench, size, fields)
    return bench


def _closed(bench: Bench, size: str, fields: dict[str, Any]) -> None:
    """Measure the closed form; its folder does not stay."""
    if not bench.kept.find(size=size, stage="closed"):
        folder, about = bench.converted(_file_name(size, "closed"), **fields | {"refine_steps": 0, "distill_steps": 0})
        bench.measure(load_stock(folder), size=size, stage="closed", tokens=0, **about)
        shutil.rmtree(folder)


def _converted(bench: Bench, size: str, fields: dict[str, Any]) -> None:
    """Measure what `convert` writes."""
    if not bench.kept.find(size=size, stage="converted"):
        folder, about = bench.converted(_file_name(size, "converted"), **fields)
        bench.measure(load_stock(folder), size=size, stage="converted", tokens=0, **about)


def _healed(bench: Bench, size: str, fields: dict[str, Any]) -> None:
    """Distil what `convert` writes, or train it or the dense model alone, and measure it after each number of tokens.

    One run is given more steps each time. So its learning rate has fallen to its end at every measurement, and rises
    again to where the longer schedule has it.
    """
    train = _heal_settings(bench.mine)
    train = dataclasses.replace(train, distill_weight=0.0) if size == DENSE else train
    rate, weight, trains = train.learning_rate, train.distill_weight, train.trains
    text = [*map(without_folders, bench.mine.heal_text)]
    stage = "healed" if weight else "trained"
    about: Row = {"size": size, "stage": stage, "text": text, "rate": rate, "trains": trains, "distill_weight": weight}
    run = bench.work / _file_name(size, f"{stage}-{trains}-{rate:g}-{weight:g}")
    for asked in sorted(bench.mine.heal_tokens):
        if bench.kept.find(**about, asked=asked):
            continue
        if size == DENSE:
            folder, facts = bench.folder, {"cache": 1.0, "split": ""}
        else:
            folder, facts = bench.converted(_file_name(size, "converted"), **fields)
        recipe = _heal_recipe(bench, folder, train, asked)
        began = time.perf_counter()
        run_recipe(recipe, run, resume=run.exists())
        facts |= {"seconds": time.perf_counter() - began, "tokens": recipe.train.steps * step_tokens(recipe.train)}
        bench.measure(load_stock(run / "model"), **about, asked=asked, **facts)


def _heal_settings(mine: RealModel) -> TrainSettings:
    """Returns the training of recipes/heal.yaml with what `mine` names."""
    named = {
        "learning_rate": mine.heal_learning_rate,
        "distill_weight": mine.heal_distill_weight,
        "trains": mine.heal_trains,
    }
    given = {field: value for field, value in named.items() if value is not None}
    return dataclasses.replace(load_recipe(recipes_folder() / "heal.yaml").train, **given)


def _heal_recipe(bench: Bench, start: Path, train: TrainSettings, tokens: int) -> Recipe:
    """Returns recipes/heal.yaml with this run's own settings; only its steps depend on `tokens`.

    A model with a chat template answers ten questions at the end, beside the converted one, for the report of the run.
    """
    mine, heal = bench.mine, load_recipe(recipes_folder() / "heal.yaml")
    window = min(train.window_tokens, bench.source.max_position_embeddings)
    train = dataclasses.replace(train, window_tokens=window, checkpoint_every=20, keep_last=1)
    first, steps = (math.ceil(count / step_tokens(train)) for count in (min(mine.heal_tokens), tokens))
    train = dataclasses.replace(train, steps=steps, warmup_steps=min(train.warmup_steps, first // 10))
    shares = (1.0,) * len(mine.heal_text)
    data = DataSettings(train=mine.heal_text, weights=shares, held_out_tokens=8192)
    sample = SampleSettings(every=0)
    if bench.chats:
        sample = dataclasses.replace(sample, prompts=QUESTIONS, chat=True, temperature=0.0)
    teacher = mine.source if train.distill_weight else None
    return dataclasses.replace(heal, source=str(start), teacher=teacher, data=data, train=train, sample=sample)


def _baselines(bench: Bench, size: str, fields: dict[str, Any]) -> None:
    """Measure each published method with as many numbers in its cache, at its best split on the calibration text.

    Its answers to the tasks are left out: behind such losses they are hardly better than chance, and take as long as a
    conversion.
    """
    if not supports(bench.dense.model):
        print("no baselines: they are written for models without biases and with RoPE in every layer", flush=True)
        return

    def transmla(split: Sizes) -> Any:
        return bench.rotated(split.rope).cut(split.rank).repaired

    def svd(split: Sizes) -> Any:
        return x_ecomla(bench.dense.model, bench.config, bench.windows_BT, split)

    methods: dict[str, Callable[[Sizes], Any]] = {SVD: svd, TRANSMLA: transmla}
    for what, method in methods.items():
        if bench.kept.find(size=size, stage=what):
            continue
        began = time.perf_counter()
        target = target_config(bench.source, bench.settings(**fields))
        total = target["kv_lora_rank"] + target["qk_rope_head_dim"]
        splits = ways_to_split(bench.source, total)
        losses = {split: mean_loss(method(split), bench.windows_BT[:FEW_WINDOWS]) for split in splits}
        best = min(splits, key=losses.__getitem__)
        folder = save(method(best), bench.work / "baseline", tokenizer_from=bench.folder, force=True)
        facts = bench.cache(best) | {"seconds": time.perf_counter() - began}
        bench.measure(load_stock(folder), tasks=False, size=size, stage=what, tokens=0, **facts)
        shutil.rmtree(folder)


def _file_name(size: str, stage: str) -> str:
    """Returns the name of a folder in the working folder."""
    return f"{size.replace('%', '').replace(' ', '')}-{stage}"


def main(mine: RealModel) -> int:
    """Measure, write the report and the plot, print the report."""

    def run() -> tuple[Path, str, Callable[[Path], None]]:
        bench = measure(mine)
        name = Path(without_folders(mine.source)).name
        about = f"`{command_line()}`"
        return bench.kept.path, render(name, about, bench.kept.rows), functools.partial(plot, name, bench.kept.rows)

    return present(run)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(RealModel, description=__doc__)))
