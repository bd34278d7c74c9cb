"""DeepSeek-V3 in plain PyTorch, and an adapter that gives stock transformers models the same interface."""

from smolseek.model.cache import LatentCache
from smolseek.model.stock import StockModel
from smolseek.model.transformer import DeepseekV3

__all__ = ["DeepseekV3", "LatentCache", "StockModel"]
