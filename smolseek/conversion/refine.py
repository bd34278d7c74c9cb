"""Refinement by gradient: each converted block learns the dense block's output, then the whole model the dense logits.

Shapes: N windows, T tokens, B windows in a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.conversion.attention import LATENT_RMS
from smolseek.conversion.moments import fast_products
from smolseek.model import DeepseekV3
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.balance import take_expert_counts, update_biases
from smolseek.numerics.loss import divergence
from smolseek.numerics.muon import Muon
from smolseek.numerics.schedule import warmed_cosine

REFINE_BATCH_TOKENS, DISTILL_BATCH_TOKENS = 1024, 2048
"""Tokens in a step, here as in the planning of its cost. Of the layers: half as many steps of twice as many tokens cost
the same and end higher (LOG.md)."""

_PROBE_TOKENS = 2048
_REFINE_RATE = 0.015
_DISTILL_RATE = 0.005
_ROUTER_FACTOR = 5.0  # a fitted router starts small, and has to keep pace with its experts
_MUON_RMS = 0.2  # root mean square of a Muon update at learning rate 1, as torch scales it to match AdamW's
_BALANCE_SPEED = 1e-3


class ResidualStream:
    """The dense model's residual stream over all windows (N, T, D), moved on block by block; no other activations kept
    but, while it stands before an attention block, that block's output.

    The first `probe` windows are not trained on, where there are others, so that errors are told on new text. `model`
    is the body of a transformers Llama-like model with SDPA attention, causal where no mask is given.
    """

    def __init__(self, model: Any, windows_NT: Tensor) -> None:
        self.model = model
        self.batch = max(1, REFINE_BATCH_TOKENS // windows_NT.shape[1])
        probe = max(1, _PROBE_TOKENS // windows_NT.shape[1])
        self.probe = probe if len(windows_NT) > probe else 0
        with torch.no_grad():
            self.hidden_NTD = model.embed_tokens(windows_NT)
            positions_1T = torch.arange(windows_NT.shape[1])[None]
            self.rope = model.rotary_emb(self.hidden_NTD[:1], positions_1T)
        self.attended_NTD = torch.empty_like(self.hidden_NTD)
        """Output of the dense attention block that the stream stands before."""

    @torch.no_grad()
    def enter(self, index: int) -> None:
        """Stand before the attention block of that layer."""
        self.layer = self.model.layers[index]
        for part_BTD, out_BTD in zip(*(x.split(self.batch) for x in (self.hidden_NTD, self.attended_NTD)), strict=True):
            x_BTD = self.layer.input_layernorm(part_BTD)
            out_BTD.copy_(self.layer.self_attn(x_BTD, position_embeddings=self.rope, attention_mask=None)[0])

    @torch.no_grad()
    def attention(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Input (normed) and output of the dense attention block, (B, T, D) each, for some windows."""
        return self.layer.input_layernorm(self.hidden_NTD[rows]), self.attended_NTD[rows]

    def pass_attention(self) -> None:
        """Add the dense attention block's output to the stream."""
        self.hidden_NTD += self.attended_NTD

    @torch.no_grad()
    def mlp_inputs(self) -> tuple[Tensor, Tensor]:
        """Inputs of the dense MLP block, those of the probe (or all) and those to train on, (tokens, D) each.

        To be asked for once the stream has passed the attention block before it.
        """
        norm = self.layer.post_attention_layernorm
        inputs = torch.cat([norm(part_BTD) for part_BTD in self.hidden_NTD.split(self.batch)])
        return inputs[: self.probe or None].flatten(0, 1), inputs[self.probe :].flatten(0, 1)

    @torch.no_grad()
    def pass_mlp(self) -> None:
        """Add the dense MLP block's output to the stream."""
        for part_BTD in self.hidden_NTD.split(self.batch):
            part_BTD += self.layer.mlp(self.layer.post_attention_layernorm(part_BTD))

    def batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        """`steps` batches of window numbers, every window once before any comes again."""
        count = len(self.hidden_NTD) - self.probe
        return (self.probe + rows for rows in shuffled(count, self.batch, steps, seed))


def shuffled(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` times the numbers of `batch` windows out of `count`, in an order drawn from `seed`, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < min(batch, count):
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        rows, left = left[:batch], left[batch:]
        yield rows


class Descent:
    """An optimizer whose step moves each parameter by `rate` of its own root mean square, with its schedule.

    Relative, because checkpoints differ in the scale of their weights and the matrices of one block do as well. Warm-up
    over the first twentieth of the steps, then a cosine to zero. Adam, or for a number of heads Muon.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], *, rate: float, steps: int, muon_heads: int | None = None
    ) -> None:
        self.parameters = list(parameters.values())
        groups = []
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            size = max(float(parameter.detach().square().mean().sqrt()), 1e-8)
            factor = _ROUTER_FACTOR if name.endswith("mlp.gate.weight") else 1 / _MUON_RMS if muon_heads else 1.0
            groups.append({"params": [(name, parameter) if muon_heads else parameter], "lr": rate * size * factor})
        self.optimizer: torch.optim.Optimizer = (
            Muon(groups, heads=muon_heads) if muon_heads else torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        )
        self.schedule = warmed_cosine(self.optimizer, steps)

    def step(self, loss: Tensor) -> None:
        """One step down."""
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def end(self) -> None:
        """Freeze the parameters again."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)


def refine_attention(
    block: MultiheadLatentAttention, rope: tuple[Tensor, Tensor], stream: ResidualStream, *, steps: int, seed: int
) -> None:
    """Train a converted attention block in place to give the output of the dense block that the stream stands before.

    In stock form, norm and all (design §3, step 4); `rope` is cos and sin of the target, as the block takes them.
    """
    scale_latents(block, 1 / LATENT_RMS)
    matrices = {name: p for name, p in block.named_parameters() if p.dim() == 2}  # which can do all that norms could
    descent = Descent(matrices, rate=_REFINE_RATE, steps=steps, muon_heads=block.num_heads)
    for rows in stream.batches(steps, seed):
        x_BTD, target_BTD = stream.attention(rows)
        with fast_products():
            out_BTD = block(x_BTD, rope)
        descent.step((out_BTD - target_BTD).square().mean() / target_BTD.square().mean())
    descent.end()
    scale_latents(block, LATENT_RMS)


@torch.no_grad()
def attention_error(block: MultiheadLatentAttention, rope: tuple[Tensor, Tensor], stream: ResidualStream) -> float:
    """E|converted - dense|² / E|dense|² of an attention block's output, over the stream's probe (or all of it)."""
    x_BTD, target_BTD = stream.attention(slice(stream.probe or None))
    error = (block(x_BTD, rope) - target_BTD).square().sum()
    return float(error / target_BTD.square().sum().clamp(min=1e-30))


def distill(
    student: DeepseekV3,
    dense: Any,
    windows_NT: Tensor,
    parameters: dict[str, nn.Parameter],
    *,
    steps: int,
    seed: int,
    on_step: Callable[[int], None],
) -> None:
    """Train `parameters` of the converted model in place by KL(dense ‖ converted) of the next token, biases balancing.

    `dense` is the transformers model that it came from; `on_step(done)` reports progress (design §3, step 5).
    """
    for layer in layers_of(student):
        scale_latents(layer.self_attn, 1 / LATENT_RMS)
    take_expert_counts(student)
    descent = Descent(parameters, rate=_DISTILL_RATE, steps=steps)
    batch = max(1, DISTILL_BATCH_TOKENS // windows_NT.shape[1])
    for step, rows in enumerate(shuffled(len(windows_NT), batch, steps, seed)):
        ids_BT = windows_NT[rows]
        with fast_products():
            with torch.no_grad():
                target_ND = dense.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state.flatten(0, 1)
            hidden_ND = student.hidden_states(ids_BT).flatten(0, 1)
            loss = divergence(hidden_ND, student.lm_head.weight, target_ND, dense.get_output_embeddings().weight)
        descent.step(loss)
        update_biases(student, take_expert_counts(student), _BALANCE_SPEED * (1 - step / steps))
        on_step(step + 1)
    descent.end()
    for layer in layers_of(student):
        scale_latents(layer.self_attn, LATENT_RMS)


def layers_of(model: DeepseekV3) -> list[Any]:
    """The decoder layers, untyped: nn.ModuleList hides what they are."""
    return list(model.model.layers)


@torch.no_grad()
def scale_latents(block: MultiheadLatentAttention, factor: float) -> None:
    """Multiply what goes into the latent norms, which changes nothing behind them.

    A latent at `LATENT_RMS` is safe from every eps, but its encoder would stand still beside other weights in training.
    """
    for name, tensor in block.named_parameters():
        if name.startswith("kv_a_proj_with_mqa"):
            tensor[: block.kv_lora_rank].mul_(factor)
        elif name.startswith("q_a_proj"):
            tensor.mul_(factor)
