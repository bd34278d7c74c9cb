"""What makes upcycled copies differ? Trains each kind of routing and of symmetry breaking a little, prints a table.

    python benchmarks/upcycle_routing.py SOURCE TRAIN.txt HELD_OUT.txt [STEPS [SEEDS]]

Every variant starts as the dense model and sees the same batches. It differs from the dense model by the noise on its
routed experts (2% where its name gives none) and by the neurons that every copy draws anew. A seed draws router rows
(those of `convert` always have seed 0), noise, neurons and batches. Figures are means over SEEDS seeds (default 1) ±
half the range; `below dense` is the mean of the differences at equal seeds. Only the MLPs are trained, in the dense
model too: the exact attention holds a constant of 2^15, which no step may move. `swapped` is the rise of the held-out
loss when every token is sent to the next copy: 0 while the copies are interchangeable. `apart` is the mean distance
between two copies' weights over their norm.

Shapes: B windows, T tokens in each, N tokens in one row, D hidden_size, E n_routed_experts, g groups of experts
(copies), i moe_intermediate_size, J = 2 i, gate and up rows stacked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from convert_quality import mean_and_spread
from torch import Tensor

from smolseek import convert
from smolseek.checkpoint.hub import load, load_tokenizer
from smolseek.config import DataSettings
from smolseek.conversion.collect import collect_mlp_inputs
from smolseek.conversion.upcycle import balancing_bias
from smolseek.data.packing import pack
from smolseek.data.sources import open_sources
from smolseek.evaluation.specialisation import layer_weight_distances
from smolseek.model.balance import max_violation, take_expert_counts, update_biases
from smolseek.model.experts import MixtureOfExperts

WINDOW_TOKENS, BATCH_WINDOWS, HELD_OUT_WINDOWS = 256, 4, 64
LEARNING_RATE, BALANCE_SPEED = 5e-4, 1e-3


@dataclass(frozen=True)
class Variant:
    """How a variant differs from group-limited routing to one copy, with random router rows."""

    name: str
    noise: float = 0.02
    groups: int = 1
    normalised: bool = True
    clustered: bool = False
    """Keep the router that `convert` wrote."""
    redrawn: float = 0.0
    """Share of each copy's neurons whose weights are drawn anew, with the deviation of the old ones."""


VARIANTS = (
    Variant("one group, no noise", noise=0.0),
    Variant("one group"),
    Variant("one group, noise 10%", noise=0.1),
    Variant("one group, 5% redrawn", redrawn=0.05),
    Variant("one group, 20% redrawn", redrawn=0.2),
    Variant("two groups, k = 2G", groups=2),
    Variant("one group, not normalised", normalised=False),
    Variant("as converted: clustered rows", noise=0.0, clustered=True),
)


def main() -> None:
    """Print the table, each line as soon as all its seeds are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("source", "train", "held_out"):
        parser.add_argument(name, metavar=name.upper())
    for name, default in (("steps", 300), ("seeds", 1)):
        parser.add_argument(name, type=int, nargs="?", default=default, metavar=name.upper())
    given = parser.parse_args()
    source, train, held_out, steps, seeds = given.source, given.train, given.held_out, given.steps, given.seeds
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(source)
    train_BT, held_BT = (windows(tokenizer, name) for name in (train, held_out))
    held_BT = held_BT[:HELD_OUT_WINDOWS]
    columns = ("", "start", "loss", "below dense", "swapped", "apart", "MaxVio", "seconds")
    print("".join(f"{column:>17}" if column else f"{'':30}" for column in columns))
    with tempfile.TemporaryDirectory() as folder:
        out = convert(source, Path(folder) / "v3", exact=True, experts="upcycle", calibration=train)

        def rows(start: Callable[[int], Any]) -> list[dict[str, float]]:
            return [train_and_measure(start(seed), train_BT, held_BT, steps, seed) for seed in range(seeds)]

        def start(variant: Variant, seed: int) -> Any:
            model = load(out)
            prepare(model, variant, train_BT, seed)
            return model

        dense = rows(lambda seed: load(source))
        report("dense", dense, dense)
        for variant in VARIANTS:
            report(variant.name, rows(lambda seed, variant=variant: start(variant, seed)), dense)


def windows(tokenizer: Any, name: str) -> Tensor:
    """Returns the text's windows (B, T)."""
    settings = DataSettings(train=(name,))
    ids_T, *_ = pack(tokenizer, (document for _, document in open_sources(settings.train, settings).documents(None)))
    return ids_T[: len(ids_T) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)


def blocks(model: Any) -> Iterator[MixtureOfExperts]:
    """Returns the blocks of experts, first layer first."""
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))


@torch.no_grad()
def prepare(model: Any, variant: Variant, train_BT: Tensor, seed: int) -> None:
    """Give a model the routing, noise and redrawn neurons of a variant, in place."""
    generator = torch.Generator().manual_seed(seed)
    inputs = collect_mlp_inputs(model, train_BT[:32], 4096)
    for block, inputs_BTD in zip(blocks(model), inputs, strict=True):
        inputs_ND = inputs_BTD.flatten(0, 1)
        gate = block.gate
        per_copy = gate.num_experts // gate.n_group
        if not variant.clustered:
            rows_gD = random_rows(inputs_ND, gate.n_group, generator)
            gate.weight.copy_(rows_gD.repeat_interleave(per_copy, dim=0))
            gate.e_score_correction_bias.copy_(balancing_bias(inputs_ND, rows_gD).repeat_interleave(per_copy))
        gate.topk_group, gate.num_experts_per_tok = variant.groups, variant.groups * per_copy
        if not variant.normalised:  # plain scores of logits near 0, times 2, weigh about 1
            gate.norm_topk_prob, gate.routed_scaling_factor = False, 2.0
            gate.weight.mul_(0.1)
            gate.e_score_correction_bias.mul_(0.1)
        for stack in (block.experts.gate_up_proj, block.experts.down_proj):
            stack.mul_(1 + variant.noise * torch.randn(stack.shape, generator=generator))
        redraw(block.experts.gate_up_proj, block.experts.down_proj, variant.redrawn, generator)


def redraw(gate_up_EJD: Tensor, down_EDi: Tensor, share: float, generator: torch.Generator) -> None:
    """Draw a share of every expert's neurons anew, in place: normal weights with the expert's own deviation.

    Neurons that are padding (zero) stay zero.
    """
    for gate_up_JD, down_Di in zip(gate_up_EJD, down_EDi, strict=True):
        used = int((down_Di != 0).any(dim=0).sum())
        drawn = torch.randperm(used, generator=generator)[: round(share * used)]
        for rows_iD in (*gate_up_JD.chunk(2), down_Di.T):
            deviation = rows_iD[:used].std()
            rows_iD[drawn] = deviation * torch.randn(len(drawn), rows_iD.shape[1], generator=generator)


def random_rows(inputs_ND: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Returns router rows (g, D) in random directions orthogonal to the mean input, logits of deviation 1."""
    mean_D = inputs_ND.mean(0)
    rows_gD = torch.randn(copies, len(mean_D), generator=generator)
    rows_gD = rows_gD - torch.outer(rows_gD @ mean_D, mean_D) / mean_D.square().sum()
    return rows_gD / (inputs_ND @ rows_gD.T).std(0).unsqueeze(1)


def train_and_measure(model: Any, train_BT: Tensor, held_BT: Tensor, steps: int, seed: int) -> dict[str, float]:
    """Returns one variant's figures after `steps` at one seed, by column."""
    started, before = time.process_time(), loss_of(model, held_BT)
    trained = [parameter for key, parameter in model.named_parameters() if ".mlp." in key]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed + 1)
    take_expert_counts(model)
    for _ in range(steps):
        ids_BT = train_BT[torch.randint(len(train_BT), (BATCH_WINDOWS,), generator=generator)]
        F.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        update_biases(model, take_expert_counts(model), BALANCE_SPEED)
    seconds, after = time.process_time() - started, loss_of(model, held_BT)
    row = {"start": before, "loss": after, "seconds": seconds}
    if list(blocks(model)):
        row["MaxVio"] = max(max_violation(counts_E) for _, counts_E in take_expert_counts(model))
        row["apart"] = statistics.mean(layer_weight_distances(model).values())
        swap(model)
        row["swapped"] = loss_of(model, held_BT) - after
    return row


def report(name: str, rows: list[dict[str, float]], dense: list[dict[str, float]]) -> None:
    """Print one line of the table."""
    rows = [row | {"below dense": control["loss"] - row["loss"]} for row, control in zip(rows, dense, strict=True)]
    line = f"{name:30}"
    for column, digits in (("start", 4), ("loss", 4), ("below dense", 4), ("swapped", 4), ("apart", 3), ("MaxVio", 2)):
        cell = mean_and_spread([row[column] for row in rows], digits) if column in rows[0] else ""
        line += f"{cell:>17}"
    print(line + f"{mean_and_spread([row['seconds'] for row in rows], 0):>17}", flush=True)


@torch.no_grad()
def loss_of(model: Any, held_BT: Tensor) -> float:
    """Returns the mean next-token loss in nats; expert counts of earlier passes are dropped."""
    take_expert_counts(model)
    losses = [
        F.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()) for ids_BT in held_BT.split(8)
    ]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def swap(model: Any) -> None:
    """Give every token the experts of the next copy."""
    for block in blocks(model):
        per_copy = block.gate.num_experts // block.gate.n_group
        for stack in (block.experts.gate_up_proj, block.experts.down_proj):
            stack.copy_(stack.roll(per_copy, dims=0))


if __name__ == "__main__":
    main()
