"""The converted model in memory, and how far it is from the dense one.

Shapes: B windows, T tokens in each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from smolseek.evaluation import measure_divergence, measure_quality
from smolseek.model import DeepseekV3, StockModel


def assemble(dense: Any, target: dict[str, Any], layers: list[dict[str, Tensor]]) -> DeepseekV3:
    """Returns the converted model, its MLPs dense and every unconverted weight shared with the dense model.

    It lies where the dense model lies.
    """
    config = DeepseekV3Config(**target | {"first_k_dense_replace": len(layers)})
    with torch.device("meta"):
        model = DeepseekV3(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(dense.device)
    wanted = model.state_dict()
    state = {name: tensor for name, tensor in dense.state_dict().items() if name in wanted}
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}.self_attn."
        state |= {f"{prefix}{name}": tensor.float().to(dense.device) for name, tensor in layer.items()}
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def layers_of(model: DeepseekV3) -> list[Any]:
    """Returns the decoder layers, untyped: nn.ModuleList hides what they are."""
    return list(model.model.layers)


def own_weights(student: DeepseekV3, parts: tuple[type[nn.Module], ...] = ()) -> dict[str, nn.Parameter]:
    """Returns the weights that the end-to-end stage trains, no longer shared with the dense model.

    These are the weights of the `parts`, or all weights where none is given: of a small model that keeps more, on text
    of another domain too, than attention and experts alone (LOG.md). Attention in the exact form has to stand still.
    """
    owners = {name: m for name, m in student.named_modules() if isinstance(m, parts)} if parts else {"": student}
    trained = {name: p for owner, module in owners.items() for name, p in module.named_parameters(owner)}
    for parameter in trained.values():
        parameter.data = parameter.data.clone()
    return trained


def mean_loss(model: DeepseekV3 | StockModel, windows_BT: Tensor) -> float:
    """Returns the mean next-token loss over windows, in nats."""
    return measure_quality(model, windows_BT.flatten(), 0, window_tokens=windows_BT.shape[1]).loss


def mean_divergence(model: DeepseekV3, dense: Any, windows_BT: Tensor) -> float:
    """Returns the mean KL(dense ‖ converted) of the next token over windows, in nats."""
    ids_T, size = windows_BT.flatten(), windows_BT.shape[1]
    return measure_divergence(model, StockModel(dense), ids_T, window_tokens=size).kl
