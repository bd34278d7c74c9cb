"""The dense model's residual stream and the converted model's, moved on block by block while blocks are converted.

Shapes: B windows, T tokens in each, N tokens in one row, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smolseek.conversion.carve import MlpSample, error_weights
from smolseek.conversion.sizes import REFINE_BATCH_TOKENS
from smolseek.numerics.precision import autocast
from smolseek.numerics.shares import ALONE, Shares

_PROBE_TOKENS = 2048
BEHIND_DTYPE = torch.bfloat16
"""In which streams behind some layers are kept, on every device: another dtype than the stream's, so each is a copy."""
Block = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DenseStates:
    """Windows, and what the dense model makes of them: all that the end-to-end stage learns from."""

    ids_BT: Tensor
    final_BTD: Tensor
    """The final hidden states, behind the last norm."""
    behind_BTD: dict[int, Tensor]
    """The residual stream behind some layers, in `BEHIND_DTYPE`."""

    def of(self, rows: Tensor) -> DenseStates:
        """Returns those of some windows, all where the states lie."""
        device = self.final_BTD.device
        ids_BT, rows = self.ids_BT[rows].to(device), rows.to(device)
        behind_BTD = {index: states_BTD[rows] for index, states_BTD in self.behind_BTD.items()}
        return DenseStates(ids_BT, self.final_BTD[rows], behind_BTD)


class ResidualStream:
    """Both streams (B, T, D) over all windows, and the output of the dense attention block that they stand before.

    A step of training takes about `step_tokens` of them.

    The converted stream has passed converted blocks only, so that a block learns from inputs such as it will meet. No
    other activations are kept. Errors are told on new text: the first `probe` windows are not trained on, where
    there are others. `model` is the body of a transformers Llama-like model with SDPA attention, causal where no mask
    is given; the stream lies where the model lies. Several processes divide every pass through a block, and all have
    the whole stream: what they train on changes from step to step.
    """

    def __init__(
        self, model: Any, windows_BT: Tensor, shares: Shares = ALONE, step_tokens: int = REFINE_BATCH_TOKENS
    ) -> None:
        self.model, self.shares = model, shares
        self.batch = max(1, REFINE_BATCH_TOKENS // windows_BT.shape[1])
        self.step_windows = max(1, step_tokens // windows_BT.shape[1])
        probe = max(1, _PROBE_TOKENS // windows_BT.shape[1])
        self.probe = probe if len(windows_BT) > probe else 0
        with torch.no_grad():
            self.hidden_BTD = model.embed_tokens(windows_BT.to(model.device))
            positions_1T = torch.arange(windows_BT.shape[1], device=model.device)[None]
            self.rope = model.rotary_emb(self.hidden_BTD[:1], positions_1T)
        self.converted_BTD = self.hidden_BTD.clone()
        self.attended_BTD = torch.empty_like(self.hidden_BTD)
        """Output of the dense attention block that the stream stands before."""

    @torch.no_grad()
    def enter(self, index: int) -> None:
        """Stand before the attention block of that layer."""
        self.layer = self.model.layers[index]
        parts, outputs = (x_BTD.split(self.batch) for x_BTD in (self.hidden_BTD, self.attended_BTD))
        for part_BTD, out_BTD in zip(self.shares.own(parts), self.shares.own(outputs), strict=True):
            x_BTD = self.layer.input_layernorm(part_BTD)
            with autocast(x_BTD.device, "auto"):
                attended_BTD = self.layer.self_attn(x_BTD, position_embeddings=self.rope, attention_mask=None)[0]
            out_BTD.copy_(attended_BTD)
        self.shares.complete_(outputs)

    @torch.no_grad()
    def attention(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the normed input of the converted block and the output of the dense one, (B, T, D) each, for some
        windows."""
        rows = rows.to(self.hidden_BTD.device)
        x_BTD = self.layer.input_layernorm(self.converted_BTD.index_select(0, rows))
        return x_BTD, self.attended_BTD.index_select(0, rows)

    @torch.no_grad()
    def probed_attention(self) -> tuple[Tensor, Tensor]:
        """Returns the same for the windows that are not trained on, or for all where there are no others."""
        rows = slice(self.probe or None)
        return self.layer.input_layernorm(self.converted_BTD[rows]), self.attended_BTD[rows]

    @torch.no_grad()
    def pass_attention(self, converted: Block) -> None:
        """Add the dense attention block's output to its stream, and that of the converted block to the other."""
        self.hidden_BTD += self.attended_BTD
        self._pass(self.converted_BTD, self.layer.input_layernorm, converted)

    @torch.no_grad()
    def mlp_samples(self) -> tuple[MlpSample, MlpSample]:
        """Returns what the dense MLP makes of its inputs: over the probe (or all), and over the windows to train on.

        The stream must have passed the attention block before it.
        """
        norm, mlp = self.layer.post_attention_layernorm, self.layer.mlp
        inputs, outputs, weights = [], [], []
        for part_BTD in self.hidden_BTD.split(self.batch):
            inputs.append(norm(part_BTD))
            outputs.append(mlp(inputs[-1]))
            weights.append(error_weights(part_BTD + outputs[-1]))
        whole = MlpSample(*(torch.cat(parts) for parts in (inputs, outputs, weights)))
        rows = slice(self.probe or None), slice(self.probe, None)
        probed, trained = (MlpSample(*(tensor[some].flatten(0, 1) for tensor in whole)) for some in rows)
        return probed, trained

    @torch.no_grad()
    def pass_mlp(self, converted: Block) -> None:
        """Add the MLPs' outputs to their streams."""
        for stream_BTD, mlp in ((self.hidden_BTD, self.layer.mlp), (self.converted_BTD, converted)):
            self._pass(stream_BTD, self.layer.post_attention_layernorm, mlp)

    @torch.no_grad()
    def final_states(self) -> Tensor:
        """Returns the dense model's final hidden states (B, T, D); the stream must have passed all layers."""
        return torch.cat([self.model.norm(part_BTD) for part_BTD in self.hidden_BTD.split(self.batch)])

    def _pass(self, stream_BTD: Tensor, norm: Block, block: Block) -> None:
        parts = stream_BTD.split(self.batch)
        for part_BTD in self.shares.own(parts):
            with autocast(part_BTD.device, "auto"):
                part_BTD += block(norm(part_BTD))
        self.shares.complete_(parts)

    def batches(self, steps: int, seed: int) -> Iterator[Tensor]:
        """Returns `steps` batches of window numbers, every window once before any comes again."""
        count = len(self.hidden_BTD) - self.probe
        return (self.probe + rows for rows in shuffled(count, self.step_windows, steps, seed))


def shuffled(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Returns `steps` times the numbers of `batch` windows out of `count`, in an order drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < min(batch, count):
            left = torch.cat([left, torch.randperm(count, generator=generator)])
        rows, left = left[:batch], left[batch:]
        yield rows
