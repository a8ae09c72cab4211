"""A load on its way: what was asked for, how far it is, and who waits for it."""

from __future__ import annotations

import threading
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from protos.digest import DIGEST_BYTES, mesh_digest, shard_digest
from protos.errors import InvalidArgument, ProtocolMismatch
from protos.rpc import PROTOCOL_VERSION
from shardworker.loader import Progress, load_weights
from shardworker.plan import check_plan
from shardworker.shard import Shard

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from protos import shardworker_pb2 as pb
    from shardworker.executor import OnDevice
    from shardworker.kernels.interface import Kernels
    from shardworker.source import Supplier


class MeshShard(NamedTuple):
    """A plan's identity."""

    digest: bytes
    """Of the mesh, 32 bytes."""
    shard: int


@dataclass(eq=False, slots=True)
class Loading:
    """A load on its way, and those who wait for it."""

    of: MeshShard
    progress: Progress = field(default_factory=lambda: Progress(0, 0))
    cancelled: threading.Event = field(default_factory=threading.Event)
    waiters: int = 0
    done: asyncio.Future[None] | None = None

    def run(
        self,
        request: pb.LoadRequest,
        kernels: Kernels,
        supplier: Supplier | None,
        drop: Callable[[], None],
        on_device: OnDevice,
    ) -> Shard:
        """Load, in a thread of its own.

        Args:
            request: that was checked.
            kernels: of the device.
            supplier: who sends the files' bytes; None: they are read from a folder.
            drop: frees the memory of what has to go first.
            on_device: runs a job on the device, between its rounds.

        Raises:
            MeshError: see `load_weights`.

        """
        on_device(drop)
        plan = request.plan
        try:
            weights, num_bytes = load_weights(
                plan, request.directory, kernels, self._report, self.cancelled.is_set, supplier=supplier, on_device=on_device
            )
        except BaseException as error:
            _forget(error)
            raise
        return on_device(lambda: Shard(plan, weights, num_bytes, kernels))

    def _report(self, progress: Progress) -> None:
        self.progress = progress


def check_protocol(version: int) -> None:
    """Refuse a coordinator of another protocol.

    Raises:
        ProtocolMismatch: likewise.

    """
    if version != PROTOCOL_VERSION:
        raise ProtocolMismatch(
            f"the coordinator speaks protocol {version}, this worker {PROTOCOL_VERSION}: upgrade the older one"
        )


def check_load(request: pb.LoadRequest) -> MeshShard:
    """Check that a request agrees with itself; give what it asks for.

    Raises:
        ProtocolMismatch: another protocol.
        InvalidArgument: it contradicts itself.

    """
    check_protocol(request.protocol_version)
    if request.assignment == 0:
        raise InvalidArgument("assignment: wanted at least 1, found 0")
    plan, digests = request.plan, request.shard_digests
    if len(digests) != plan.num_shards or any(len(digest) != DIGEST_BYTES for digest in digests):
        raise InvalidArgument(f"shard_digests: wanted {plan.num_shards} of {DIGEST_BYTES} bytes, found {len(digests)}")
    check_plan(plan)
    if digests[plan.shard] != shard_digest(plan):
        raise InvalidArgument(f"shard_digests: number {plan.shard} is not this plan's")
    return MeshShard(mesh_digest(digests), plan.shard)


def _forget(error: BaseException) -> None:
    """Clear the frames that an error passed: half-loaded weights would live as long as it is looked at."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
