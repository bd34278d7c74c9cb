"""Attention in windows that hold several documents, on a GPU: blocks in which no token sees another are skipped.

FlexAttention (Dong et al. 2024) compiles a fused kernel for a mask that is a function. It needs no mask in memory, and
a window costs what its documents cost. On a CPU it has no backward pass: there the mask stays, as `attention_mask`
gives it.

Shapes: B windows, T tokens in each, H num_attention_heads, Q = qk_nope_head_dim + qk_rope_head_dim, v v_head_dim.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

log = logging.getLogger(__name__)
_TRIAL_TOKENS = 256


def document_blocks(segment_ids_BT: Tensor) -> BlockMask:
    """Returns the blocks of tokens that a token may attend to: those of its own document, up to itself."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (segment_ids_BT[window, query] == segment_ids_BT[window, key]) & (query >= key)

    windows, tokens = segment_ids_BT.shape
    return _compiled(create_block_mask)(sees, windows, None, tokens, tokens, device=str(segment_ids_BT.device))


def attend_blocks(q_BHTQ: Tensor, k_BHTQ: Tensor, v_BHTv: Tensor, blocks: BlockMask, scale: float) -> Tensor:
    """Returns attention within documents, (B, H, T, v)."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
    return attend(q_BHTQ, k_BHTQ, v_BHTv, block_mask=blocks, scale=scale)


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, query_width: int, value_width: int) -> bool:
    """Returns whether `attend_blocks` runs on this device, forward and backward, for heads of these widths.

    A process tries it once, on zeros. No simple rule tells which widths a GPU takes: at least 16; 192 and 128 on an
    H100, but not where a block has less shared memory (PyTorch #180278, #198224). And there may be no compiler.
    """
    if device.type != "cuda":
        return False
    try:
        widths = (query_width, query_width, value_width)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            shapes = [(1, 1, _TRIAL_TOKENS, width) for width in widths]
            q, k, v = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
            blocks = document_blocks(torch.zeros(1, _TRIAL_TOKENS, dtype=torch.int64, device=device))
            attend_blocks(q, k, v, blocks, 1.0).sum().backward()
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        log.warning(f"no FlexAttention for heads of {query_width} and {value_width} here ({reason}): a mask does")
        return False
    return True


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the compiled function; it raises where it cannot be compiled."""
    return torch.compile(function, fullgraph=True)
