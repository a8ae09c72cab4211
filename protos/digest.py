"""The digests by which a mesh is fenced."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.plan_pb2 import ShardPlan

DIGEST_BYTES = 32


def shard_digest(plan: ShardPlan) -> bytes:
    """SHA-256 of the deterministically serialized plan, 32 bytes."""
    return hashlib.sha256(plan.SerializeToString(deterministic=True)).digest()


def mesh_digest(shard_digests: Sequence[bytes]) -> bytes:
    """SHA-256 of the concatenated shard digests in shard order, 32 bytes: equal on every shard of a mesh."""
    return hashlib.sha256(b"".join(shard_digests)).digest()
