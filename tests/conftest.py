"""Settings of all tests."""

from hypothesis import settings

# The same examples every time, without a deadline: what is red stays red, and a busy machine reddens nothing.
settings.load_profile("ci")
