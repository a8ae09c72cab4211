"""Settings of all tests."""

import os

import pytest
import structlog
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Before anything imports Triton (transformers does): where there is no GPU its kernels are interpreted on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time, without a deadline: what is red stays red, and a busy machine reddens nothing.
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _logs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that a test runs in this process must not set up logging for the tests after it: loggers remember."""
    monkeypatch.setattr(structlog, "configure", lambda **_: None)
