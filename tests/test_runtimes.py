"""Scripts written against the earlier addresses find the same functions."""

import smolseek.checkpoint.headers
import smolseek.formats.headers
import smolseek.formats.runtimes
import smolseek.runtimes


def test_earlier_addresses_name_the_same_functions():
    assert smolseek.checkpoint.headers.read_headers is smolseek.formats.headers.read_headers
    assert smolseek.runtimes.check is smolseek.formats.runtimes.check
