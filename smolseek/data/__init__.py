"""Text: where it comes from and how it becomes token windows; never sees a model."""

from smolseek.data.windows import calibration_windows

__all__ = ["calibration_windows"]
