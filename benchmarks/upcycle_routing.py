"""How do upcycled copies get told apart? Trains each routing a little and prints a table (issue 3, MLP, 1; design §4).

    python benchmarks/upcycle_routing.py SOURCE TRAIN.txt HELD_OUT.txt [STEPS]

Every variant starts as the dense model (up to 2% noise on the routed experts, where it says so) and sees the same
batches. Only the MLPs are trained, the dense model's too: the exact attention holds a constant of 2^15, which no
step may move. `swapped` is by how much the held-out loss rises when every token is sent to the next copy: 0 while the
copies are interchangeable. `apart` is the mean distance between two copies' weights over their norm.

Shapes: N windows, T tokens, B windows in a batch, D hidden, E routed experts, G groups (= copies).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek import convert
from smolseek.checkpoint.hub import load, load_tokenizer
from smolseek.config import DataSettings
from smolseek.conversion.experts import balancing_bias
from smolseek.conversion.moments import collect_mlp_inputs
from smolseek.data.windows import open_settings, pack
from smolseek.model.balance import max_violation, take_expert_counts, update_biases
from smolseek.model.experts import MixtureOfExperts

WINDOW_TOKENS, BATCH_WINDOWS, HELD_OUT_WINDOWS = 256, 4, 64
LEARNING_RATE, BALANCE_SPEED = 5e-4, 1e-3


@dataclass(frozen=True)
class Variant:
    """What differs from group-limited routing to one copy at random router rows."""

    name: str
    noise: float = 0.02
    groups: int = 1
    normalised: bool = True
    clustered: bool = False


VARIANTS = (
    Variant("one group, no noise", noise=0.0),
    Variant("one group"),
    Variant("two groups, k = 2G", groups=2),
    Variant("one group, not normalised", normalised=False),
    Variant("one group, clustered rows", clustered=True),
)


def main() -> None:
    """Prints the table."""
    source, train, held_out, *rest = sys.argv[1:]
    steps = int(rest[0]) if rest else 300
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(source)
    train_NT, held_NT = (windows(tokenizer, name) for name in (train, held_out))
    held_NT = held_NT[:HELD_OUT_WINDOWS]
    print(f"{'':28}{'start':>8}{'loss':>8}{'swapped':>9}{'apart':>8}{'MaxVio':>8}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        out = convert(source, Path(folder) / "v3", exact=True, experts="upcycle", calibration=train)
        report("dense", load(source), train_NT, held_NT, steps)
        for variant in VARIANTS:
            model = load(out)
            prepare(model, variant, train_NT)
            report(variant.name, model, train_NT, held_NT, steps)


def windows(tokenizer: Any, name: str) -> Tensor:
    """The text's windows (N, T)."""
    settings = DataSettings(train=(name,))
    ids_T, _ = pack(tokenizer, (document for _, document in open_settings(settings, settings.train).documents(None)))
    return ids_T[: len(ids_T) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)


def blocks(model: Any) -> Iterator[MixtureOfExperts]:
    """The expert layers."""
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))


@torch.no_grad()
def prepare(model: Any, variant: Variant, train_NT: Tensor) -> None:
    """Routing and noise of a variant, in place."""
    generator = torch.Generator().manual_seed(0)
    inputs = collect_mlp_inputs(model, train_NT[:32], 4096)
    for block, inputs_TD in zip(blocks(model), inputs, strict=True):
        gate = block.gate
        shards = gate.num_experts // gate.n_group
        if variant.clustered:
            rows_GD = clustered_rows(inputs_TD, gate.n_group, generator)
            gate.weight.copy_(rows_GD.repeat_interleave(shards, dim=0))
            gate.e_score_correction_bias.copy_(balancing_bias(inputs_TD, rows_GD).repeat_interleave(shards))
        gate.topk_group, gate.num_experts_per_tok = variant.groups, variant.groups * shards
        if not variant.normalised:  # weighs scores as they are: logits near 0 and a scaling of 2 make about 1
            gate.norm_topk_prob, gate.routed_scaling_factor = False, 2.0
            gate.weight.mul_(0.1)
            gate.e_score_correction_bias.mul_(0.1)
        for stack in (block.experts.gate_up_proj, block.experts.down_proj):
            stack.mul_(1 + variant.noise * torch.randn(stack.shape, generator=generator))


def clustered_rows(inputs_TD: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Router rows (G, D) towards k-means centres of the centred inputs, off the mean input, logits of deviation 1."""
    mean_D = inputs_TD.mean(0)
    centred_TD = F.normalize(inputs_TD - mean_D, dim=1)
    rows_GD = centred_TD[torch.randperm(len(centred_TD), generator=generator)[:copies]]
    for _ in range(20):
        member_TG = F.one_hot((centred_TD @ rows_GD.T).argmax(1), copies).float()
        rows_GD = F.normalize(member_TG.T @ centred_TD, dim=1)
    rows_GD = rows_GD - torch.outer(rows_GD @ mean_D, mean_D) / mean_D.square().sum()
    return rows_GD / (inputs_TD @ rows_GD.T).std(0).unsqueeze(1)


def report(name: str, model: Any, train_NT: Tensor, held_NT: Tensor, steps: int) -> None:
    """Trains and prints one row of the table."""
    started, before = time.process_time(), loss_of(model, held_NT)
    trained = [parameter for key, parameter in model.named_parameters() if ".mlp." in key]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    take_expert_counts(model)
    for _ in range(steps):
        ids_BT = train_NT[torch.randint(len(train_NT), (BATCH_WINDOWS,), generator=generator)]
        F.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        update_biases(model, take_expert_counts(model), BALANCE_SPEED)
    seconds, after = time.process_time() - started, loss_of(model, held_NT)
    row = f"{name:28}{before:8.4f}{after:8.4f}"
    if list(blocks(model)):
        violation = max(max_violation(counts_E) for _, counts_E in take_expert_counts(model))
        apart = sum(distance(block) for block in blocks(model)) / len(list(blocks(model)))
        swap(model)
        row += f"{loss_of(model, held_NT) - after:9.4f}{apart:8.3f}{violation:8.2f}{seconds:9.0f}"
    else:
        row += f"{'':25}{seconds:9.0f}"
    print(row, flush=True)


@torch.no_grad()
def loss_of(model: Any, held_NT: Tensor) -> float:
    """Mean next-token loss in nats; counts of earlier forwards are dropped."""
    take_expert_counts(model)
    losses = [
        F.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()) for ids_BT in held_NT.split(8)
    ]
    return float(torch.stack(losses).mean())


@torch.no_grad()
def swap(model: Any) -> None:
    """Every token's experts become the next copy's."""
    for block in blocks(model):
        shards = block.gate.num_experts // block.gate.n_group
        for stack in (block.experts.gate_up_proj, block.experts.down_proj):
            stack.copy_(stack.roll(shards, dims=0))


@torch.no_grad()
def distance(block: MixtureOfExperts) -> float:
    """|W_copy - W_next| / |W| over all the routed weights."""
    shards = block.gate.num_experts // block.gate.n_group
    stacks = (block.experts.gate_up_proj, block.experts.down_proj)
    apart = sum(float((stack - stack.roll(shards, dims=0)).square().sum()) for stack in stacks)
    return (apart / sum(float(stack.square().sum()) for stack in stacks)) ** 0.5


if __name__ == "__main__":
    main()
