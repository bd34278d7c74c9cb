"""One layer's attention with a probe in it, which records the loss gradient on paths that keys do not take.

Shapes: B windows, T tokens in each, t some of those tokens, S tokens attended to, N tokens in one row,
H num_attention_heads, G num_key_value_heads, r = H / G, d head_dim, F = d / 2 rotary frequencies, k key (or value)
channels, X entries of the block's input, Z channels of all queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from smolseek.conversion.moments import LayerMoments
from smolseek.conversion.running_sum import OuterSum
from smolseek.model.attention import rotate
from smolseek.numerics.precision import autocast
from smolseek.numerics.shares import ALONE, Shares

_IMPLEMENTATION = "smolseek_probe"
_READ_TOKENS = 2048
_QUERIES_AT_ONCE = 256  # whose scores are held
_LEAST_SHARE = 0.01  # of the mean gradient energy, at any token


class Probe:
    """Records a layer's inputs and the loss gradient at its values and at its keys on three paths to the scores.

    The keys take one path, rotated as in the source. The gradient on the other two, unrotated and rotated by the
    target's slots, is what two hypothetical keys of value zero would get.
    """

    def __init__(self, slot_angles_F: Tensor, files: Path, *, spills: bool, qk_norms: bool) -> None:
        self.slot_angles_F, self.qk_norms = slot_angles_F, qk_norms
        self.inputs_file = files.with_name(f"{files.name}-inputs")
        self.inputs_file.unlink(missing_ok=True)
        self.inputs_files = [self.inputs_file]
        """Those of all processes that had windows."""
        self.inputs, self.gradients = OuterSum(), OuterSum(files if spills else None)
        self.heads = OuterSum(files.with_name(f"{files.name}-heads") if spills and qk_norms else None)
        self.energies = OuterSum()
        self.unrotated_BGTd = self.slot_BGTd = torch.empty(0)
        """Gradients of one batch on the two paths that keys do not take."""

    def hooks(self, attention: Any) -> list[tuple[nn.Module, Callable[..., None]]]:
        """Returns forward hooks that see the block's input, its values, and the queries and keys that are rotated."""
        kind = "norm" if self.qk_norms else "proj"
        query, key = (getattr(attention, f"{letter}_{kind}") for letter in "qk")
        return [(attention.k_proj, self.see_x), (query, self.see_q), (key, self.see_k), (attention.v_proj, self.see_v)]

    def see_x(self, module: nn.Module, args: Any, output: Tensor) -> None:
        x_BTX = args[0].detach()
        self.x_BTX = x_BTX if module.bias is None else F.pad(x_BTX, (0, 1), value=1.0)

    def see_q(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.query = output

    def see_k(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.key = output
        if self.qk_norms:
            self.heads_BTZ = torch.cat([self.query.detach().flatten(2), output.detach().flatten(2)], dim=-1)

    def see_v(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.value_BTk = output

    def attend(self, query_BHTd: Tensor, key_BGTd: Tensor, value_BGTd: Tensor, scaling: float) -> Tensor:
        """Returns causal attention (B, T, H, d), computed in fp32."""
        unrotated_BHTd = self.query.detach().view(query_BHTd.transpose(1, 2).shape).transpose(1, 2)
        with torch.autocast(query_BHTd.device.type, enabled=False):
            operands = [x.float() for x in (query_BHTd, key_BGTd, value_BGTd, unrotated_BHTd)]
            out_BHTd = ProbedAttention.apply(*operands, scaling, self)
        return out_BHTd.transpose(1, 2).contiguous()

    def add(self, value_BTk: Tensor, key: Tensor) -> None:
        """Add one batch, given the gradient at the values and at the keys."""
        unrotated_BTk, slot_BTk = (
            x_BGTd.transpose(1, 2).flatten(2) for x_BGTd in (self.unrotated_BGTd, self.slot_BGTd)
        )
        weight_BT1 = token_weights(unrotated_BTk, value_BTk)
        gradients_BTk = torch.cat([unrotated_BTk, value_BTk, key.flatten(2), slot_BTk], dim=-1)
        self.gradients.add(gradients_BTk / weight_BT1.sqrt())
        self.inputs.add(weight_BT1.sqrt() * self.x_BTX)
        self.keep_inputs(torch.cat([self.x_BTX, weight_BT1], dim=-1).float().cpu())
        if self.qk_norms:
            weighted_BTZ = weight_BT1 * self.heads_BTZ
            self.heads.add(weighted_BTZ, self.x_BTX)
            self.energies.add(weighted_BTZ * self.heads_BTZ, torch.ones_like(weight_BT1))

    def end(self, shares: Shares = ALONE) -> None:
        """Turn the sums of all processes into means; called once, after the last batch."""
        self.inputs_files = [file for file in shares.each(self._own_inputs, range(shares.size)) if file is not None]
        for total in (self.inputs, self.gradients, *((self.heads, self.energies) if self.qk_norms else ())):
            total.end(shares)

    def _own_inputs(self, process: int) -> Path | None:
        """Returns the file of this process's inputs; None if it had no windows."""
        return self.inputs_file if self.inputs.tokens else None

    def moments(self) -> LayerMoments:
        """Returns the layer's moments."""
        fisher = self.gradients.read()
        width = len(fisher) // 4
        plain = LayerMoments(self.inputs.read(), fisher.view(4, width, 4, width), inputs=self.read_inputs)
        if not self.qk_norms:
            return plain
        return replace(plain, heads_ZX=self.heads.read(), heads_energy_Z=self.energies.read()[:, 0])

    def keep_inputs(self, rows_BTX: Tensor) -> None:
        """Append one batch of inputs, each with its weight behind it, to the file.

        Raises:
            OSError: it cannot be written, because the disk is full, for example.
        """
        with self.inputs_file.open("ab") as file:
            try:
                rows_BTX.numpy().tofile(file)
            except OSError as error:
                raise OSError(f"{self.inputs_file}: cannot be written ({error}); free some space") from error

    def read_inputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns the inputs again and their weights, some tokens (N, X) and (N, 1) at once."""
        width = len(self.inputs.read())
        for path in self.inputs_files:
            with path.open("rb") as file:
                while len(numbers := np.fromfile(file, np.float32, _READ_TOKENS * (width + 1))):
                    yield torch.from_numpy(numbers).view(-1, width + 1).split([width, 1], dim=-1)


def token_weights(*gradients: Tensor) -> Tensor:
    """Returns the weights of tokens in the mean over inputs, (B, T, 1) and 1 on the mean over a window.

    They are the roots of |g|² / E|g|², averaged over the gradients g (B, T, k) (docs/method.md, "Calibration").
    """
    shares = []
    for gradient_BTk in gradients:
        energy_BT1 = gradient_BTk.float().square().sum(-1, keepdim=True)
        mean_B11 = energy_BT1.mean(1, keepdim=True)
        shares.append(torch.where(mean_B11 > 0, energy_BT1 / mean_B11, 1.0))
    root_BT1 = torch.stack(shares).mean(0).clamp(min=_LEAST_SHARE).sqrt()
    return root_BT1 / root_BT1.mean(1, keepdim=True)


class ProbedAttention(torch.autograd.Function):
    """Causal attention whose backward pass leaves the gradient on the keys' two other paths with the probe.

    A score is the sum over the paths and those two keys are zero, so the forward pass has nothing more to compute.
    Backward all three are one product, dSᵀ [rotated, unrotated, slot-rotated queries]. Scores are recomputed, some
    queries at a time, and all is in fp32.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plain: Tensor, scaling: float, probe: Any) -> Any:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        ctx.save_for_backward(query, key, value, plain, out)
        ctx.scaling, ctx.probe = scaling, probe
        return out

    @staticmethod
    def backward(ctx: Any, pull_BHTd: Tensor) -> Any:
        with torch.autocast(pull_BHTd.device.type, enabled=False):
            return _probed_backward(ctx, pull_BHTd)


def _probed_backward(ctx: Any, pull_BHTd: Tensor) -> Any:
    query_BHTd, key_BGTd, value_BGTd, plain_BHTd, out_BHTd = ctx.saved_tensors
    probe, heads, tokens = ctx.probe, key_BGTd.shape[1], key_BGTd.shape[2]
    slot_BHTd = rotate_by_angles(plain_BHTd, probe.slot_angles_F)
    paths = torch.cat([query_BHTd, plain_BHTd, slot_BHTd], dim=-1)  # (B, H, T, 3 d)
    to_query_BGrTd = torch.empty_like(query_BHTd).unflatten(1, (heads, -1))
    to_keys = key_BGTd.new_zeros(*key_BGTd.shape[:3], paths.shape[-1])  # (B, G, T, 3 d)
    to_value_BGTd = torch.zeros_like(value_BGTd)
    grouped = [x.unflatten(1, (heads, -1)) for x in (query_BHTd, paths, pull_BHTd, out_BHTd)]
    for start in range(0, tokens, _QUERIES_AT_ONCE):
        stop = min(start + _QUERIES_AT_ONCE, tokens)
        q, path, pull, out = (x[:, :, :, start:stop].flatten(2, 3) for x in grouped)
        scores_BGrtS = (q * ctx.scaling @ key_BGTd[:, :, :stop].mT).unflatten(2, (-1, stop - start))
        later_tS = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device).triu(start + 1)
        p = scores_BGrtS.masked_fill_(later_tS, -torch.inf).softmax(-1).flatten(2, 3)
        to_value_BGTd[:, :, :stop] += p.mT @ pull
        to_scores = (pull @ value_BGTd[:, :, :stop].mT).sub_((pull * out).sum(-1, keepdim=True)).mul_(p)
        to_scores *= ctx.scaling
        to_query_BGrTd[:, :, :, start:stop] = (to_scores @ key_BGTd[:, :, :stop]).unflatten(2, (-1, stop - start))
        to_keys[:, :, :stop] += to_scores.mT @ path
    to_key_BGTd, probe.unrotated_BGTd, slot_BGTd = to_keys.chunk(3, dim=-1)
    probe.slot_BGTd = rotate_by_angles(slot_BGTd, -probe.slot_angles_F)
    return to_query_BGrTd.flatten(1, 2), to_key_BGTd, to_value_BGTd, None, None, None


def rotate_by_angles(x_BHTd: Tensor, angles_F: Tensor) -> Tensor:
    """Returns RoPE in Llama's layout, pairs (i, i + d / 2), at `angles_F` radians per position."""
    turns_TF = torch.arange(x_BHTd.shape[2], device=x_BHTd.device)[:, None] * angles_F
    return rotate(x_BHTd, turns_TF.cos().to(x_BHTd.dtype), turns_TF.sin().to(x_BHTd.dtype), interleaved=False)


@contextmanager
def probed_attention(model: Any, probes: Sequence[Probe]) -> Iterator[None]:
    """Sends the attention of every layer through its probe, other products in bf16 where the device is good at it."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        return probes[module.layer_idx].attend(query, key, value, scaling), None

    with attending(model, _IMPLEMENTATION, attend), autocast(model.device, "auto"):
        yield


@contextmanager
def attending(model: Any, name: str, attend: Callable[..., Any]) -> Iterator[None]:
    """Sends the attention of every layer of a transformers model through a function, which it registers by name."""
    before = model.config._attn_implementation
    AttentionInterface.register(name, attend)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
