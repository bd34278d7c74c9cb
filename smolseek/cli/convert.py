"""The verbs plan and convert."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from smolseek.cli.shared import Device, progress_bars, quiet_libraries, said_once
from smolseek.config import ConvertSettings, ParallelSettings, load_recipe

if TYPE_CHECKING:
    from smolseek.numerics.shares import Shares

log = logging.getLogger(__name__)

_MOST_RATIO = 1.1  # of perplexities, without a warning


@dataclass(frozen=True)
class Plan:
    """Show what a conversion would give, from config.json alone: sizes, cache, time, and which runtimes load it."""

    source: tyro.conf.Positional[str]
    """Folder, config.json, hub id, builtin:base, GGUF file of a dense model, or a recipe (.yaml)."""
    settings: tyro.conf.OmitArgPrefixes[ConvertSettings] = field(default_factory=ConvertSettings)
    heal_tokens: int = 10_000_000
    """Training tokens after the conversion, for the estimate of the training time."""
    processes: int = 1
    """Number of processes that share the training, each on a GPU or machine like this one: for memory and time."""
    device: Device = "cpu"
    """Where the conversion and the training would run; it is measured, so it must be here."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class Convert:
    """Convert a dense Llama-family checkpoint to a stock DeepSeek-V3 folder."""

    source: tyro.conf.Positional[str]
    """Folder, hub id, builtin:base or GGUF file."""
    out: tyro.conf.Positional[Path]
    """Folder to write."""
    settings: tyro.conf.OmitArgPrefixes[ConvertSettings] = field(default_factory=ConvertSettings)
    judge: tuple[str, ...] = ()
    """Text that nothing is learnt from, named as calibration is: at the end the source and OUT are compared on up to
    8,192 tokens of each."""
    force: bool = False
    """Replace OUT if it exists."""
    device: Device = "cpu"
    """Where to compute."""


def run_plan(command: Plan) -> None:
    from smolseek.checkpoint.source import fetch_config
    from smolseek.machine import measure_machine
    from smolseek.planning import plan, render

    settings, source, train = command.settings, command.source, None
    if command.heal_tokens < 0:
        raise ValueError(f"heal_tokens {command.heal_tokens}: must be 0 or more")
    if source.endswith((".yaml", ".yml")):
        recipe = load_recipe(source)
        if recipe.source is None:
            raise ValueError(f"recipe {source}: has no source to plan for; name a checkpoint or its config.json")
        if recipe.convert and settings != ConvertSettings():
            raise ValueError(f"recipe {source}: its own key convert says what is planned; change it there")
        settings = recipe.conversion()[0] if recipe.convert else settings
        source, train = recipe.source, recipe.train
    result = plan(
        fetch_config(source),
        settings,
        measure_machine(command.device),
        heal_tokens=command.heal_tokens,
        train=train,
        processes=command.processes,
    )
    print(json.dumps(result.to_dict(), indent=2) if command.json else render(result))


def run_convert(command: Convert) -> int | None:
    """Convert, by all processes where torchrun started several; the leading one prints."""
    quiet_libraries()
    from smolseek.numerics.precision import check_device
    from smolseek.numerics.shares import FailedElsewhere
    from smolseek.training.processes import join_processes

    with said_once():
        check_device(command.device)
    try:
        with join_processes(ParallelSettings(), command.device) as (processes, device):
            out = _convert(command, device, processes.shares)
    except FailedElsewhere:
        return 2
    if processes.leads:
        _report(out, command)
    return None


def _convert(command: Convert, device: str, shares: Shares) -> Path:
    from smolseek.conversion.pipeline import convert

    with progress_bars() as on_progress:
        return convert(
            command.source,
            command.out,
            settings=command.settings,
            judge=command.judge,
            device=device,
            force=command.force,
            on_progress=on_progress,
            shares=shares,
        )


def _report(out: Path, command: Convert) -> None:
    """Print how good the folder is and what to do next."""
    from smolseek.checkpoint.source import read_conversion

    report = read_conversion(out)
    assert report is not None
    calibration = report["calibration"]
    apart = "kept aside" if calibration.get("judged_apart", True) else "that it learned from, for want of more text"
    for stage in ("dense", "closed_form", "refined", "distilled"):
        if stage in report["losses"]:
            loss, judged = report["losses"][stage], calibration["judged_tokens"]
            print(f"{stage.replace('_', ' '):12} loss {loss:.4f} on {judged:,} tokens {apart}")
    for judged in report.get("judged", ()):
        print(
            f"{judged['source']}: dense perplexity {judged['dense_perplexity']:.3f}, converted "
            f"{judged['perplexity']:.3f}, ratio {judged['ratio']:.3f}, KL {judged['kl']:.4f}, "
            f"same top token {judged['agreement']:.1%}"
        )
    cache = report["cache"]
    share = cache["numbers_per_token"] / cache["source_numbers_per_token"]
    print(
        f"{out}: a stock DeepSeek-V3 folder that keeps {share:.1%} of the cache, in {report['seconds']:.0f} s; next: "
        f"smolseek eval {shlex.quote(str(out))} --text FILE"
    )
    _warn_if_far(report, command)


def _warn_if_far(report: Mapping[str, Any], command: Convert) -> None:
    """Warns of a perplexity far above the dense model's, on the text where it is farthest, and says what to do."""
    from smolseek.conversion.judge import perplexity_ratios

    ratios = perplexity_ratios(report)
    if not ratios or max(ratios.values()) <= _MOST_RATIO:
        return
    text = max(ratios, key=ratios.__getitem__)
    log.warning(
        "%s: its perplexity is %.2f times the dense model's on %s; convert with more or other calibration text or with "
        "more of the cache, or heal it: smolseek train recipes/heal.yaml --source %s --teacher %s --data.train TEXT",
        *(command.out, ratios[text], text, *map(shlex.quote, (str(command.out), command.source))),
    )
