"""What the calibration text makes the dense model do: one pass for the moments of every layer, one for MLP inputs.

Shapes: B windows, T tokens in each, N tokens in one row, V vocab_size, D hidden_size, F rotary frequencies, k key (or
value) channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.checkpoint.atomic import check_space
from smolseek.conversion.moments import LayerMoments
from smolseek.conversion.probe import Probe, probed_attention
from smolseek.conversion.sizes import CALIBRATION_BATCH_TOKENS, SPILL_BYTES
from smolseek.numerics.memory import release_memory
from smolseek.numerics.precision import compute_dtype
from smolseek.numerics.shares import ALONE, Shares

TOKENS_AT_ONCE = 2048
"""Tokens in a forward pass of the dense model alone."""
_POSITIONS_AT_ONCE = 64  # whose logits are held
_LEAST_OF_WINDOW = 16


def collect_moments(
    model: Any,
    windows_BT: Tensor,
    slot_angles_F: Tensor,
    *,
    seed: int,
    folder: Path,
    on_windows: Callable[[int], None] = lambda more: None,
    shares: Shares = ALONE,
) -> list[Callable[[], LayerMoments]]:
    """Returns one loader per layer for that layer's second moments, after one forward and backward pass.

    The labels of the loss are sampled from the model itself: the true Fisher, not the empirical one (docs/method.md,
    "Calibration"). `model` is a transformers Llama-like model. Sums are streamed in float64. Where those of all layers
    are large they live as files in `folder`. The blocks' inputs are kept there too, so that no latent needs a pass of
    its own. `on_windows` is told how many windows each batch had. Several processes divide the batches, and keep files
    of their own in `folder`, where all read them.

    Raises:
        ValueError: `folder` has less free space than that takes.
    """
    device, layers = model.device, model.model.layers
    generator = torch.Generator().manual_seed(seed)
    probes = _probes(model, windows_BT, slot_angles_F.to(device), folder, shares)
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [(model.get_input_embeddings(), _require_grad)]
    for layer, probe in zip(layers, probes, strict=True):
        hooks += probe.hooks(layer.self_attn)
    head_VD = model.get_output_embeddings().weight.to(compute_dtype(device, "auto"))
    parts = list(batches(windows_BT, CALIBRATION_BATCH_TOKENS[device.type]))
    own_parts = shares.own(range(len(parts)))
    with _frozen(model), hooked(hooks), probed_attention(model, probes):
        for number, ids_BT in enumerate(parts):
            if number in own_parts:
                _probe_batch(model, probes, ids_BT.to(device), head_VD, generator)
                release_memory()
            else:
                _skip_labels(ids_BT, generator)
            on_windows(len(ids_BT))
    for probe in probes:
        probe.end(shares)
    return [probe.moments for probe in probes]


def _probes(model: Any, windows_BT: Tensor, angles_F: Tensor, folder: Path, shares: Shares) -> list[Probe]:
    """Returns one probe per layer, with files in `folder`; raises ValueError if it has too little space for them."""
    layers, hidden = model.model.layers, model.config.hidden_size
    width = layers[0].self_attn.k_proj.out_features
    moment_bytes = 8 * len(layers) * (4 * width) ** 2
    large = moment_bytes > SPILL_BYTES
    qk_norms = hasattr(layers[0].self_attn, "k_norm")
    if qk_norms:
        moment_bytes += 8 * len(layers) * (layers[0].self_attn.q_proj.out_features + width) * hidden
    own_folder = folder if shares.leads else folder / f"process-{shares.rank}"
    own_folder.mkdir(exist_ok=True)
    needed_bytes = 4 * len(layers) * hidden * windows_BT.numel() + large * moment_bytes * shares.size
    remedy = "until the blocks are fitted; free some space or lower calibration_windows"
    shares.by_leader(lambda: check_space(folder, needed_bytes, remedy))
    return [Probe(angles_F, own_folder / str(index), spills=large, qk_norms=qk_norms) for index in range(len(layers))]


def _probe_batch(
    model: Any, probes: Sequence[Probe], ids_BT: Tensor, head_VD: Tensor, generator: torch.Generator
) -> None:
    """Add the moments of one batch: a forward and a backward pass."""
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    pull_BTD = _loss_gradient(hidden_BTD.detach(), head_VD, generator)
    paths = [path for probe in probes for path in (probe.value_BTk, probe.key)]
    gradients = torch.autograd.grad(hidden_BTD, paths, pull_BTD)
    for index, probe in enumerate(probes):
        probe.add(*gradients[2 * index : 2 * index + 2])


def sample_labels(p_NV: Tensor, generator: torch.Generator) -> Tensor:
    """Returns one label (N, 1) a row, drawn with its probability by the inverse of the distribution function.

    It draws one random number a row. `torch.multinomial` draws one an entry, which for 49,152 entries takes 12 times as
    long as the softmax.
    """
    below_NV = p_NV.cumsum(-1)
    drawn_N1 = torch.rand(len(p_NV), 1, generator=generator).to(p_NV.device) * below_NV[:, -1:]
    return torch.searchsorted(below_NV, drawn_N1, right=True).clamp_(max=p_NV.shape[1] - 1)


def _skip_labels(ids_BT: Tensor, generator: torch.Generator) -> None:
    """Draw the numbers that `sample_labels` draws for a batch: its labels do not depend on who computes the others."""
    torch.rand(ids_BT.numel(), 1, generator=generator)


def batches(windows_BT: Tensor, tokens: int) -> Iterator[Tensor]:
    """Returns batches of about so many tokens, but of one whole window at least."""
    return iter(windows_BT.split(max(1, tokens // windows_BT.shape[1])))


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Registers forward hooks for the length of a block."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_mlp_inputs(model: Any, windows_BT: Tensor, tokens: int) -> list[Tensor]:
    """Returns for each layer the normed MLP inputs (B, T, D) of about `tokens` evenly spread tokens.

    Of many windows only some are read, so that of each there are `_LEAST_OF_WINDOW` tokens: a text's first is unlike
    all others. `model` is one of transformers' or ours.
    """
    device = next(model.parameters()).device
    kept: list[list[Tensor]] = [[] for _ in model.model.layers]
    most = max(1, tokens // min(_LEAST_OF_WINDOW, windows_BT.shape[1]))
    windows_BT = windows_BT[:: -(-len(windows_BT) // most)]
    stride = max(1, windows_BT.numel() // tokens)
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [
        (layer.post_attention_layernorm, lambda _, args, out, k=k: k.append(out[:, ::stride].clone()))
        for layer, k in zip(model.model.layers, kept, strict=True)
    ]
    with hooked(hooks):
        for ids_BT in batches(windows_BT, TOKENS_AT_ONCE):
            model.model(ids_BT.to(device))
    return [torch.cat(parts) for parts in kept]


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _loss_gradient(hidden_BTD: Tensor, head_VD: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the gradient of the summed loss at the final hidden states, each label drawn from the model itself.

    That is (p - onehot(label)) W, a few positions at a time: autograd would hold four copies of all logits.
    """
    pulls = []
    with torch.no_grad():
        for hidden_ND in hidden_BTD.flatten(0, 1).split(_POSITIONS_AT_ONCE):
            p_NV = (hidden_ND.to(head_VD.dtype) @ head_VD.T).float().softmax(-1)
            label_N1 = sample_labels(p_NV, generator)
            p_NV.scatter_add_(1, label_N1, torch.full_like(label_N1, -1, dtype=p_NV.dtype))
            pulls.append((p_NV.to(head_VD.dtype) @ head_VD).to(hidden_BTD.dtype))
    return torch.cat(pulls).view_as(hidden_BTD)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Takes no gradients of parameters inside the block, only of activations."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
