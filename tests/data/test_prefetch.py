"""What a thread makes ahead, and what it tells of its end."""

import pytest

from smolseek.data.prefetch import Prefetcher


class Panic(BaseException):
    """As tokenizers raise it."""


@pytest.mark.parametrize("error", [ValueError, Panic])
def test_every_error_of_the_thread_reaches_its_user(error):
    def items():
        yield 1
        raise error("broken")

    made = Prefetcher(items(), depth=2)
    assert next(made) == 1
    for _ in range(2):
        with pytest.raises(error, match="broken"):
            next(made)
