"""Measures of a model: held-out loss, distance from a teacher, balance of the experts, retrieval, public tasks."""

from smolseek.evaluation.balance import measure_balance
from smolseek.evaluation.compare import Comparison, Difference, Divergence, compare, measure_divergence
from smolseek.evaluation.quality import WINDOW_TOKENS, Quality, combine_qualities, measure_quality
from smolseek.evaluation.specialisation import measure_specialisation
from smolseek.evaluation.speed import measure_decode_speed

__all__ = [
    "WINDOW_TOKENS",
    "Comparison",
    "Difference",
    "Divergence",
    "Quality",
    "combine_qualities",
    "compare",
    "measure_balance",
    "measure_decode_speed",
    "measure_divergence",
    "measure_quality",
    "measure_specialisation",
]
