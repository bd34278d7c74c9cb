"""Text: where it comes from, and how it becomes windows of tokens. Nothing here knows a model."""

from smolseek.data.drawing import calibration_windows

__all__ = ["calibration_windows"]
