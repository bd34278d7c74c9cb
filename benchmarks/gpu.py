"""What one GPU gives, in one command of a few minutes: tests, converting, training, healing, decoding, a run's start.

Of training also: attention over packed windows, by kernel and by mask.

python benchmarks/gpu.py [--parts convert train] [--minutes 8] [--compare-cpu] [--source FOLDER] [--out NAME]
python benchmarks/gpu.py --device cpu --small

It needs the checkout and nothing else: weights are random, texts are Python's own. Every row says first what the
device allows: its peak of products and its bandwidth, by smolseek/machine.py, and the counts of smolseek/planning/.
For a conversion that is what `smolseek plan` says, for decoding the time to read active weights and cache once, for a
training step that of its products (causal attention counted half) and of AdamW's reads and writes. A row is kept when
it ends. Rows that are missing or failed are measured when the same command runs again. No row begins after --minutes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import decode
import torch
import train_step
import tyro
from circumstances import circumstances, command_line
from convert import SHAPES, SMOLLM2, Stages, write_checkpoint
from rows import Row, Rows, present
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config

from smolseek.checkpoint.hub import load_tokenizer
from smolseek.checkpoint.source import read_config, resolve_folder
from smolseek.config import ConvertSettings, DataSettings, Recipe, SampleSettings, load_recipe, recipes_folder
from smolseek.conversion.pipeline import convert
from smolseek.conversion.target import target_config
from smolseek.data.tokenizer import train_tokenizer
from smolseek.formats.dense import read_source
from smolseek.machine import Machine, measure_machine
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.packed import document_blocks, has_kernel
from smolseek.model.transformer import attention_mask
from smolseek.numerics.precision import compute_dtype
from smolseek.planning import plan
from smolseek.training.start import corpus_tokenizer, random_model
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Interrupted, Progress, Watcher

ROOT = Path(__file__).parent.parent
TESTS_SECONDS = 180
"""The most that the tests may take, so that the other rows have time too."""
ADAMW_NUMBERS = 7
"""What AdamW moves for a parameter: weight, gradient and two moments are read, all but the gradient written."""
BUILTIN = DataSettings(held_out_tokens=2048)
OURS, PEER = train_step.OURS, "grouped_mm"


@dataclass(frozen=True)
class Sizes:
    """What is measured."""

    source: dict[str, Any] = field(default_factory=lambda: SMOLLM2 | SHAPES["135M"])
    """config.json of the dense model."""
    convert: dict[str, Any] = field(default_factory=lambda: {"refine_steps": 300, "distill_steps": 600})
    """Settings of the conversion."""
    text: str | None = None
    """File of the checkout to calibrate on, in place of --calibration."""
    train: dict[str, Any] = field(default_factory=lambda: {"sequences": (2048,), "step_tokens": 16384, "layers": 30})
    """Settings of benchmarks/train_step.py."""
    trained: tuple[tuple[str, str], ...] = (
        (OURS + train_step.COMPILED, "bfloat16"),
        (PEER + train_step.COMPILED, "bfloat16"),
        (OURS, "bfloat16"),
        (PEER, "bfloat16"),
        (OURS + train_step.COMPILED, "autocast"),
    )
    """Its competitors and their precisions: transformers' grouped_mm is for bf16 weights, our trainer's are fp32."""
    packed: tuple[int, int, int] = (8, 2048, 256)
    """Windows, tokens in each, and tokens of a document in them, that one attention block reads."""
    heal: dict[str, Any] = field(default_factory=lambda: {"batch_windows": 32, "window_tokens": 512})
    """Settings of recipes/heal.yaml's training."""
    heal_steps: int = 40
    """Steps of healing."""
    heal_compiled: tuple[bool, ...] = (False, True)
    """Whether its blocks are compiled; a row for each."""
    decode: dict[str, Any] = field(default_factory=lambda: {"layers": 30, "rounds": 3, "steps": 8})
    """Settings of benchmarks/decode.py."""
    cells: tuple[tuple[int, int], ...] = tuple((b, s) for s in (4096, 512, 32768) for b in (64, 1, 8))
    """Batches and cached tokens of decoding."""
    scratch: dict[str, Any] = field(default_factory=dict)
    """Changes of the model of recipes/scratch-135m.yaml."""
    entries: int = 49152
    """Its vocabulary."""
    scratch_steps: int = 200
    """Its first steps."""


FULL = Sizes()
SMALL = Sizes(
    source=FULL.source
    | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    convert={"refine_steps": 4, "distill_steps": 4},
    text="README.md",
    train={"sequences": (64,), "step_tokens": 128, "layers": 2, "hidden": 64, "rounds": 2},
    trained=((OURS, "float32"), (PEER, "float32")),
    packed=(2, 32, 8),
    heal={"batch_windows": 2, "window_tokens": 32},
    heal_steps=4,
    heal_compiled=(False,),
    decode={"layers": 1, "rounds": 1, "steps": 2},
    cells=((2, 64),),
    scratch={"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2},
    entries=300,
    scratch_steps=4,
)

Part = Literal["tests", "convert", "train", "packed", "heal", "decode", "scratch"]
EVERY_PART: tuple[Part, ...] = ("tests", "convert", "train", "packed", "heal", "decode", "scratch")


@dataclass(frozen=True)
class OneGpu:
    """Measure what one GPU gives."""

    parts: tuple[Part, ...] = EVERY_PART
    """What to measure, in this order."""
    minutes: float = 8
    """No row begins after that."""
    source: Path | None = None
    """Dense checkpoint to convert; none: random weights of SmolLM2-135M's shape."""
    calibration: tuple[str, ...] = ("builtin:python",)
    """Text for the conversion."""
    tokenizer: Path | None = None
    """Folder of the tokenizer of the run from random weights; none: one is trained on its text."""
    compare_cpu: bool = False
    """Also convert in a few steps on the device and on the CPU, and compare the losses."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
    small: bool = False
    """Tiny sizes, to see that everything runs."""
    sizes: tyro.conf.Suppress[Sizes] = FULL
    """What is measured."""
    out: str = "run"
    """NAME in results/DATE-gpu-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report and JSON lines go."""
    work: Path = Path("runs/gpu")
    """Where a temporary folder holds models and runs until they are measured."""


class Bench:
    """The rows so far, and the rates of the device that all of them were measured on."""

    def __init__(self, mine: OneGpu, work: Path) -> None:
        self.mine, self.work, self.sizes, self.device = mine, work, mine.sizes, mine.device
        self.config = read_config(resolve_folder(str(mine.source))) if mine.source else mine.sizes.source
        name = torch.cuda.get_device_name() if mine.device == "cuda" and torch.cuda.is_available() else mine.device
        self.machine: Machine = measure_machine(mine.device)
        free = ("parts", "minutes", "compare_cpu", "results", "work")
        self.rows = Rows(mine.results, f"gpu-{mine.out}", mine, free=free)
        if not self.rows.find(device_name=name):
            if self.rows.rows:
                raise ValueError(
                    f"{self.rows.path.name}: was measured on another device ({name} now); name another --out"
                )
            self.rows.add(device_name=name, **dataclasses.asdict(self.machine))

    @functools.cached_property
    def source(self) -> Path:
        """The folder of the dense model."""
        if self.mine.source:
            return resolve_folder(str(self.mine.source))
        write_checkpoint(self.config, self.work / "source", None)
        return self.work / "source"

    def step_seconds(
        self, config: DeepseekV3Config, windows: int, tokens: int, *, teacher: int = 0, number_bytes: int = 4
    ) -> float:
        """Returns the least seconds of a training step.

        `teacher` is the number of a teacher's parameters; the optimizer's numbers have `number_bytes` each.
        """
        flops = train_step.flops_per_step(config, windows * tokens, tokens) + 2 * teacher * windows * tokens
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in DeepseekV3(config).parameters())
        moved = ADAMW_NUMBERS * number_bytes * parameters
        return flops / self.machine.flops_per_second + moved / self.machine.bytes_per_second


@dataclass(frozen=True)
class Measurement:
    """One row to come."""

    what: str
    unit: str
    allows: Callable[[], float | None]
    """What the device allows; None where nothing is predicted."""
    run: Callable[[], Row]
    """Returns the row's `value` (None: it cannot be measured here), and a `note` and details if there are any."""


# -- what is measured -------------------------------------------------------------------------------------------------


def gpu_tests(bench: Bench) -> Iterator[Measurement]:
    """Yields the tests that need a CUDA device."""

    def run() -> Row:
        if bench.device == "cpu":
            return {"value": None, "note": "skipped: they need a CUDA device"}
        marked = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rf", "-p", "no:cacheprovider", *marked]
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_SECONDS, check=False)
        print(told.stdout[-4000:], flush=True)
        return counted(told.stdout)

    yield Measurement("tests with the mark gpu", "passed", lambda: None, run)


def counted(told: str) -> Row:
    """Returns what pytest's last line counts, and which tests failed.

    Raises:
        ValueError: it counts nothing.
    """
    last = told.strip().rpartition("\n")[2]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    if not counts:
        raise ValueError(f"pytest: {told.strip()[-200:] or 'said nothing'}")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", told, re.MULTILINE)
    note = ", ".join([*(f"{count} {kind}" for kind, count in counts.items()), *failed])
    return {"value": counts.get("passed", 0), "counts": counts, "failed": failed, "note": note}


def conversion(bench: Bench) -> Iterator[Measurement]:
    """Yields the conversion at half the cache, by stage; and in a few steps on both devices."""
    out, text = bench.work / "converted", bench.mine.calibration
    if bench.sizes.text:
        text = (str(shutil.copy(ROOT / bench.sizes.text, bench.work / "text.txt")),)
    fields = {"cache": 0.5, "calibration": text, **bench.sizes.convert}

    def planned() -> float:
        return plan(bench.config, ConvertSettings(**fields), bench.machine).convert.seconds

    def run() -> Row:
        stages = Stages(bench.device)
        convert(bench.source, out, device=bench.device, force=True, on_progress=stages.on_progress, **fields)
        stages.end()
        note = ", ".join(f"{s['stage']} {s['seconds']:.1f} s, {s['peak_bytes'] / 1e9:.2f} GB" for s in stages.rows)
        peak = max(s["peak_bytes"] for s in stages.rows)
        row = {"value": sum(s["seconds"] for s in stages.rows), "peak_bytes": peak, "note": note, **losses(out)}
        return row | {"stages": stages.rows}

    def compare_devices() -> Row:
        few = fields | {"refine_steps": 2, "distill_steps": 2, "calibration_windows": 4}
        by_device = {}
        for device in ("cpu", bench.device):
            by_device[device] = losses(convert(bench.source, out, device=device, force=True, **few))["losses"]
        pairs = [(loss, by_device[bench.device][stage]) for stage, loss in by_device["cpu"].items()]
        return {"value": max(abs(there / here - 1) for here, there in pairs), "losses": by_device}

    yield Measurement("convert at half the cache", "seconds", planned, run)
    if bench.mine.compare_cpu:
        yield Measurement("a loss against the CPU's", "largest share", lambda: None, compare_devices)


def losses(folder: Path) -> Row:
    """Returns the losses of a conversion by stage."""
    return {"losses": json.loads((folder / "conversion.json").read_text(encoding="utf-8"))["losses"]}


def training(bench: Bench) -> Iterator[Measurement]:
    """Yields a training step with experts: ours and transformers'."""
    comparison = train_step.Comparison(device=bench.device, **bench.sizes.train)
    tokens, total = comparison.sequences[0], comparison.step_tokens

    def allows(cell: train_step.Cell) -> float:
        config, size = train_step.config_of(comparison, cell, PEER), 2 if cell.precision == "bfloat16" else 4
        return total / bench.step_seconds(config, total // tokens, tokens, number_bytes=size)

    def run(name: str, cell: train_step.Cell) -> Row:
        row = train_step.measure_cell(comparison, cell, [name], bench.machine.flops_per_second)[0]
        note = f"MFU {row['mfu']:.0%}, first loss {row['loss']:.3f}"
        return {"value": total / statistics.median(row.pop("seconds")), "note": note, **row}

    for name, precision in bench.sizes.trained:
        cell = train_step.Cell("8x512", tokens, precision)
        what = f"train, {tokens:,} tokens, {precision}: {'' if name.startswith(OURS) else 'transformers, '}{name}"
        yield Measurement(what, "tokens/s", functools.partial(allows, cell), functools.partial(run, name, cell))


def packed(bench: Bench) -> Iterator[Measurement]:
    """Yields forward and backward of an attention block over windows of several documents: kernel and mask."""
    config = DeepseekV3Config(**target_config(read_source(bench.config), ConvertSettings(cache=0.5)))
    windows, tokens, document = bench.sizes.packed
    device = torch.device(bench.device)
    dtype = compute_dtype(device, "auto")
    query_width = config.qk_nope_head_dim + config.qk_rope_head_dim

    def allows() -> float:
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in MultiheadLatentAttention(config, 0).parameters())
        products = config.num_attention_heads * (query_width + config.v_head_dim) * (document / 2)
        return bench.machine.flops_per_second / (6 * (weights + products))

    def run(kernel: bool) -> Row:
        if kernel and not has_kernel(device, dtype, query_width, config.v_head_dim):
            return {"value": None, "note": "does not run here for these heads: the mask does it"}
        block = MultiheadLatentAttention(config, 0).to(device, dtype)
        x_BTD = torch.randn(windows, tokens, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
        angles = torch.zeros(1, tokens, 1, config.qk_rope_head_dim // 2, device=device)
        segments_BT = (torch.arange(tokens, device=device) // document).expand(windows, -1)
        mask = document_blocks(segments_BT) if kernel else attention_mask(tokens, segments_BT, None)

        def step() -> None:
            block(x_BTD, (angles.cos(), angles.sin()), mask).sum().backward()

        seconds = [train_step.seconds_of(step, bench.device) for _ in range(7)]
        return {"value": windows * tokens / statistics.median(seconds[2:])}

    for kernel in (True, False) if bench.device == "cuda" else (False,):
        what = f"packed, {windows} windows of {tokens:,}, documents of {document}: {'kernel' if kernel else 'mask'}"
        yield Measurement(what, "tokens/s", allows, functools.partial(run, kernel))


def healing(bench: Bench) -> Iterator[Measurement]:
    """Yields healing with the dense teacher, by recipes/heal.yaml."""
    recipe = load_recipe(recipes_folder() / "heal.yaml")
    train = dataclasses.replace(recipe.train, **bench.sizes.heal)
    quiet = dataclasses.replace(recipe, data=BUILTIN, sample=SampleSettings(every=0, prompts=()))
    target = target_config(read_source(bench.config), ConvertSettings(cache=0.5))
    windows, tokens = train.batch_windows, train.window_tokens

    def allows() -> float:
        teacher = plan(bench.config, ConvertSettings(cache=0.5), bench.machine).source.total_parameters
        return windows * tokens / bench.step_seconds(DeepseekV3Config(**target), windows, tokens, teacher=teacher)

    def run(compiled: bool) -> Row:
        torch.manual_seed(0)
        dtype = compute_dtype(torch.device(bench.device), train.precision)
        teacher = StockModel(AutoModelForCausalLM.from_config(AutoConfig.for_model(**bench.config), dtype=dtype).eval())
        return train_for(
            bench,
            dataclasses.replace(quiet, train=dataclasses.replace(train, compile=compiled)),
            DeepseekV3(DeepseekV3Config(**target)),
            train_tokenizer(["bytes"], 300),
            bench.sizes.heal_steps,
            teacher.to(bench.device),
        )

    for compiled in bench.sizes.heal_compiled:
        what = f"heal, {windows} windows of {tokens:,}{train_step.COMPILED if compiled else ''}"
        yield Measurement(what, "tokens/s", allows, functools.partial(run, compiled))


def decoding(bench: Bench) -> Iterator[Measurement]:
    """Yields decoding at several batches and cached lengths: ours, transformers' V3 and the dense model."""
    dtype: Any = "bfloat16" if bench.device == "cuda" else "float32"
    names = (decode.OURS, decode.V3, decode.DENSE)
    comparison = decode.Comparison(device=bench.device, competitors=names, dtype=dtype, **bench.sizes.decode)
    models = functools.cache(lambda: decode.Models(comparison))

    def allows(name: str, batch: int, cached: int) -> float:
        return batch * bench.machine.bytes_per_second / decode.bytes_read(comparison, models(), name, batch, cached)

    def run(name: str, batch: int, cached: int) -> Row:
        seconds = decode.measure_cell(comparison, models(), [name], batch, cached)[name]
        return {"value": batch / statistics.median(seconds), "step_seconds": seconds}

    for cell in bench.sizes.cells:
        for name in names:
            what = f"decode, batch {cell[0]}, {cell[1]:,} cached: {name}"
            yield Measurement(
                what, "tokens/s", functools.partial(allows, name, *cell), functools.partial(run, name, *cell)
            )


def scratch(bench: Bench) -> Iterator[Measurement]:
    """Yields the first steps of recipes/scratch-135m.yaml, on Python's own text."""
    loaded, entries = load_recipe(recipes_folder() / "scratch-135m.yaml"), bench.sizes.entries
    recipe = dataclasses.replace(
        loaded,
        model=loaded.model | bench.sizes.scratch,
        tokenizer=None,
        train_tokenizer_entries=entries,
        data=BUILTIN,
        sample=SampleSettings(every=0, prompts=()),
    )
    windows, tokens = recipe.train.batch_windows, recipe.train.window_tokens

    def allows() -> float:
        sizes = {key: value for key, value in recipe.model.items() if key != "model_type"}
        return windows * tokens / bench.step_seconds(DeepseekV3Config(vocab_size=entries, **sizes), windows, tokens)

    def run() -> Row:
        tokenizer = load_tokenizer(bench.mine.tokenizer) if bench.mine.tokenizer else corpus_tokenizer(recipe)
        tokenizer.add_tokens([f"<unused {number}>" for number in range(entries - len(tokenizer))])
        return train_for(bench, recipe, random_model(recipe, tokenizer), tokenizer, bench.sizes.scratch_steps)

    yield Measurement(f"scratch-135m, first {bench.sizes.scratch_steps} steps", "tokens/s", allows, run)


def train_for(
    bench: Bench,
    recipe: Recipe,
    model: DeepseekV3 | StockModel,
    tokenizer: Any,
    steps: int,
    teacher: StockModel | None = None,
) -> Row:
    """Returns tokens per second of a run's first steps, the median without the first quarter, and their losses."""
    folder = bench.work / "run"
    trainer = Trainer(model.to(bench.device), tokenizer, recipe, folder, teacher=teacher)
    told: list[Progress] = []
    with contextlib.suppress(Interrupted):
        trainer.fit(Watcher(on_step=told.append, should_stop=lambda: len(told) >= steps))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    waits = logged[-1]["data_wait_share"]
    shutil.rmtree(folder)
    note = f"loss {told[0].loss:.3f} to {told[-1].loss:.3f}, {waits:.0%} of the time waiting for text"
    speeds = [step.tokens_per_second for step in told[steps // 4 :]]
    return {"value": statistics.median(speeds), "losses": [round(step.loss, 4) for step in told], "note": note}


PARTS: dict[Part, Callable[[Bench], Iterator[Measurement]]] = {
    "tests": gpu_tests,
    "convert": conversion,
    "train": training,
    "packed": packed,
    "heal": healing,
    "decode": decoding,
    "scratch": scratch,
}


def compare(mine: OneGpu) -> Rows:
    """Measure everything that has no row yet, until the time is over."""
    end = time.monotonic() + 60 * mine.minutes
    mine.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=mine.work) as work:
        bench = Bench(mine, Path(work))
        for measurement in (measurement for part in mine.parts for measurement in PARTS[part](bench)):
            if any("error" not in row for row in bench.rows.find(what=measurement.what)):
                continue
            if time.monotonic() > end:
                print(f"  {mine.minutes:g} minutes are over: the same command goes on with the rows that are missing")
                break
            keep(bench, measurement)
    return bench.rows


def keep(bench: Bench, measurement: Measurement) -> None:
    """Say what the device allows, measure, and keep the row; one that fails is kept as failed, and the others go on."""
    begin, on_gpu = time.monotonic(), bench.device == "cuda"
    row: Row = {"what": measurement.what, "unit": measurement.unit}
    try:
        row["allows"] = measurement.allows()
        allows = f"{row['allows']:,.1f} {row['unit']}" if row["allows"] else "not predicted"
        print(f"  {row['what']}: the device allows {allows}", flush=True)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row |= measurement.run()
    except torch.OutOfMemoryError:
        row |= {"value": None, "note": "out of memory"}
    except Exception as error:  # noqa: BLE001  (whatever one row breaks on, the minutes of the GPU are for the others)
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    row = {"seconds": time.monotonic() - begin, "peak_bytes": peak} | row
    bench.rows.add(**row)
    print(f"  {row['what']}: {measured(row)} {row['unit']}, {row['seconds']:.0f} s; {told_of(row)}", flush=True)
    torch.compiler.reset()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def measured(row: Row) -> str:
    """Returns the value of a row as text."""
    value = row.get("value")
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def told_of(row: Row) -> str:
    """Returns what a row says beside its value."""
    return row.get("error") or row.get("note") or ""


# -- report -----------------------------------------------------------------------------------------------------------


def report(mine: OneGpu, rows: list[Row], command: str) -> str:
    """Returns the rows as Markdown, and how they stand to the targets if the sizes are those of the targets."""
    device = next(row for row in rows if "device_name" in row)
    about = (
        f"{device['device_name']}: {device['flops_per_second'] / 1e12:.2f} TFLOP/s, "
        f"{device['bytes_per_second'] / 1e9:.0f} GB/s. What the device allows was said before each row; a conversion's "
        "is what `smolseek plan` says."
    )
    header = ["", "unit", "the device allows", "measured", "share", "seconds", "peak, GB", ""]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in {row["what"]: row for row in rows if "what" in row}.values():  # the last one of each name
        allows, value, peak = row.get("allows"), row.get("value"), row["peak_bytes"]
        cells = [row["what"], row["unit"], f"{allows:,.1f}" if allows else "", measured(row)]
        cells += [f"{_share(row):.0%}" if allows and value else "", f"{row['seconds']:.0f}"]
        cells += [f"{peak / 1e9:.2f}" if peak else "", told_of(row).replace("|", "/")]
        lines.append("| " + " | ".join(cells) + " |")
    sections = [f"# One GPU: {mine.out}", f"`{command}`", circumstances(), about, "\n".join(lines)]
    if mine.sizes == FULL:
        told = [f"| {what} | {asked} | {is_now} |" for what, asked, is_now in targets(rows)]
        sections += ["## Targets on an H100", "\n".join(["| | asked | measured |", "|---|---|---|", *told])]
    return "\n\n".join(sections) + "\n"


def _share(row: Row) -> float:
    """Returns the measured speed over the one that the device allows."""
    return row["allows"] / row["value"] if row["unit"] == "seconds" else row["value"] / row["allows"]


def targets(rows: list[Row]) -> Iterator[tuple[str, str, str]]:
    """Returns what is asked for on an H100 and what was measured, "" where rows are missing."""
    values = {row["what"]: row["value"] for row in rows if row.get("value") is not None}
    stages = next((row["stages"] for row in rows if "stages" in row), [])
    names = [stage["stage"] for stage in stages]
    behind = names.index("end-to-end KL") if "end-to-end KL" in names else len(names)
    for what, asked, part in (
        ("closed form and 300 refinement steps", 90, stages[:behind]),
        ("with 600 steps of KL", 240, stages),
    ):
        yield what, f"<= {asked} s", f"{sum(stage['seconds'] for stage in part):.0f} s" if part else ""

    def best(*pieces: str) -> float | None:
        return max((value for what, value in values.items() if all(piece in what for piece in pieces)), default=None)

    def ratio(*pieces: str, theirs: str) -> str:
        ours, others = best(*pieces, f": {decode.OURS}"), best(*pieces, theirs)
        return f"{ours / others:.2f}x" if ours and others else ""

    trained = ratio("train,", "bfloat16", theirs=": transformers")
    yield "training against transformers' best", ">= 2x", trained
    healed = best("heal,")
    yield "healing with the teacher", ">= 150,000 tokens/s", f"{healed:,.0f} tokens/s" if healed else ""
    decoded = ratio("decode, batch 64, 4,096 cached", theirs=decode.V3)
    yield "decoding at batch 64, 4,096 cached, against transformers", ">= 3x", decoded


def main() -> int:
    """Measure, write the report, print it."""
    mine = tyro.cli(OneGpu, description=__doc__)
    mine = dataclasses.replace(mine, sizes=SMALL) if mine.small else mine

    def measure() -> tuple[Path, str, None]:
        rows = compare(mine)
        return rows.path, report(mine, rows.rows, command_line()), None

    return present(measure, plots=False)


if __name__ == "__main__":
    sys.exit(main())
