"""A model opened for serving: its description, headers and tokenizer; weights are read later, by whoever holds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from coordinator.config import DTYPES, QUANTIZATIONS
from coordinator.models.checkpoint import Checkpoint
from coordinator.models.config import read_config, read_stop_ids
from coordinator.models.hub import resolve
from coordinator.models.layout import match_layout
from coordinator.models.registry import describe
from coordinator.planning.plan import default_dtype, plan_mesh
from coordinator.resident import Resident, load_resident, random_resident
from coordinator.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.config import ModelSettings
    from coordinator.models.spec import ModelSpec
    from coordinator.planning.plan import MeshPlan
    from protos.tensor_pb2 import DType


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Everything that is known of a model without its weights."""

    settings: ModelSettings
    directory: Path
    spec: ModelSpec
    checkpoint: Checkpoint | None
    """None with random weights."""
    tokenizer: Tokenizer | None
    """None where the folder has no tokenizer.json: token ids only."""
    stop_ids: frozenset[int]
    dtype: DType
    """The one asked for, or else the model's own."""

    @property
    def files(self) -> Path | None:
        """Folder of the weights' files; None with random weights."""
        return None if self.checkpoint is None else self.directory

    @classmethod
    def open(cls, settings: ModelSettings) -> Self:
        """Read config, headers and tokenizer.

        Raises:
            ModelError: something is missing, damaged or not supported.

        """
        directory = resolve(settings.model, weights=not settings.random_weights)
        config = read_config(directory)
        spec = describe(config)
        checkpoint = None if settings.random_weights else Checkpoint.open(directory)
        return cls(
            settings=settings,
            directory=directory,
            spec=match_layout(spec, checkpoint.tensors) if checkpoint else spec,
            checkpoint=checkpoint,
            tokenizer=Tokenizer.load_optional(directory),
            stop_ids=frozenset(read_stop_ids(directory)),
            dtype=default_dtype(config, checkpoint) if settings.dtype == "auto" else DTYPES[settings.dtype],
        )

    def plan(self, num_shards: int, page_tokens: int) -> MeshPlan:
        """Cut the model into shards.

        Raises:
            ModelError: tensors are missing or of another shape.
            TopologyError: it cannot be cut into so many.

        """
        return plan_mesh(
            self.spec,
            self.checkpoint,
            num_shards,
            dtype=self.dtype,
            quantization=QUANTIZATIONS[self.settings.quantization],
            page_tokens=page_tokens,
        )

    def resident(self) -> Resident:
        """Read the coordinator's own weights."""
        return random_resident(self.spec) if self.checkpoint is None else load_resident(self.spec, self.checkpoint)
