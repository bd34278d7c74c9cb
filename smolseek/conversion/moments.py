"""Calibration: streaming second moments of what goes into the dense attention blocks and of the loss gradient inside.

Shapes: N windows, T tokens, B windows in a batch, V vocabulary, D hidden, H query heads, G KV heads, d head_dim,
F = d / 2 frequencies, K = G * d key (or value) channels, Z = (H + G) * d channels of queries and keys, R latent rank;
in attention's backward pass r = H / G queries of a KV head, t queries at once, S keys that they see, P positions.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from smolseek.numerics.memory import release_memory
from smolseek.numerics.precision import autocast, teacher_dtype

NORM_EPS = 1e-6
"""What transformers hard-codes in the latent norms."""
UNROTATED, VALUE, ROTATED, SLOT = range(4)
"""The paths of `LayerMoments.fisher_PKPK`."""

_TOKENS_AT_ONCE = 2048
_GRADIENT_TOKENS_AT_ONCE = 256  # whose activations in all layers are held
_POSITIONS_AT_ONCE = 64  # whose logits are held
_QUERIES_AT_ONCE = 256  # whose scores are held
_SPILL_BYTES = 2**30  # more moments than this are kept on disk
_STRIP = 256  # rows of a sum that one product adds to
_PROBE = "smolseek_probe"


@dataclass(frozen=True)
class LayerMoments:
    """E[x xᵀ] (D, D) of the normed block input x, and E[g gᵀ] (4, K, 4, K) of the log-likelihood's gradient g.

    Where the key projection has a bias, x ends in a 1 of its own (D + 1 entries), here and in `NormMoments`.

    g is taken at a token's values and at its keys on three paths to the scores: not rotated at all, rotated as in the
    source, and rotated by the frequencies of the target's rope slots.

    Where every head's query and key pass a norm, z of all of them behind it, queries first: E[z xᵀ] and E[z²].
    `inputs` reads x itself again, some tokens (T, D) at once.
    """

    input_DD: Tensor
    fisher_PKPK: Tensor
    heads_ZD: Tensor | None = None
    heads_energy_Z: Tensor | None = None
    inputs: Callable[[], Iterable[Tensor]] = tuple

    def fisher(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """The block (len(rows) * K, len(columns) * K) between two lists of paths."""
        block = self.fisher_PKPK[list(rows)][:, :, list(columns)]
        return block.reshape(block.shape[0] * block.shape[1], -1)


@dataclass(frozen=True)
class NormMoments:
    """E[n nᵀ] (R, R) and E[x nᵀ] (D, R) of the normalised latent n = c / rms(c)."""

    latent_RR: Tensor
    cross_DR: Tensor


def collect_moments(
    model: Any, windows_NT: Tensor, slot_angles_F: Tensor, *, seed: int, folder: Path
) -> list[Callable[[], LayerMoments]]:
    """Per layer, what reads the moments that the closed form weighs errors by; one forward and backward pass.

    The Fisher takes log p of labels sampled from the model itself (the true Fisher, not the empirical one; design §3,
    step 1). Beyond the design it also holds the gradient on the paths that keys may take in the target. Sums are
    streamed in float64; where those of all layers are large they live as files in `folder`, each in memory only while
    it is added to or read. The blocks' inputs go there as well, so that no latent needs a pass of its own.

    Raises:
        ValueError: less space in `folder` than that takes.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = model.model.layers
    width = layers[0].self_attn.k_proj.out_features
    moment_bytes = 8 * len(layers) * (4 * width) ** 2
    large = moment_bytes > _SPILL_BYTES
    probes = [
        _Probe(slot_angles_F, folder / str(index), spills=large, qk_norms=hasattr(layer.self_attn, "k_norm"))
        for index, layer in enumerate(layers)
    ]
    _check_space(folder, 4 * len(layers) * model.config.hidden_size * windows_NT.numel() + large * moment_bytes)
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [(model.get_input_embeddings(), _require_grad)]
    for layer, probe in zip(layers, probes, strict=True):
        hooks += probe.hooks(layer.self_attn)
    head_VD = model.get_output_embeddings().weight.to(teacher_dtype(torch.device("cpu"), "auto"))
    with _frozen(model), _hooked(hooks), _probed(model, probes), fast_products():
        for ids_BT in _batches(windows_NT, _GRADIENT_TOKENS_AT_ONCE):
            hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
            pull_BTD = _loss_gradient(hidden_BTD.detach(), head_VD, generator)
            paths = [path for probe in probes for path in (probe.value_BTK, probe.key)]
            gradients = torch.autograd.grad(hidden_BTD, paths, pull_BTD)
            for index, probe in enumerate(probes):
                probe.add(*gradients[2 * index : 2 * index + 2])
            del hidden_BTD, gradients
            release_memory()
    for probe in probes:
        probe.end()
    return [probe.moments for probe in probes]


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ValueError(
            f"{folder}: {free_bytes / 1e9:.1f} GB free, and {needed_bytes / 1e9:.1f} GB are needed there "
            "until the blocks are fitted; free some space or lower calibration_windows"
        )


def norm_moments(moments: LayerMoments, encoder_RD: Tensor) -> NormMoments:
    """Moments of the latent c = E x after its RMSNorm."""
    latent, cross = _Sum(), _Sum()
    for x_TD in moments.inputs():
        x_TD = x_TD[:, : encoder_RD.shape[1]].double()
        c_TR = x_TD @ encoder_RD.T
        normed_TR = c_TR * torch.rsqrt(c_TR.square().mean(-1, keepdim=True) + NORM_EPS)
        latent.add(normed_TR)
        cross.add(x_TD, normed_TR)
    return NormMoments(latent.end(), cross.end())


@torch.no_grad()
def collect_mlp_inputs(model: Any, windows_NT: Tensor, tokens: int) -> list[Tensor]:
    """Per layer, the normed MLP inputs (N, T, D) of about `tokens` evenly spread tokens; transformers' or ours."""
    kept: list[list[Tensor]] = [[] for _ in model.model.layers]
    stride = max(1, windows_NT.numel() // tokens)
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [
        (layer.post_attention_layernorm, lambda _, args, out, k=k: k.append(out[:, ::stride].clone()))
        for layer, k in zip(model.model.layers, kept, strict=True)
    ]
    with _hooked(hooks):
        for ids_BT in _batches(windows_NT, _TOKENS_AT_ONCE):
            model.model(ids_BT)
    return [torch.cat(parts) for parts in kept]


class _Sum:
    """Streaming sum of outer products over tokens, in float64; in `file` where one is given."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.tokens = file, 0
        self.shape, self.strip = (0, 0), 0
        self.held: Tensor | None = None
        if file is not None:
            file.unlink(missing_ok=True)

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        left = left.detach().flatten(0, -2).double()
        self.strip = _STRIP if right is None else left.shape[1]
        right = left if right is None else right.detach().flatten(0, -2).double()
        self.shape = (left.shape[1], right.shape[1])
        total = self.read()
        for start in range(0, len(total), self.strip):  # a symmetric sum from its diagonal on
            rows = slice(start, start + self.strip)
            total[rows, start:].addmm_(left[:, rows].T, right[:, start:])
        self.tokens += len(left)

    def end(self) -> Tensor:
        """The mean, in the place of the sum: a second one might not fit into memory."""
        total = self.read().div_(self.tokens)
        for start in range(self.strip, len(total), self.strip):
            total[start : start + self.strip, :start] = total[:start, start : start + self.strip].T
        return total

    def read(self) -> Tensor:
        """What is there so far, to be changed in place: zeros at first, as is a file that is new."""
        if self.file is not None:  # mapped anew each time, so that no page outlives its use in this process
            size = self.shape[0] * self.shape[1]
            return torch.from_file(str(self.file), shared=True, size=size, dtype=torch.float64).view(self.shape)
        if self.held is None:
            self.held = torch.zeros(self.shape, dtype=torch.float64)
        return self.held


class _Probe:
    """One layer's attention as if keys could take the other paths as well, so that the gradient there can be read."""

    def __init__(self, slot_angles_F: Tensor, files: Path, *, spills: bool, qk_norms: bool) -> None:
        self.slot_angles_F, self.qk_norms = slot_angles_F, qk_norms
        self.kept = files.with_name(f"{files.name}-inputs")
        self.kept.unlink(missing_ok=True)
        self.inputs, self.gradients = _Sum(), _Sum(files if spills else None)
        self.heads = _Sum(files.with_name(f"{files.name}-heads") if spills and qk_norms else None)
        self.energies = _Sum()
        self.unrotated_BGTd = self.slot_BGTd = torch.empty(0)
        """Gradients of one batch on the paths that keys do not take."""

    def hooks(self, attention: Any) -> list[tuple[nn.Module, Callable[..., None]]]:
        """Where the input, the values and what RoPE gets can be seen: queries and keys behind their norms, if any."""
        kind = "norm" if self.qk_norms else "proj"
        query, key = (getattr(attention, f"{letter}_{kind}") for letter in "qk")
        return [(attention.k_proj, self.see_x), (query, self.see_q), (key, self.see_k), (attention.v_proj, self.see_v)]

    def see_x(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.x_BTD = args[0] if module.bias is None else F.pad(args[0], (0, 1), value=1.0)
        self.inputs.add(self.x_BTD)
        with self.kept.open("ab") as file:
            self.x_BTD.detach().float().numpy().tofile(file)

    def see_q(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.query = output

    def see_k(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.key = output
        if self.qk_norms:
            heads_BTZ = torch.cat([self.query.flatten(2), output.flatten(2)], dim=-1)
            self.heads.add(heads_BTZ, self.x_BTD)
            self.energies.add(heads_BTZ.square(), torch.ones_like(heads_BTZ[..., :1]))

    def see_v(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.value_BTK = output

    def attend(self, query_BHTd: Tensor, key_BGTd: Tensor, value_BGTd: Tensor, scaling: float) -> Tensor:
        """Causal attention (B, T, H, d)."""
        plain_BHTd = self.query.detach().view(query_BHTd.transpose(1, 2).shape).transpose(1, 2)
        out_BHTd = _ProbedAttention.apply(query_BHTd, key_BGTd, value_BGTd, plain_BHTd, scaling, self)
        return out_BHTd.transpose(1, 2).contiguous()

    def add(self, value_BTK: Tensor, key: Tensor) -> None:
        """One batch, from the gradient at the values and at the keys, and from that on the paths not taken."""
        rows = [self.unrotated_BGTd.transpose(1, 2), value_BTK, key, self.slot_BGTd.transpose(1, 2)]
        self.gradients.add(torch.cat([row.flatten(2) for row in rows], dim=-1))

    def end(self) -> None:
        """Turn sums into means; called once, after the last batch."""
        for total in (self.inputs, self.gradients, *((self.heads, self.energies) if self.qk_norms else ())):
            total.end()

    def moments(self) -> LayerMoments:
        fisher = self.gradients.read()
        width = len(fisher) // 4
        plain = LayerMoments(self.inputs.read(), fisher.view(4, width, 4, width), inputs=self.read_inputs)
        if not self.qk_norms:
            return plain
        return replace(plain, heads_ZD=self.heads.read(), heads_energy_Z=self.energies.read()[:, 0])

    def read_inputs(self) -> Iterator[Tensor]:
        width = len(self.inputs.read())
        with self.kept.open("rb") as file:
            while len(numbers := np.fromfile(file, np.float32, _TOKENS_AT_ONCE * width)):
                yield torch.from_numpy(numbers).view(-1, width)


class _ProbedAttention(torch.autograd.Function):
    """Attention that on its way back leaves the gradient of keys on the other two paths with the probe.

    A score is the sum over the paths, and those two keys are zero: forward there is nothing to compute. Backward all
    three are one product, dSᵀ [rotated, plain, slot-rotated queries]. Scores are recomputed, some queries at a time,
    and all is in fp32, under `fast_products` as well.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plain: Tensor, scaling: float, probe: Any) -> Any:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        ctx.save_for_backward(query, key, value, plain, out)
        ctx.scaling, ctx.probe = scaling, probe
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, pull_BHTd: Tensor) -> Any:
        query_BHTd, key_BGTd, value_BGTd, plain_BHTd, out_BHTd = ctx.saved_tensors
        probe, heads, tokens = ctx.probe, key_BGTd.shape[1], key_BGTd.shape[2]
        paths_BHTp = torch.cat([query_BHTd, plain_BHTd, rotate(plain_BHTd, probe.slot_angles_F)], dim=-1)
        to_query_BGrTd = torch.empty_like(query_BHTd).unflatten(1, (heads, -1))
        to_keys_BGTp = key_BGTd.new_zeros(*key_BGTd.shape[:3], paths_BHTp.shape[-1])
        to_value_BGTd = torch.zeros_like(value_BGTd)
        grouped = [x.unflatten(1, (heads, -1)) for x in (query_BHTd, paths_BHTp, pull_BHTd, out_BHTd)]
        for start in range(0, tokens, _QUERIES_AT_ONCE):
            stop = min(start + _QUERIES_AT_ONCE, tokens)
            q, paths, pull, out = (x[:, :, :, start:stop].flatten(2, 3) for x in grouped)
            scores_BGrtS = (q * ctx.scaling @ key_BGTd[:, :, :stop].mT).unflatten(2, (-1, stop - start))
            later_tS = torch.ones(stop - start, stop, dtype=torch.bool).triu(start + 1)
            p = scores_BGrtS.masked_fill_(later_tS, -torch.inf).softmax(-1).flatten(2, 3)
            to_value_BGTd[:, :, :stop] += p.mT @ pull
            to_scores = (pull @ value_BGTd[:, :, :stop].mT).sub_((pull * out).sum(-1, keepdim=True)).mul_(p)
            to_scores *= ctx.scaling
            to_query_BGrTd[:, :, :, start:stop] = (to_scores @ key_BGTd[:, :, :stop]).unflatten(2, (-1, stop - start))
            to_keys_BGTp[:, :, :stop] += to_scores.mT @ paths
        to_key_BGTd, probe.unrotated_BGTd, slot_BGTd = to_keys_BGTp.chunk(3, dim=-1)
        probe.slot_BGTd = rotate(slot_BGTd, -probe.slot_angles_F)
        return to_query_BGrTd.flatten(1, 2), to_key_BGTd, to_value_BGTd, None, None, None


def rotate(x_BHTd: Tensor, angles_F: Tensor) -> Tensor:
    """RoPE of Llama's layout, (i, i + d/2), at angles_F radians per position."""
    turns_TF = torch.arange(x_BHTd.shape[2])[:, None] * angles_F
    cos, sin = turns_TF.cos().to(x_BHTd.dtype), turns_TF.sin().to(x_BHTd.dtype)
    first, second = x_BHTd.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def fast_products() -> Any:
    """What conversion computes under: bf16 products where the processor has units for them, as in training."""
    return autocast(torch.device("cpu"), "auto")


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _loss_gradient(hidden_BTD: Tensor, head_VD: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the summed loss at the final hidden states, each position's label drawn from the model itself.

    (p - onehot(label)) W, a few positions at a time: autograd would hold four copies of all logits.
    """
    pulls = []
    with torch.no_grad():
        for hidden_PD in hidden_BTD.flatten(0, 1).split(_POSITIONS_AT_ONCE):
            p_PV = (hidden_PD.to(head_VD.dtype) @ head_VD.T).float().softmax(-1)
            label_P1 = sample_labels(p_PV, generator)
            p_PV.scatter_add_(1, label_P1, torch.full_like(label_P1, -1, dtype=p_PV.dtype))
            pulls.append((p_PV.to(head_VD.dtype) @ head_VD).to(hidden_BTD.dtype))
    return torch.cat(pulls).view_as(hidden_BTD)


def sample_labels(p_PV: Tensor, generator: torch.Generator) -> Tensor:
    """One label (P, 1) a row with its probability, by the inverse of the distribution function.

    One random number a row: `torch.multinomial` draws one an entry, for 49,152 of them 12 times as long as the softmax.
    """
    below_PV = p_PV.cumsum(-1)
    drawn_P1 = torch.rand(len(p_PV), 1, generator=generator) * below_PV[:, -1:]
    return torch.searchsorted(below_PV, drawn_P1, right=True).clamp_(max=p_PV.shape[1] - 1)


def _batches(windows_NT: Tensor, tokens: int) -> Iterator[Tensor]:
    """About so many tokens at once, but a whole window at least."""
    return iter(windows_NT.split(max(1, tokens // windows_NT.shape[1])))


@contextmanager
def _probed(model: Any, probes: Sequence[_Probe]) -> Iterator[None]:
    """Attention of every layer goes through its probe."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **rest: Any) -> Any:
        return probes[module.layer_idx].attend(query, key, value, scaling), None

    before = model.config._attn_implementation
    AttentionInterface.register(_PROBE, attend)
    model.set_attn_implementation(_PROBE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters, only for activations."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Forward hooks for the length of a block."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
