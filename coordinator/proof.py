"""Whether a new mesh is right: the canary goes through it before callers' tokens do, and whoever may have spoilt it is blamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.errors import MeshError, WrongResult

if TYPE_CHECKING:
    from coordinator.engine import Engine
    from coordinator.mesh import Mesh, MeshBuilder
    from coordinator.sequence import SequenceId


@dataclass(slots=True)
class Prover:
    """Proves one mesh after the other."""

    engine: Engine
    builder: MeshBuilder
    # Workers of the last mesh that was right, by shard.
    _proven: tuple[str, ...] = ()
    _turn: int = 0

    async def prove(self, mesh: Mesh) -> SequenceId:
        """Send the canary through a mesh that no step has seen yet, which is closed if that fails.

        Returns:
            The sequence of which its workers hold keys and values now.

        Raises:
            MeshError: it did not come back, or not right.

        """
        try:
            left = await self.engine.prove_next(mesh.forward, mesh.head, mesh.blueprint.limits)
        except BaseException as error:
            mesh.close()
            if isinstance(error, MeshError):
                self.builder.blame(error, self._culprits(mesh.fanout.addresses, error))
            raise
        self._proven = mesh.fanout.addresses
        return left

    def _culprits(self, addresses: tuple[str, ...], error: MeshError) -> list[str]:
        if error.shards or not isinstance(error, WrongResult):
            return [addresses[shard] for shard in error.shards]
        # All answered soundly, and yet it is not the model: whoever was not there when it was right holds something else.
        if newcomers := [address for address in addresses if address not in self._proven]:
            return newcomers
        # One of them has changed. Each is doubted in turn, so that with a spare the one is passed over sooner or later.
        self._turn += 1
        return [addresses[self._turn % len(addresses)]]
