"""The earlier address of `smolseek.formats.runtimes`, kept for scripts written against it."""

from smolseek.formats.runtimes import RUNTIMES, check, verdict

__all__ = ["RUNTIMES", "check", "verdict"]
