"""smolseek: a small dense language model becomes DeepSeek-V3 (MLA, MoE, loss-less balancing) and is made good again.

`load`, `convert` and `generate` import torch when they are first asked for, not before.
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
