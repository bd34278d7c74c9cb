"""DeepSeek-V3 with the parameter tree of transformers' DeepseekV3ForCausalLM.

Shapes: B batch, T tokens, S prefix + new tokens, D hidden, V vocabulary, R qk_rope_head_dim; input_ids and segment_ids
are (B, T).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from smolseek.formats.deepseek_v3 import group_problem
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.cache import LatentCache
from smolseek.model.experts import MixtureOfExperts
from smolseek.model.layers import MLP, RMSNorm


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

    def forward(
        self, h_BTD: Tensor, rope: tuple[Tensor, Tensor], mask_B1TS: Tensor | None, cache: LatentCache | None
    ) -> Tensor:
        h_BTD = h_BTD + self.self_attn(self.input_layernorm(h_BTD), rope, mask_B1TS, cache)
        return h_BTD + self.mlp(self.post_attention_layernorm(h_BTD))


class Transformer(nn.Module):
    """Embedding, decoder layers and final norm: everything under `model.` in the parameter tree."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # transformers' own: default, linear, dynamic, yarn and longrope stay identical to it.
        self.rotary_emb = DeepseekV3RotaryEmbedding(config)
        self.activation_checkpointing = False
        self.compiled_layers: list[Any] = []
        """The layers for forwards with gradients where `compile_for_training` was called."""

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None, cache: LatentCache | None = None) -> Tensor:
        tokens = input_ids.shape[1]
        if cache is not None:
            cache.reserve(tokens)
        h_BTD = self.embed_tokens(input_ids)
        rope = self.rope(tokens, cache)
        mask_B1TS = attention_mask(tokens, segment_ids, cache, h_BTD.device)
        for layer in self.compiled_layers if torch.is_grad_enabled() and self.compiled_layers else self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                h_BTD = _recomputed(layer, h_BTD, rope, mask_B1TS)
            else:
                h_BTD = layer(h_BTD, rope, mask_B1TS, cache)
        if cache is not None:
            cache.length += tokens
        return self.norm(h_BTD)

    def compile_for_training(self) -> None:
        """Compile the layers at their next forward with gradients; what cannot be compiled runs as it is."""
        torch._dynamo.config.suppress_errors = True  # a machine without a compiler, say: a warning and the plain layer
        self.compiled_layers = [torch.compile(layer, dynamic=False) for layer in self.layers]

    def rope(self, tokens: int, cache: LatentCache | None = None) -> tuple[Tensor, Tensor]:
        """fp32 cos and sin, (B or 1, T, 1, R / 2); positions count from each row's first real token."""
        start, device = 0 if cache is None else cache.length, self.embed_tokens.weight.device
        positions_BT = torch.arange(start, start + tokens, device=device).unsqueeze(0)
        if cache is not None and cache.padding_B is not None:
            positions_BT = positions_BT - cache.padding_B.unsqueeze(1)  # nobody sees the negative ones
        like = torch.empty((), dtype=torch.float32, device=device)
        cos, sin = self.rotary_emb(like, positions_BT)  # each angle twice, (..., R)
        pairs = cos.shape[-1] // 2
        return cos[..., :pairs].unsqueeze(2), sin[..., :pairs].unsqueeze(2)


def _recomputed(layer: nn.Module, *inputs: Any) -> Tensor:
    """The layer's output, what is inside it computed again in the backward pass and its tokens not counted again."""

    @contextlib.contextmanager
    def counts_kept() -> Iterator[None]:
        counts = [b for name, b in layer.named_buffers() if name.endswith("expert_counts")]
        kept = [count_E.clone() for count_E in counts]
        try:
            yield
        finally:
            for count_E, kept_E in zip(counts, kept, strict=True):
                count_E.copy_(kept_E)

    return checkpoint(
        layer,
        *inputs,
        None,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a layer is drawn at random
        context_fn=lambda: (contextlib.nullcontext(), counts_kept()),
    )


def attention_mask(
    tokens: int, segment_ids: Tensor | None, cache: LatentCache | None, device: torch.device
) -> Tensor | None:
    """True where a token may look, (B or 1, 1, T, S), or None where attention's own default says the same.

    Raises ValueError for segments together with a cache.
    """
    if segment_ids is not None:
        if cache is not None:
            raise ValueError("segment_ids with a cache: packed windows have no cache, give one or the other")
        return (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]).tril()
    if cache is None or (cache.padding_B is None and (cache.length == 0 or tokens == 1)):
        return None
    columns_S = torch.arange(cache.length + tokens, device=device)
    rows_T1 = columns_S[cache.length :, None]
    mask_B1TS = (columns_S <= rows_T1)[None, None]
    if cache.padding_B is not None:
        # A padding token still sees itself: a row that sees nothing would be NaN in some kernels.
        mask_B1TS = mask_B1TS & (columns_S >= cache.padding_B[:, None, None, None]) | (columns_S == rows_T1)
    return mask_B1TS


class DeepseekV3(nn.Module):
    """DeepSeek-V3 for causal language modelling (DeepSeek-V3, section 2.1; no multi-token prediction).

    Its state dict equals that of transformers' DeepseekV3ForCausalLM(config) in keys and shapes. Initialised as there:
    normal(0, initializer_range), norms 1, biases 0. Raises ValueError for a config that no such model can have.
    """

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
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: LatentCache | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D).

        `segment_ids` numbers the documents of a packed window, which then do not see each other. With a `cache` the
        tokens follow those it holds; ValueError when they do not fit.
        """
        return self.model(input_ids, segment_ids, cache)

    def forward(
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: LatentCache | None = None
    ) -> Tensor:
        """Logits (B, T, V); arguments as `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, segment_ids=segment_ids, cache=cache))

    def new_cache(self, batch_size: int, capacity_tokens: int, padding_B: Tensor | None = None) -> LatentCache:
        """An empty cache; `padding_B` gives each row's number of left-padding tokens."""
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
        # Routing biases and rope frequencies stay fp32 when the weights are cast: rounding would reroute and misplace.
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            owner, _, leaf = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self.get_submodule(owner), leaf, buffer.to(moved.device))
        return self


def check_config(config: DeepseekV3Config) -> None:
    """Raises ValueError for what DeepseekV3Config lets through and no model can be built from."""
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads {config.num_key_value_heads} differs from num_attention_heads "
            f"{config.num_attention_heads}: in MLA every head has its own keys, make them equal"
        )
    if config.first_k_dense_replace >= config.num_hidden_layers:
        return
    scoring_func = getattr(config, "scoring_func", "sigmoid")
    if scoring_func not in ("sigmoid", "softmax"):
        raise ValueError(f"scoring_func {scoring_func!r} is unknown: choose sigmoid or softmax")
    if problem := group_problem(config.to_dict()):
        raise ValueError(problem)
