"""Writes DeepSeek-V3 folders in the formats of other programs."""
