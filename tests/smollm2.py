"""Where the only real model of the tests lies: `make test` fetches it."""

from pathlib import Path

import pytest

MODELS = Path(__file__).parent.parent / "models"
SMOLLM2 = MODELS / "smollm2-135m-instruct"
SMOLLM2_GGUF = MODELS / "smollm2-135m-instruct.gguf"

needs_smollm2 = pytest.mark.skipif(
    not (SMOLLM2 / "config.json").exists() or not SMOLLM2_GGUF.exists(),
    reason="SmolLM2-135M-Instruct is not in models/: run make test, which fetches it",
)
