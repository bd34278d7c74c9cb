"""Each expert's load in every layer over a run, as a picture.

python benchmarks/expert_load.py runs/NAME    # writes runs/NAME/expert-load.png
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

from rows import NEEDS_MATPLOTLIB


def loads(metrics: Path) -> tuple[list[int], dict[str, list[list[float]]]]:
    """The steps of a run's metrics.jsonl that say a load, and per layer the shares of the experts at each of them.

    Raises:
        ValueError: no such file, or no expert layers in it.
    """
    if not metrics.is_file():
        raise ValueError(f"{metrics}: no such file; name the folder of a run")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "load" in line]
    if not steps:
        raise ValueError(f"{metrics}: no load of experts in it; the run trained a model without expert layers")
    layers = {layer: [line["load"][layer] for line in steps] for layer in steps[0]["load"]}
    return [line["step"] for line in steps], layers


def draw(metrics: Path, path: Path) -> None:
    """A panel per layer: steps to the right, experts upwards, colour the load over its fair share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, layers = loads(metrics)
    columns = min(len(layers), math.ceil(math.sqrt(len(layers))))
    rows = math.ceil(len(layers) / columns)
    size = (3 * columns + 1, 2 * rows)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    image: Any = None
    for panel, (layer, shares) in zip(axes.flat, layers.items(), strict=False):
        experts = len(shares[0])
        ratios = [[step[expert] * experts for step in shares] for expert in range(experts)]
        edges = (steps[0], max(steps[-1], steps[0] + 1), -0.5, experts - 0.5)
        image = panel.imshow(
            ratios, aspect="auto", origin="lower", extent=edges, cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest"
        )
        panel.set_title(f"layer {layer}", fontsize=9)
    for panel in axes.flat[len(layers) :]:
        panel.set_visible(False)
    figure.supxlabel("step")
    figure.supylabel("expert")
    figure.colorbar(image, ax=axes, label="load over fair share")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def main() -> int:
    """Draws the run named on the command line."""
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: python benchmarks/expert_load.py RUN_FOLDER")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError(NEEDS_MATPLOTLIB)
        folder = Path(sys.argv[1])
        draw(folder / "metrics.jsonl", folder / "expert-load.png")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder / "expert-load.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
