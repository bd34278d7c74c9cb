"""Tiny models for tests, with large ("lively") weights.

With the default initialisation attention hardly changes the logits, so errors in it would go unnoticed.
`liveliness(model)` measures how far logits move when attention is zeroed; every model here reaches at least 1.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaForCausalLM

from smolseek.model import DeepseekV3

VOCAB = 96
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""With these numbers the waves of 8 channels are short, long and between."""
LIVELY_ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 3.0, 5.0, 7.0],
    },
}
"""Parameters for each rope type that a config can have, for qk_rope_head_dim 8."""


def tiny_v3_config(**overrides: Any) -> DeepseekV3Config:
    """Returns the config of a model with three layers, the first of them dense.

    No two head sizes are equal, so that tests notice swapped dimensions.
    """
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 40,
        "intermediate_size": 56,
        "moe_intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 24,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 16,
        "max_position_embeddings": 64,
        "rope_parameters": LIVELY_ROPE["default"],
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": None,
        "attn_implementation": "eager",
        "experts_implementation": "eager",  # a plain loop, so that transformers' model shares no kernel with ours
    }
    return DeepseekV3Config(**(settings | overrides))


@torch.no_grad()
def enliven(model: nn.Module, seed: int = 0) -> None:
    """Draws weights so large that every part of the model changes the logits.

    Matrices get normal(0, 1 / sqrt(fan in)), and norms, biases and routing biases get noise too. Embedding and head are
    half as large, which keeps logits of order 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if name.endswith(("norm.weight", "layernorm.weight")):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() > 1 and parameter.numel():
            gain = 0.5 if "embed_tokens" in name or "lm_head" in name else 1.0
            parameter.copy_(noise * gain * parameter.shape[-1] ** -0.5)
        else:
            parameter.copy_(0.3 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


@torch.no_grad()
def liveliness(model: nn.Module) -> float:
    """Returns the largest change of a logit when every `o_proj` is zeroed; the weights are restored."""
    ids = random_ids(2, 12, seed=1)
    outputs = [parameter for name, parameter in model.named_parameters() if "o_proj" in name]
    kept, before = [parameter.clone() for parameter in outputs], logits_of(model, ids)
    for parameter in outputs:
        parameter.zero_()
    after = logits_of(model, ids)
    for parameter, value in zip(outputs, kept, strict=True):
        parameter.copy_(value)
    return (after - before).abs().max().item()


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the logits (B, T, V) of one of our models or of transformers' models."""
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def random_ids(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def layers_of(model: DeepseekV3) -> list[Any]:
    """Returns the decoder layers, typed as Any because nn.ModuleList does not know their class."""
    return list(model.model.layers)


def tiny_v3(**overrides: Any) -> DeepseekV3:
    """Returns our model, lively, in eval mode."""
    model = DeepseekV3(tiny_v3_config(**overrides)).eval()
    enliven(model)
    assert liveliness(model) >= 1
    return model


def tiny_v3_pair(**overrides: Any) -> tuple[DeepseekV3, DeepseekV3ForCausalLM]:
    """Returns (our model, transformers' model) with equal weights, lively, in eval mode."""
    stock = DeepseekV3ForCausalLM(tiny_v3_config(**overrides)).eval()
    enliven(stock)
    assert liveliness(stock) >= 1
    ours = DeepseekV3(tiny_v3_config(**overrides)).eval()
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """Returns a lively dense Llama with grouped queries (4 heads, 2 KV heads), in eval mode."""
    return tiny_dense("llama", **overrides)


def tiny_dense(model_type: str, **overrides: Any) -> Any:
    """Returns a model like `tiny_llama` of another family, built by transformers' classes."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": LIVELY_ROPE["default"],
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": True,
    }
    config = AutoConfig.for_model(model_type, **(settings | overrides))
    model = AutoModelForCausalLM.from_config(config).eval()
    enliven(model)
    assert liveliness(model) >= 1
    return model


def stock_parameters(config: Any) -> int:
    """Returns the number of parameters of the model that transformers builds; it takes no memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
