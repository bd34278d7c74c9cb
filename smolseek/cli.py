"""The command line: reads arguments, calls the library, prints; decides nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from smolseek.config import ConvertSettings, Recipe, load_recipe, recipes_folder

Device = Literal["cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Plan:
    """Say what a conversion would give, from a config.json alone: sizes, cache, time, and each runtime's verdict."""

    source: tyro.conf.Positional[str]
    """Folder, config.json, hub id, builtin:base, or a recipe (.yaml)."""
    settings: tyro.conf.OmitArgPrefixes[ConvertSettings] = field(default_factory=ConvertSettings)
    heal_tokens: int = 10_000_000
    """Tokens of healing to estimate the time of."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Convert:
    """Turn a dense Llama-family checkpoint into a stock DeepSeek-V3 folder."""

    source: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    settings: tyro.conf.OmitArgPrefixes[ConvertSettings] = field(default_factory=ConvertSettings)
    force: bool = False
    """Replace OUT if it exists."""


@dataclass(frozen=True)
class Train(Recipe):
    """Run a recipe: convert its source (or start from random weights), train, compare, and print a table."""

    resume: bool = False
    """Go on with the run in its folder."""
    force: bool = False
    """Throw an earlier run of this name away."""
    device: Device = "cpu"
    """Where to train."""
    runs: Path = Path("runs")
    """Where run folders live."""


@dataclass(frozen=True)
class Data(Recipe):
    """Say what a recipe's text is (data stats RECIPE): documents, tokens, malformed lines, first rows."""

    limit: int = 2000
    """Documents to read of a hub data set; local sources are read to their end."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Generate:
    """Continue a prompt."""

    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base: DeepSeek-V3, or any causal model."""
    prompt: str | None = None
    """Text to continue; left out: read from standard input."""
    max_new_tokens: int = 128
    """Length of the continuation."""
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int | None = None
    """Draw from the k likeliest tokens."""
    top_p: float | None = 0.95
    """Draw from the smallest set of tokens with this much probability."""
    min_p: float | None = None
    """Draw from tokens at least this likely, relative to the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens seen before less likely."""
    seed: int | None = None
    """Same seed, same text."""
    device: Device = "cpu"
    """Where to run."""
    dtype: Dtype = "float32"
    """Of the weights in memory."""


@dataclass(frozen=True)
class Chat(Generate):
    """Talk to a model, by its chat template where it has one; an empty line or Ctrl-D ends."""


@dataclass(frozen=True)
class Eval:
    """Perplexity and bits per byte of a folder on text files, through stock transformers."""

    folder: tyro.conf.Positional[str]
    """Folder, hub id or builtin:base of any causal model."""
    text: tuple[str, ...]
    """Files or globs (.txt, .jsonl, .parquet), or builtin:python (its held-out split)."""
    separator: str = "<|endoftext|>"
    """What stands between the documents of a text file."""
    text_column: str = "text"
    """Field of a JSON line or Parquet row that holds the text."""
    json: bool = False
    """Print JSON."""
    device: Device = "cpu"
    """Where to run."""
    dtype: Dtype = "float32"
    """Of the weights in memory."""


VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for a user's mistake, said in one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(
            "usage: smolseek VERB [--help]\n\n" + "\n".join(f"  {v:9} {_first_line(k)}" for v, (k, _) in VERBS.items())
        )
        return 0
    if verb == "--version":
        from smolseek import __version__

        print(__version__)
        return 0
    if verb not in VERBS:
        return _fail(f"{verb}: no such verb; there are {', '.join(VERBS)}")
    kind, run = VERBS[verb]
    try:
        run(_parse(kind, verb, arguments[1:]))
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(str(error))
    except _Stopped as stopped:
        print(f"smolseek: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"smolseek: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").splitlines()[0]


def _parse(kind: type, verb: str, arguments: list[str]) -> Any:
    """Arguments of one verb; `train` and `data stats` read their defaults from a recipe named first."""
    if kind not in (Train, Data):
        return _tyro(kind, f"smolseek {verb}", arguments)
    if kind is Data:
        if arguments[:1] not in (["stats"], ["--help"], ["-h"]):
            raise ValueError("data: say what about it, data stats RECIPE; see smolseek data --help")
        verb, arguments = "data stats", arguments[1:] if arguments[0] == "stats" else arguments
    if arguments and not arguments[0].startswith("-"):
        recipe, arguments = load_recipe(arguments[0]), arguments[1:]
    else:
        recipe = load_recipe(recipes_folder() / "quickstart.yaml")
    default = kind(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(Recipe)})
    return _tyro(kind, f"smolseek {verb} [RECIPE]", arguments, default=default)


def _tyro(kind: type, program: str, arguments: list[str], **options: Any) -> Any:
    """tyro's answer, its boxed error message as one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=program, args=arguments, config=(tyro.conf.AvoidSubcommands,), **options)
    except SystemExit as stopped:
        if stopped.code:
            raise ValueError(_one_line(said.getvalue(), program)) from None
        raise


def _one_line(box: str, program: str) -> str:
    """What an error box says: its first section, and the nearest known option where it names one."""
    lines = [line.strip(" │╭╮╰╯") for line in box.splitlines()]
    dividers = [number for number, line in enumerate(lines) if set(line) == {"─"}] or [len(lines)]
    said = " ".join(line for line in lines[: dividers[0]] if line and not line.startswith("─"))
    near = next((line.split()[0] for line in lines if box.count("Perhaps you meant") and line.startswith("--")), None)
    return f"{said}; {f'did you mean {near}? ' if near else ''}see {program} --help"


# -- the verbs --------------------------------------------------------------------------------------------------------


def _plan(command: Plan) -> None:
    from smolseek.checkpoint.source import read_config_of
    from smolseek.planning import measure_machine, plan, render

    settings, source = command.settings, command.source
    if source.endswith((".yaml", ".yml")):
        recipe = load_recipe(source)
        if recipe.source is None:
            raise ValueError(f"recipe {source}: has no source to plan for; name a checkpoint or its config.json")
        settings, source = recipe.convert or settings, recipe.source
    result = plan(read_config_of(source), settings, measure_machine(), heal_tokens=command.heal_tokens)
    print(json.dumps(result.to_dict(), indent=2) if command.json else render(result))


def _convert(command: Convert) -> None:
    _quiet()
    from smolseek.conversion.pipeline import convert

    with _stage_bars() as on_progress:
        out = convert(
            command.source, command.out, settings=command.settings, force=command.force, on_progress=on_progress
        )
    report = json.loads((out / "conversion.json").read_text(encoding="utf-8"))
    judged = report["calibration"].get("judged_tokens", 0)
    for stage in ("dense", "closed_form", "refined", "distilled"):
        if stage in report["losses"]:
            print(f"{stage.replace('_', ' '):12} loss {report['losses'][stage]:.4f} on {judged:,} tokens kept aside")
    print(f"{out}: a stock DeepSeek-V3 folder, in {report['seconds']:.0f} s; next: smolseek eval {out} --text FILE")


def _train(command: Train) -> None:
    _quiet()
    from tqdm import tqdm

    from smolseek.road import table, travel
    from smolseek.training.loop import Interrupted, Progress, Watcher

    recipe = Recipe(**{f.name: getattr(command, f.name) for f in dataclasses.fields(Recipe)})
    _check_device(command.device)
    folder = command.runs / recipe.name
    leads = os.environ.get("RANK", "0") == "0"  # of torchrun's processes one speaks
    bar: tqdm[Any] | None = None

    def on_stage(stage: str) -> None:
        nonlocal bar
        if bar is not None:
            bar.close()
            bar = None
        if leads:
            print(f"[{recipe.name}] {stage}", flush=True)

    def on_step(progress: Progress) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=progress.steps, initial=progress.step - 1, unit="step", mininterval=1.0, disable=not leads)
        bar.total = progress.steps  # fewer when a stage ended early
        held_out = "" if progress.held_out_loss is None else f", held out {progress.held_out_loss:.4f}"
        bar.set_postfix_str(
            f"loss {progress.loss:.4f}{held_out}, {progress.tokens_per_second:,.0f} tok/s", refresh=False
        )
        bar.update()

    # The bar stands while steps are being trained: then a signal waits for the step's end, and the state is saved.
    with _stop_signals(defer=lambda: bar is not None) as received:
        watcher = Watcher(on_stage, on_step, lambda: bool(received))
        try:
            summary = travel(
                recipe, folder, device=command.device, resume=command.resume, force=command.force, watcher=watcher
            )
        except Interrupted as stopped:
            raise _Stopped(str(stopped), received[0] if received else signal.SIGTERM) from None
        finally:
            if bar is not None:
                bar.close()
    if not leads:
        return
    print(f"\n{table(summary)}\n\nThe folder: {folder / 'model'} (stock: any transformers loads it)")
    print("Talk to it: smolseek generate " + str(folder / "model") + " --prompt 'The function returns'")
    print("A real one: python train.py recipes/smollm2-135m.yaml (SmolLM2-135M from the hub, 12,001 steps)")


def _data(command: Data) -> None:
    _quiet()
    from smolseek.checkpoint.hub import load_tokenizer
    from smolseek.checkpoint.source import TOKENIZER_FILES, resolve_folder
    from smolseek.data.statistics import measure_data, render
    from smolseek.training.start import corpus_tokenizer

    name = command.tokenizer or command.source
    if name is None and not command.train_tokenizer_entries:
        raise ValueError("recipe: no tokenizer to count with; set tokenizer, source or train_tokenizer_entries")
    tokenizer = (
        load_tokenizer(resolve_folder(name, only=("config.json", *TOKENIZER_FILES)))
        if name
        else corpus_tokenizer(command)
    )
    statistics = measure_data(command, tokenizer, limit=command.limit)
    print(json.dumps(statistics.to_dict(), indent=2) if command.json else render(statistics))


def _generate(command: Generate) -> None:
    _quiet()
    prompt = sys.stdin.read() if command.prompt is None else command.prompt
    model, tokenizer = _model(command)
    _print_stream(model, tokenizer, prompt, command, echo=prompt)


def _chat(command: Chat) -> None:
    _quiet()
    model, tokenizer = _model(command)
    messages: list[dict[str, str]] = []
    transcript = ""
    while text := _ask():
        if tokenizer.chat_template:
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:  # a base model: the conversation is one text that it continues
            prompt = transcript + text + "\n"
        reply = _print_stream(model, tokenizer, prompt, command)
        messages.append({"role": "assistant", "content": reply})
        transcript = prompt + reply + "\n"


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _print_stream(model: Any, tokenizer: Any, prompt: str, command: Generate, echo: str = "") -> str:
    """Print the continuation as it comes and return it."""
    import torch

    from smolseek.data.windows import encode_document
    from smolseek.generation import stream

    template = bool(getattr(tokenizer, "chat_template", None)) and isinstance(command, Chat)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if template else encode_document(tokenizer, prompt)
    if not ids:
        raise ValueError("prompt: empty, and the tokenizer has no BOS token to start from; give some text")
    print(echo, end="", flush=True)
    new: list[int] = []
    shown = ""
    for token in stream(
        model,
        torch.tensor([ids], device=command.device),
        max_new_tokens=command.max_new_tokens,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        min_p=command.min_p,
        repetition_penalty=command.repetition_penalty,
        seed=command.seed,
        eos_token_id=model.config.eos_token_id,
    ):
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=True)
        if not text.endswith("�"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(new, skip_special_tokens=True)
    print(text[len(shown) :])
    return text


def _eval(command: Eval) -> None:
    _quiet()
    from tqdm import tqdm

    from smolseek.checkpoint.hub import load_for_evaluation, load_tokenizer
    from smolseek.checkpoint.source import resolve_folder
    from smolseek.config import DataSettings
    from smolseek.data.windows import held_out_documents, pack
    from smolseek.evaluation import measure_quality

    _check_device(command.device)
    folder = resolve_folder(command.folder)
    builtin = command.text == ("builtin:python",)
    texts = {"train" if builtin else "held_out": command.text}
    settings = DataSettings(separator=command.separator, text_column=command.text_column, **texts)  # type: ignore[arg-type]
    ids_T, text_bytes = pack(load_tokenizer(folder), held_out_documents(settings))
    model = load_for_evaluation(folder, dtype=_dtype(command.dtype), device=command.device)
    with tqdm(unit="window", disable=command.json or not sys.stderr.isatty()) as bar:

        def on_window(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        quality = measure_quality(model, ids_T, text_bytes, on_window=on_window)
    print(
        json.dumps(quality.to_dict())
        if command.json
        else "\n".join(f"{k:14} {v}" for k, v in quality.to_dict().items())
    )


# -- shared -----------------------------------------------------------------------------------------------------------


class _Stopped(Exception):
    """A run ended by a signal, its state saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


@contextlib.contextmanager
def _stop_signals(defer: Callable[[], bool]) -> Iterator[list[int]]:
    """Signals noted inside the block: while `defer` holds, the first SIGINT or SIGTERM waits; else it stops at once."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received or not defer():
            raise _Stopped("stopped; go on with --resume", number)
        received.append(number)

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _stage_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for each stage of a conversion, on a terminal's standard error."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def on_progress(stage: str, done: int, count: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=count, desc=stage, disable=not sys.stderr.isatty())
        bars[stage].update(done - bars[stage].n)

    try:
        yield on_progress
    finally:
        for bar in bars.values():
            bar.close()


def _model(command: Generate) -> tuple[Any, Any]:
    from smolseek.checkpoint.hub import load, load_tokenizer

    _check_device(command.device)
    return load(command.folder, dtype=_dtype(command.dtype), device=command.device), load_tokenizer(command.folder)


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _check_device(device: str) -> None:
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[device]:
        raise ValueError(f"--device {device}: not available here; use {', '.join(d for d in there if there[d])}")


def _quiet() -> None:
    """Only warnings of ours; no progress bars or advice from the libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


VERBS |= {
    "plan": (Plan, _plan),
    "convert": (Convert, _convert),
    "train": (Train, _train),
    "data": (Data, _data),
    "generate": (Generate, _generate),
    "chat": (Chat, _chat),
    "eval": (Eval, _eval),
}
