"""The fingerprint by which coordinator and worker know that they read the same file.

Two fine-tunes of one model have the same size and the same header, so contents count too; reading all of a big checkpoint
only to compare it would take as long as loading it, so contents are sampled.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NUM_SAMPLES = 64
SAMPLE_BYTES = 4096
HEAD_BYTES = 1024 * 1024


def file_fingerprint(path: Path) -> bytes:
    """SHA-256 over a file's size, its first MiB, and 64 evenly spread samples of 4 KiB; 32 bytes.

    Raises:
        OSError: the file cannot be read.

    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        digest.update(os.pread(descriptor, HEAD_BYTES, 0))
        for sample in range(NUM_SAMPLES):
            digest.update(os.pread(descriptor, SAMPLE_BYTES, max(0, size - SAMPLE_BYTES) * sample // (NUM_SAMPLES - 1)))
        return digest.digest()
    finally:
        os.close(descriptor)
