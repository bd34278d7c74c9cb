"""Calibration: second moments of every attention block's input and of the loss gradient at its keys and values.

Shapes: N windows, T tokens, B windows in a batch, V vocabulary, D hidden, Y = 2 * KV heads * head_dim (keys, then
values), R latent rank, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LOGITS_AT_ONCE = 2**25
NORM_EPS = 1e-6
"""What transformers hard-codes in the latent norms."""


@dataclass(frozen=True)
class LayerMoments:
    """E[x xᵀ] (D, D) of the normed block input and E[g gᵀ] (Y, Y) of the log-likelihood's gradient at y = [k; v]."""

    input_DD: Tensor
    fisher_YY: Tensor


@dataclass(frozen=True)
class NormMoments:
    """E[n nᵀ] (R, R) and E[x nᵀ] (D, R) of the normalised latent n = c / rms(c)."""

    latent_RR: Tensor
    cross_DR: Tensor


def collect_moments(model: Any, windows_NT: Tensor, *, seed: int) -> list[LayerMoments]:
    """Per layer, the moments that weigh the low-rank cut, streamed in float64.

    The Fisher block takes the gradient of log p(label) with labels sampled from the model itself, at the un-rotated
    keys and values (design §3, step 1; the true Fisher, not the empirical one).
    """
    generator = torch.Generator().manual_seed(seed)
    attentions = [layer.self_attn for layer in model.model.layers]
    inputs = [_Sum() for _ in attentions]
    fishers = [_Sum() for _ in attentions]
    outputs: list[dict[str, Tensor]] = [{} for _ in attentions]
    hooks: list[tuple[nn.Module, Callable[..., None]]] = [(model.get_input_embeddings(), _require_grad)]
    for attention, input_sum, output in zip(attentions, inputs, outputs, strict=True):
        hooks += [
            (attention.k_proj, lambda _, args, out, s=input_sum, o=output: (s.add(args[0]), o.update(k=out))),
            (attention.v_proj, lambda _, args, out, o=output: o.update(v=out)),
        ]
    with _frozen(model), _hooked(hooks):
        for ids_BT in _batches(model, windows_NT):
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            loss = nn.functional.cross_entropy(
                logits_BTV.flatten(0, 1), _sample(logits_BTV, generator).flatten(), reduction="sum"
            )
            gradients = torch.autograd.grad(loss, [output[name] for output in outputs for name in "kv"])
            for fisher, key, value in zip(fishers, gradients[::2], gradients[1::2], strict=True):
                fisher.add(torch.cat([key, value], dim=-1))
    return [LayerMoments(x.mean(), g.mean()) for x, g in zip(inputs, fishers, strict=True)]


@torch.no_grad()
def collect_norm_moments(model: Any, windows_NT: Tensor, encoders_RD: Sequence[Tensor]) -> list[NormMoments]:
    """Per layer, moments of the latent c = E x after its RMSNorm; one forward pass of the dense model."""
    sums = [(_Sum(), _Sum()) for _ in encoders_RD]

    def add(x_BTD: Tensor, encoder_RD: Tensor, latent: _Sum, cross: _Sum) -> None:
        normed_BTR = rms_norm(x_BTD.double() @ encoder_RD.T)
        latent.add(normed_BTR)
        cross.add(x_BTD, normed_BTR)

    hooks: list[tuple[nn.Module, Callable[..., None]]] = [
        (layer.self_attn.k_proj, lambda _, args, out, e=encoder, s=pair: add(args[0], e, *s))
        for layer, encoder, pair in zip(model.model.layers, encoders_RD, sums, strict=True)
    ]
    with _hooked(hooks):
        for ids_BT in _batches(model, windows_NT):
            model.model(input_ids=ids_BT, use_cache=False)
    return [NormMoments(latent.mean(), cross.mean()) for latent, cross in sums]


def rms_norm(c: Tensor) -> Tensor:
    """RMSNorm without gain over the last dimension, with the eps of the stock latent norm."""
    return c * torch.rsqrt(c.square().mean(-1, keepdim=True) + NORM_EPS)


class _Sum:
    """Streaming sum of outer products over tokens, in float64."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.tokens = 0

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        left = left.detach().flatten(0, -2).double()
        right = left if right is None else right.detach().flatten(0, -2).double()
        self.total = self.total + left.T @ right
        self.tokens += len(left)

    def mean(self) -> Tensor:
        assert isinstance(self.total, Tensor)
        return self.total / self.tokens


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def _sample(logits_BTV: Tensor, generator: torch.Generator) -> Tensor:
    """One label per position, drawn from the model's own distribution."""
    probabilities = logits_BTV.detach().float().softmax(-1).flatten(0, 1)
    return torch.multinomial(probabilities, 1, generator=generator).view(logits_BTV.shape[:2])


def _batches(model: Any, windows_NT: Tensor) -> Iterator[Tensor]:
    """As many windows at once as keep the logits small."""
    return iter(windows_NT.split(max(1, _LOGITS_AT_ONCE // (windows_NT.shape[1] * model.config.vocab_size))))


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
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks for the length of a block; what a hook returns is dropped."""
    handles = [
        module.register_forward_hook(lambda m, args, out, hook=hook: (hook(m, args, out), None)[1])
        for module, hook in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
