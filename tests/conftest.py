"""Property tests without a deadline: machines are shared, and no test is a timing."""

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
