"""The earlier address of `smolseek.formats.headers`, kept for scripts written against it."""

from smolseek.formats.headers import Header, read_headers

__all__ = ["Header", "read_headers"]
