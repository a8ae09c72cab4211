"""Launches of a decoding round recorded once and replayed, so that Python does not start each kernel anew.

What is replayed reads and writes the addresses that it was recorded with. So inputs are copied into memory that all
recordings share, one after the other on one stream, and whatever else is read must lie where the key says. The CUDA half,
`CudaRecorder`, has never run: no test has had a GPU.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

log = structlog.get_logger(__name__)

MOST_RECORDINGS = 4096
"""Those of 64 layers in 7 sizes with room to spare; the one that was not used for longest makes place."""


class Recording(NamedTuple):
    """What was recorded."""

    replay: Callable[[], None]
    output: torch.Tensor
    """Written by each replay."""


class Recorder(Protocol):
    """Records what a device is told to do."""

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        """Call `compute`, perhaps several times, and keep what it launches; the output need not be written yet.

        Raises:
            RuntimeError: it cannot be recorded.

        """


class Input(NamedTuple):
    """A tensor that a recording reads."""

    tensor: torch.Tensor
    room: int
    """Size of the first dimension in the recording's memory, at least the tensor's own; beyond that stands what stood there."""


class Graphs:
    """Recordings by key; belongs to the device's thread."""

    def __init__(self, recorder: Recorder, device: torch.device) -> None:
        self._recorder = recorder
        self._device = device
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._memory: dict[tuple[int, tuple[int, ...], torch.dtype], torch.Tensor] = {}
        self._refused = False

    def __len__(self) -> int:
        return len(self._recordings)

    def run(self, key: Hashable, inputs: Sequence[Input], compute: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Compute, or replay what an equal key computed.

        Args:
            key: whatever decides what is launched and which memory besides the inputs is used: sizes, addresses.
            inputs: given to `compute` with the size of their rooms.
            compute: launches kernels only; nothing in it waits for the device.

        Returns:
            The output, valid until the next run with an equal key.

        """
        places = [self._copy(number, part) for number, part in enumerate(inputs)]
        if self._refused:
            return compute(*places)
        rooms = (key, tuple((tuple(place.shape), place.dtype) for place in places))
        recording = self._recordings.get(rooms)
        if recording is None:
            try:
                recording = self._recorder.record(lambda: compute(*places))
            except RuntimeError as error:
                log.warning("rounds cannot be recorded; they are launched kernel by kernel", error=str(error))
                self._refused = True
                return compute(*places)
            self._recordings[rooms] = recording
            if len(self._recordings) > MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(rooms)
        recording.replay()
        return recording.output

    def _copy(self, number: int, part: Input) -> torch.Tensor:
        shape = (part.room, *part.tensor.shape[1:])
        at = (number, shape, part.tensor.dtype)
        if (place := self._memory.get(at)) is None:
            # Zeros: what no row fills must not be NaN on its way to a comparison.
            place = self._memory[at] = torch.zeros(shape, dtype=part.tensor.dtype, device=self._device)
        place[: part.tensor.shape[0]].copy_(part.tensor, non_blocking=True)
        return place


class CudaRecorder:
    """CUDA graphs of one device; their memory comes from one pool, as they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        """Run once beside, so that everything is compiled and loaded, then capture."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # Not `torch.cuda.graph`, which collects garbage and empties the allocator's cache: 96 times for a first token.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            compute()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = compute()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return Recording(graph.replay, output)
