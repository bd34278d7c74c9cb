"""smolseek converts a small dense language model to DeepSeek-V3 and trains it to recover its quality.

DeepSeek-V3 has multi-head latent attention (MLA), a mixture of experts (MoE) and auxiliary-loss-free load balancing,
which the project's first description calls "loss-less". `load`, `convert` and `generate` import torch at first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "generate", "load"]

_HOMES = {
    "load": "smolseek.checkpoint.hub",
    "convert": "smolseek.conversion.pipeline",
    "generate": "smolseek.generation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'smolseek' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
