"""What a conversion will give and cost, from a source's config.json alone; no weights, no torch."""

from smolseek.planning.decoding import FASTER, count_decoding
from smolseek.planning.memory import TrainingMemory, training_memory
from smolseek.planning.plans import Cost, Plan, plan
from smolseek.planning.shapes import cache_bytes_per_token
from smolseek.planning.text import render

__all__ = [
    "FASTER",
    "Cost",
    "Plan",
    "TrainingMemory",
    "cache_bytes_per_token",
    "count_decoding",
    "plan",
    "render",
    "training_memory",
]
