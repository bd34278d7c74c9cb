"""A training step (forward, backward, fused AdamW): tokens per second of ours and of transformers' DeepSeek-V3.

python benchmarks/train_step.py [--layers 30] [--precisions bfloat16] [--compiled] [--device cuda] [--out NAME]

All models have SmolLM2-135M's shape and the same random weights, and train on random tokens. With fewer than 30 layers
the vocabulary shrinks in proportion, so that the head takes the same share of the time as in the whole model. The
competitors take turns, round by round, in one process whose allocator keeps freed memory. A figure is the median of the
rounds, its spread half their range. Precisions: fp32; "autocast", fp32 weights and optimizer with bf16 autocast;
"bfloat16", bf16 weights and optimizer. Parts are timed alone, forward and backward, one layer times the number of
layers. MFU compares with a 4,096² product of the same dtype in the same process.

Shapes: B windows, T tokens in each, N tokens in one row, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from circumstances import circumstances, command_line
from rows import Row, Rows, present
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from smolseek.model import DeepseekV3
from smolseek.numerics.loss import next_token_loss
from smolseek.numerics.memory import keep_freed_memory

OURS, COMPILED = "ours", ", compiled"
PEERS = ("eager", "batched_mm", "grouped_mm")
EXPERTS = {"8x512": (8, 2, 512), "32x192": (32, 6, 192)}
"""Routed experts, how many of them a token takes, and their width."""
VOCABULARY, LAYERS = 49152, 30


@dataclass(frozen=True)
class Comparison:
    """Train with every competitor."""

    experts: tuple[Literal["8x512", "32x192"], ...] = ("8x512", "32x192")
    """One shared and 8 routed experts of 512, two per token; or 32 of 192, six per token."""
    sequences: tuple[int, ...] = (512, 2048)
    """Tokens in a window."""
    precisions: tuple[Literal["float32", "autocast", "bfloat16"], ...] = ("float32", "autocast", "bfloat16")
    """Dtypes of weights and products."""
    peers: tuple[str, ...] = PEERS
    """transformers' experts implementations; those that would not fit in memory are left out."""
    compiled: bool = False
    """Measure ours and transformers' grouped_mm with torch.compile too; each compilation takes minutes."""
    step_tokens: int = 2048
    """Tokens in a step."""
    layers: int = 6
    """Layers of every model, one of them dense."""
    hidden: int = 576
    """Width of the model; heads of 64."""
    rounds: int = 5
    """Turns of each competitor."""
    steps: int = 2
    """Steps in a turn, the first of which is not timed."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    out: str = "run"
    """NAME in results/DATE-train-step-NAME.md."""
    results: Path = Path(__file__).parent / "results"
    """Where report and JSON lines go."""


@dataclass(frozen=True)
class Cell:
    """One combination of experts, tokens in a window, and precision."""

    experts: str
    tokens: int
    precision: str


class Competitor:
    """A model, its optimizer and how it computes the loss of a batch."""

    def __init__(self, name: str, mine: Comparison, cell: Cell, state: dict[str, Tensor]) -> None:
        self.name, self.mine, self.cell = name, mine, cell
        peer = name.removesuffix(COMPILED)
        self.config = config_of(mine, cell, "grouped_mm" if peer == OURS else peer)
        self.model: Any = DeepseekV3(self.config) if peer == OURS else DeepseekV3ForCausalLM(self.config)
        self.model.load_state_dict(state)
        dtype = torch.bfloat16 if cell.precision == "bfloat16" else torch.float32
        self.model.to(mine.device, dtype).train()
        if name.endswith(COMPILED):
            self.model.model.compile_for_training() if peer == OURS else self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.ours = peer == OURS

    def autocast(self) -> Any:
        """Returns the context of the precision."""
        return torch.autocast(self.mine.device, dtype=torch.bfloat16, enabled=self.cell.precision == "autocast")

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Returns the mean next-token loss of windows (B, T + 1)."""
        inputs_BT, labels_BT = ids_BT[:, :-1], ids_BT[:, 1:].contiguous()
        with self.autocast():
            if not self.ours:
                return self.model(input_ids=inputs_BT, labels=inputs_BT, shift_labels=labels_BT, use_cache=False).loss
            return self.head_loss(self.model.hidden_states(inputs_BT), labels_BT)

    def head_loss(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Returns the loss from the final hidden states."""
        hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
        if self.ours:
            return next_token_loss(hidden_ND, self.model.lm_head.weight, labels_N)[0]
        return F.cross_entropy(self.model.lm_head(hidden_ND).float(), labels_N)

    def step(self, ids_BT: Tensor) -> float:
        """Train on a batch; returns the loss before the step."""
        loss = self.loss(ids_BT)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def config_of(mine: Comparison, cell: Cell, implementation: str) -> DeepseekV3Config:
    """Returns SmolLM2-135M's shape as V3, with experts in all layers but the first."""
    routed, chosen, width = EXPERTS[cell.experts]
    heads = mine.hidden // 64
    return DeepseekV3Config(
        vocab_size=max(64, VOCABULARY * mine.layers // LAYERS // 64 * 64),
        hidden_size=mine.hidden,
        intermediate_size=mine.hidden * 8 // 3,
        num_hidden_layers=mine.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        n_shared_experts=1,
        n_routed_experts=routed,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
        max_position_embeddings=max(mine.sequences),
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=None,
        attn_implementation="sdpa",
        experts_implementation=implementation,
    )


def too_large(mine: Comparison, cell: Cell, name: str) -> bool:
    """Returns whether batched_mm's copies, one expert for each token until the backward pass, exceed the memory."""
    if name != "batched_mm":
        return False
    _, chosen, width = EXPERTS[cell.experts]
    size = 4 if cell.precision == "float32" else 2
    copies = mine.step_tokens * chosen * 3 * width * mine.hidden * size * (mine.layers - 1)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return copies > (torch.cuda.mem_get_info()[0] if mine.device == "cuda" else machine)


def flops_per_step(config: DeepseekV3Config, step_tokens: int, tokens: int) -> float:
    """Returns the flops of a step's products: three times those of the forward pass, causal attention counted half."""
    with torch.device("meta"):
        model = DeepseekV3(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    active = sum(sizes.values()) - routed * (1 - config.num_experts_per_tok / config.n_routed_experts)
    head_widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * head_widths * tokens / 2
    return 3 * 2 * step_tokens * (active + attention)


# -- timing -----------------------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Returns the wall time of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def random_ids(mine: Comparison, tokens: int, entries: int) -> Tensor:
    """Returns the windows of a step (B, T + 1)."""
    return torch.randint(entries, (max(1, mine.step_tokens // tokens), tokens + 1), device=mine.device)


def measure_peak(mine: Comparison, precision: str) -> float:
    """Returns the FLOP/s of a large product, the best of ten."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    left, right = (torch.randn(4096, 4096, device=mine.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * 4096**3 / min(seconds_of(lambda: torch.mm(left, right, out=out), mine.device) for _ in range(10))


def measure_cell(mine: Comparison, cell: Cell, names: list[str], peak: float) -> list[Row]:
    """Returns each named competitor's row: seconds per step, turn by turn, and seconds of its parts.

    `peak` is the FLOP/s that the MFU compares with.
    """
    torch.manual_seed(0)
    state = DeepseekV3(config_of(mine, cell, "grouped_mm")).state_dict()
    rivals = [Competitor(name, mine, cell, state) for name in names]
    config = rivals[0].config
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses: dict[str, float] = {}
    for turn in range(mine.rounds + 1):
        batches = [random_ids(mine, cell.tokens, config.vocab_size) for _ in range(mine.steps)]
        for rival in rivals[turn % len(rivals) :] + rivals[: turn % len(rivals)]:
            losses.setdefault(rival.name, rival.step(batches[0]))
            spent = [seconds_of(lambda r=rival, b=batch: r.step(b), mine.device) for batch in batches[1:]]  # type: ignore[misc]
            if turn:  # the first one warms up
                seconds[rival.name] += spent
    flops = flops_per_step(config, mine.step_tokens, cell.tokens)
    return [
        {
            "competitor": rival.name,
            **vars(cell),
            "step_tokens": mine.step_tokens,
            "seconds": seconds[rival.name],
            "loss": losses[rival.name],
            "mfu": flops / statistics.median(seconds[rival.name]) / peak,
            "parts": {} if rival.name.endswith(COMPILED) else measure_parts(rival),
        }
        for rival in rivals
    ]


def measure_parts(rival: Competitor) -> dict[str, float]:
    """Returns the seconds of head and loss, attention, MLPs and optimizer, each alone, on new inputs each time."""
    mine, cell, inner = rival.mine, rival.cell, rival.model.model
    windows, layer, device = max(1, mine.step_tokens // cell.tokens), inner.layers[-1], mine.device
    dtype = inner.embed_tokens.weight.dtype
    ids_BT = random_ids(mine, cell.tokens, rival.config.vocab_size)
    x_BTD = torch.randn(windows, cell.tokens, mine.hidden, device=device, dtype=dtype)
    if rival.ours:
        rope = inner.rope(cell.tokens)
        attend = lambda x: layer.self_attn(x, rope)  # noqa: E731
    else:
        rope = inner.rotary_emb(x_BTD, torch.arange(cell.tokens, device=device)[None])
        attend = lambda x: layer.self_attn(x, rope, None)[0]  # noqa: E731
    parts = {
        "head and loss": (lambda x: rival.head_loss(x, ids_BT[:, 1:]), 1),
        "attention": (attend, mine.layers),
        "experts": (layer.mlp, mine.layers - 1),
    }
    spent = {}
    for name, (run, count) in parts.items():
        spent[name] = count * statistics.median(_forward_backward(rival, run, x_BTD) for _ in range(mine.rounds + 2))
    rival.model.zero_grad(set_to_none=False)
    rival.loss(ids_BT).backward()
    times = [seconds_of(rival.optimizer.step, device) for _ in range(mine.rounds)]
    return spent | {"optimizer": statistics.median(times)}


def _forward_backward(rival: Competitor, run: Callable[[Tensor], Tensor], like: Tensor) -> float:
    x = torch.randn_like(like).requires_grad_()

    def both() -> None:
        with rival.autocast():
            out = run(x)
        out.backward(torch.ones_like(out))

    spent = seconds_of(both, rival.mine.device)
    rival.model.zero_grad()
    return spent


def measure_head(mine: Comparison, precision: str) -> Row:
    """Returns the seconds of head and loss at the whole vocabulary, and of their three products alone (the floor)."""
    autocast = torch.autocast(mine.device, dtype=torch.bfloat16, enabled=precision == "autocast")
    weights = torch.bfloat16 if precision == "bfloat16" else torch.float32
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    entries = max(64, VOCABULARY * mine.hidden // 576)
    hidden_ND = torch.randn(mine.step_tokens, mine.hidden, device=mine.device, dtype=weights, requires_grad=True)
    head_VD = (torch.randn(entries, mine.hidden, device=mine.device) / 50).to(weights).requires_grad_()
    labels_N = torch.randint(entries, (mine.step_tokens,), device=mine.device)

    def run(loss: Callable[[], Tensor]) -> None:
        with autocast:
            value = loss()
        value.backward()
        hidden_ND.grad = head_VD.grad = None

    x_ND, w_VD = hidden_ND.detach().to(dtype), head_VD.detach().to(dtype)
    logits_NV, x_grad, w_grad = x_ND @ w_VD.t(), torch.empty_like(x_ND), torch.empty_like(w_VD)

    def floor() -> None:
        torch.mm(x_ND, w_VD.t(), out=logits_NV)
        torch.mm(logits_NV, w_VD, out=x_grad)
        torch.mm(logits_NV.t(), x_ND, out=w_grad)

    runs = {
        "floor": floor,
        "ours": lambda: run(lambda: next_token_loss(hidden_ND, head_VD, labels_N)[0]),
        "plain": lambda: run(lambda: F.cross_entropy(F.linear(hidden_ND, head_VD).float(), labels_N)),
    }
    turns = [{name: seconds_of(go, mine.device) for name, go in runs.items()} for _ in range(mine.rounds + 2)][2:]
    return {"head": precision} | {name: statistics.median(turn[name] for turn in turns) for name in runs}


def compare(mine: Comparison) -> Rows:
    """Measure everything that has no row yet."""
    unknown = [peer for peer in mine.peers if peer not in PEERS]
    if unknown:
        raise ValueError(f"peers {unknown[0]}: is none of {', '.join(PEERS)}")
    if mine.threads:
        torch.set_num_threads(mine.threads)
    keep_freed_memory()
    free = ("experts", "sequences", "precisions", "peers", "compiled", "results")
    rows = Rows(mine.results, f"train-step-{mine.out}", mine, free=free)
    for precision in mine.precisions:
        if not rows.find(head=precision):
            rows.add(**measure_head(mine, precision))
        for cell in (Cell(e, tokens, precision) for e in mine.experts for tokens in mine.sequences):
            names = [OURS, *(peer for peer in mine.peers if not too_large(mine, cell, peer))]
            names += [OURS + COMPILED, "grouped_mm" + COMPILED] if mine.compiled else []
            if any(not rows.find(competitor=name, **vars(cell)) for name in names):
                for row in measure_cell(mine, cell, names, measure_peak(mine, precision)):
                    rows.add(**row)
                    print(f"  {cell}: {row['competitor']} {statistics.median(row['seconds']):.3f} s", flush=True)
    return rows


# -- report -----------------------------------------------------------------------------------------------------------


def report(mine: Comparison, rows: list[Row], command: str) -> str:
    """Returns the comparison as Markdown."""
    config = config_of(mine, Cell("8x512", min(mine.sequences), "float32"), "grouped_mm")
    about = (
        f"SmolLM2-135M's shape, {mine.layers} of {LAYERS} layers, {config.vocab_size:,} of {VOCABULARY:,} vocabulary "
        f"entries, {mine.step_tokens:,} tokens a step; medians of {mine.rounds} turns ± half the range. Rivals are "
        "transformers' experts implementations; batched_mm is left out where a copy of an expert for every token does "
        "not fit in memory. Parts are timed alone and need not add up."
    )
    sections = [f"# Training step: {mine.out}", f"`{command}`", circumstances(), about, _steps_table(rows)]
    return "\n\n".join([*sections, "## Head and loss at the whole vocabulary", _head_table(rows)]) + "\n"


def _steps_table(rows: list[Row]) -> str:
    parts = ("head and loss", "attention", "experts", "optimizer")
    header = [
        "experts",
        "sequence",
        "precision",
        "",
        "ms per step",
        "tokens/s",
        "MFU",
        "first loss",
        "ours is faster by",
    ]
    lines = ["| " + " | ".join([*header, "compiled by", *(f"{part}, ms" for part in parts)]) + " |", "|" + "---|" * 14]
    for key in dict.fromkeys((r["experts"], r["tokens"], r["precision"]) for r in rows if "competitor" in r):
        cell = {r["competitor"]: r for r in rows if (r.get("experts"), r.get("tokens"), r.get("precision")) == key}
        medians = {name: statistics.median(row["seconds"]) for name, row in cell.items()}
        for name, row in cell.items():
            spread = (max(row["seconds"]) - min(row["seconds"])) / 2
            line = [key[0], f"{key[1]:,}", key[2], name, f"{medians[name] * 1e3:,.0f} ± {spread * 1e3:,.0f}"]
            line += [f"{row['step_tokens'] / medians[name]:,.0f}", f"{row['mfu']:.0%}", f"{row['loss']:.3f}"]
            line += [f"{medians[name] / medians[o]:.2f}" if o in medians else "" for o in (OURS, OURS + COMPILED)]
            line += [f"{row['parts'][part] * 1e3:,.0f}" if row["parts"] else "" for part in parts]
            lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _head_table(rows: list[Row]) -> str:
    lines = ["| precision | three products, ms | ours | share | plain | share |", "|" + "---|" * 6]
    for row in (row for row in rows if "head" in row):
        line = [row["head"], f"{row['floor'] * 1e3:,.0f}"]
        for name in ("ours", "plain"):
            line += [f"{row[name] * 1e3:,.0f}", f"{row['floor'] / row[name]:.0%}"]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure, write the report, print it."""
    mine = tyro.cli(Comparison, description=__doc__)

    def measure() -> tuple[Path, str, None]:
        rows = compare(mine)
        return rows.path, report(mine, rows.rows, command_line()), None

    return present(measure, plots=False)


if __name__ == "__main__":
    sys.exit(main())
