"""Small folders like those of runs and conversions, with numbers that tests can find on the page."""

import json
from pathlib import Path
from typing import Any

NASTY = '<script>alert(1)</script> & "Anna"'
VERSIONS = {"smolseek": "0.1.0", "torch": "9.8.7", "transformers": "6.5.4"}


def step_line(step: int, loss: float, experts: int = 4) -> dict[str, Any]:
    """Returns the line of metrics.jsonl of a logged step.

    Expert 0 gets twice its fair share in layer 1 and no token in layer 2.
    """
    rest = (1 - 2 / experts) / (experts - 1)
    load = {"1": [2 / experts] + [rest] * (experts - 1), "2": [0.0] + [1 / (experts - 1)] * (experts - 1)}
    return {
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3 / (step + 1),
        "tokens_per_second": 1234.5,
        "maxvio": {"1": 1.0, "2": 1 / 3},
        "load": load,
    }


def write_run(folder: Path, *, loss: float = 3.0, steps: int = 6, ended: bool = True, **changes: Any) -> Path:
    """Writes a run with experts, samples and a conversion; `changes` replace train settings of its recipe."""
    folder.mkdir(parents=True)
    lines = [step_line(step, loss - 0.01 * step) for step in range(steps)]
    specialised = {"weights": {"1": 0.5, "2": 0.6}, "routing": {"1": 0.1, "2": 0.2}}
    lines.append({"step": steps - 1, "held_out": {"loss": loss + 0.1234}, "experts": specialised})
    lines.append({"step": steps - 1, "sample": {"prompt": "Once <b>", "text": f"Once <b> {NASTY}"}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {"name": folder.name, "train": {"steps": steps, "learning_rate": 1e-3} | changes}
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "versions": VERSIONS, "processes": 1}))
    write_conversion(folder / "converted")
    if ended:
        (folder / "summary.json").write_text(json.dumps(summary(loss)))
    return folder


def summary(loss: float) -> dict[str, Any]:
    rows = {
        name: {
            "loss": value,
            "perplexity": 2.0**value,
            "cache_bytes_per_token": 640,
            "total_parameters": 1_234_567,
            "active_parameters": 234_567,
            "decode_tokens_per_second": 99.6,
            "samples": {"Once <b>": f"Once <b> says {name}"},
        }
        for name, value in (("dense", loss - 0.2), ("converted", loss + 0.3), ("healed", loss + 0.1))
    }
    return rows | {"maxvio": 0.187, "trained_tokens": 98_304, "held_out_tokens": 65_536}


def write_conversion(folder: Path, *, numbers: int = 48, source: str = "/somewhere/tiny", **changes: Any) -> Path:
    """Writes the conversion.json of two layers that keep `numbers` of 96 cached numbers; `changes` replace its keys."""
    folder.mkdir(parents=True)
    tree = {
        "source": source,
        "settings": {"experts": "none", "refine_steps": 10},
        "cache": {"source_numbers_per_token": 96, "numbers_per_token": numbers},
        "losses": {"dense": 2.0, "closed_form": 2.0 + 10 / numbers, "refined": 2.0 + 4 / numbers},
        "layers": [
            {"layer": layer, "attention_error": 0.3 + layer / 100, "attention_error_refined": 0.1 + layer / 100}
            for layer in range(2)
        ],
        "versions": VERSIONS,
    }
    (folder / "conversion.json").write_text(json.dumps(tree | changes))
    return folder
