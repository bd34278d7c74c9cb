"""DeepSeek-V3 with the parameter tree of transformers' DeepseekV3ForCausalLM.

Shapes: B sequences, T new tokens in each, S tokens attended to (cached and new), D hidden_size, V vocab_size,
R qk_rope_head_dim, s = R / 2 rope slots, E n_routed_experts; input_ids and segment_ids are (B, T).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from smolseek.formats.deepseek_v3 import SCORING_FUNCS, group_problem
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.cache import FixedCache, LatentCache
from smolseek.model.experts import MixtureOfExperts, counts_kept
from smolseek.model.layers import MLP, RMSNorm
from smolseek.model.packed import document_blocks, has_kernel
from smolseek.numerics.precision import autocast_dtype

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Cache = LatentCache | FixedCache
Mask = Union[Tensor, "BlockMask", None]


class DecoderLayer(nn.Module):
    """Pre-norm attention, then a pre-norm MLP: dense in the first `first_k_dense_replace` layers, else experts."""

    def __init__(self, config: DeepseekV3Config, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.self_attn = MultiheadLatentAttention(config, layer_index)
        is_dense = layer_index < config.first_k_dense_replace
        self.mlp = MLP(config, config.intermediate_size) if is_dense else MixtureOfExperts(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, h_BTD: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Cache | None) -> Tensor:
        h_BTD = h_BTD + self.self_attn(self.input_layernorm(h_BTD), rope, mask, cache)
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))


class Transformer(nn.Module):
    """Embedding, decoder layers and final norm: all parameters whose names begin with `model.`."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # transformers' own class, so that every rope type (default, linear, dynamic, yarn, longrope) gives its numbers.
        self.rotary_emb = DeepseekV3RotaryEmbedding(config)
        self.activation_checkpointing = False
        self.compiled_layers: list[Any] = []
        """Compiled layers for forwards with gradients; empty until `compile_for_training` is called."""

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        tokens = input_ids.shape[1]
        if cache is not None:
            cache.reserve(tokens)
        h_BTD = self.embed_tokens(input_ids)
        rope = self.rope(tokens, cache)
        mask = self.mask(h_BTD, segment_ids, cache)
        for layer in self.compiled_layers if torch.is_grad_enabled() and self.compiled_layers else self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                h_BTD = _checkpointed(layer, h_BTD, rope, mask)
            else:
                h_BTD = layer(h_BTD, rope, mask, cache)
        if cache is not None:
            cache.advance(tokens)
        return self.norm(h_BTD)

    def compile_for_training(self) -> None:
        """Makes each layer compile at its next forward with gradients; one that cannot be compiled runs as before."""
        torch._dynamo.config.suppress_errors = True  # without a compiler, for example: warn and run the plain layer
        self.compiled_layers = [torch.compile(layer, dynamic=False) for layer in self.layers]

    def mask(self, h_BTD: Tensor, segment_ids: Tensor | None, cache: Cache | None) -> Mask:
        """Returns what every layer attends with; packed windows get blocks in training where there is a kernel."""
        if segment_ids is not None and cache is None and torch.is_grad_enabled():
            widths = self.config.qk_nope_head_dim + self.config.qk_rope_head_dim, self.config.v_head_dim
            dropped = self.training and self.config.attention_dropout
            if not dropped and has_kernel(h_BTD.device, autocast_dtype(h_BTD), *widths):
                return document_blocks(segment_ids)
        return attention_mask(h_BTD.shape[1], segment_ids, cache)

    def rope(self, tokens: int, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """Returns cos and sin in fp32, (B or 1, T, 1, s); positions count from each row's first token after padding."""
        device = self.embed_tokens.weight.device
        positions_T = torch.arange(tokens, device=device) if cache is None else cache.new_columns(tokens)
        positions_BT = positions_T.unsqueeze(0)
        if cache is not None and cache.padding_B is not None:
            positions_BT = positions_BT - cache.padding_B.unsqueeze(1)  # padding gets negative ones, which are masked
        like = torch.empty((), dtype=torch.float32, device=device)
        cos, sin = self.rotary_emb(like, positions_BT)  # (..., R): each angle stands there twice
        slots = cos.shape[-1] // 2
        return cos[..., :slots].unsqueeze(2), sin[..., :slots].unsqueeze(2)


def _checkpointed(layer: nn.Module, *inputs: Any) -> Tensor:
    """Returns the layer's output; the backward pass recomputes its activations and leaves the expert counts alone."""

    return checkpoint(
        layer,
        *inputs,
        None,
        use_reentrant=False,
        preserve_rng_state=bool(layer.get_submodule("self_attn").attention_dropout),  # nothing else is drawn at random
        context_fn=lambda: (contextlib.nullcontext(), counts_kept(layer)),
    )


def attention_mask(tokens: int, segment_ids: Tensor | None, cache: Cache | None) -> Tensor | None:
    """Returns a mask (B or 1, 1, T, S), True where a token may attend; None if it equals attention's default.

    Raises ValueError when both segments and a cache are given.
    """
    if segment_ids is not None:
        if cache is not None:
            raise ValueError("segment_ids with a cache: packed windows have no cache, give one or the other")
        return (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]).tril()
    return None if cache is None else cache.mask(tokens)


class DeepseekV3(nn.Module):
    """DeepSeek-V3 for causal language modelling (DeepSeek-V3, section 2.1; no multi-token prediction).

    Its state dict has the keys and shapes of transformers' DeepseekV3ForCausalLM(config), and its initial values are
    drawn as there: normal(0, initializer_range), norms 1, biases 0. Raises ValueError as `check_config` does.
    """

    end_token_ids: tuple[int, ...] = ()
    """The tokens that end a text, by config.json and generation_config.json of the folder that was loaded."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._init_weights()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden_states(
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Returns the hidden states after the final norm, (B, T, D).

        `segment_ids` numbers the documents of a packed window: a token attends only to its own document. With a `cache`
        the tokens follow the cached ones; ValueError if they do not fit into it.
        """
        return self.model(input_ids, segment_ids, cache)

    def forward(self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Returns logits (B, T, V); arguments as in `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, segment_ids=segment_ids, cache=cache))

    def new_cache(self, batch_size: int, capacity_tokens: int, padding_B: Tensor | None = None) -> LatentCache:
        """Returns an empty cache; `padding_B` gives each row's number of left-padding tokens."""
        weight = self.model.embed_tokens.weight
        return LatentCache(
            self.config, batch_size, capacity_tokens, padding_B, dtype=weight.dtype, device=weight.device
        )

    @torch.no_grad()
    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, self.config.initializer_range)
            elif name.endswith(".bias"):
                parameter.zero_()
        if self.config.pad_token_id is not None:
            self.model.embed_tokens.weight[self.config.pad_token_id].zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Casting the weights keeps routing biases and rope frequencies in fp32: rounding a bias would change the chosen
        # experts, and rounding a frequency would shift positions.
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            owner, _, leaf = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self.get_submodule(owner), leaf, buffer.to(moved.device))
        return self


def check_config(config: DeepseekV3Config) -> None:
    """Raises ValueError for a config that DeepseekV3Config accepts but no model can be built from."""
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads {config.num_key_value_heads} differs from num_attention_heads "
            f"{config.num_attention_heads}: in MLA every head has its own keys, make them equal"
        )
    if config.first_k_dense_replace >= config.num_hidden_layers:
        return
    scoring_func = getattr(config, "scoring_func", "sigmoid")
    if scoring_func not in SCORING_FUNCS:
        raise ValueError(f"scoring_func {scoring_func!r} is unknown: choose {' or '.join(SCORING_FUNCS)}")
    if problem := group_problem(config.to_dict()):
        raise ValueError(problem)
