"""How fast this process can read memory: the limit beside which a worker's arithmetic is judged.

Weights of experts lie scattered over gigabytes. So chunks of 1 MiB are read in random order from a buffer that no cache holds,
by as many threads as compute. numpy sums them: its loop reads at the memory's rate, lets go of the interpreter's lock
meanwhile, and is there in a tenth of a second where torch takes seconds to import.
"""

from __future__ import annotations

import random
import threading
import time

import numpy as np

from protos.errors import InvalidArgument, OutOfMemory

CHUNK_BYTES = 2**20
BUFFER_BYTES = 2**30
"""More than any cache holds."""

_ITEM_BYTES = 8

Buffer = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""[chunks, CHUNK_BYTES / 8]"""


def read_bandwidth(num_threads: int, seconds: float, num_bytes: int = BUFFER_BYTES) -> float:
    """Read random chunks for a while.

    Args:
        num_threads: that read at the same time.
        seconds: how long.
        num_bytes: of the buffer, at least one chunk; shared by the threads.

    Returns:
        bytes per second, of all threads together.

    Raises:
        InvalidArgument: a number that is too small.
        OutOfMemory: there is no room for the buffer.

    """
    return read_buffer(make_buffer(num_bytes), num_threads, seconds)


def make_buffer(num_bytes: int = BUFFER_BYTES) -> Buffer:
    """Make what is read, with all its pages in memory.

    Raises:
        InvalidArgument: less than one chunk.
        OutOfMemory: there is no room for it.

    """
    if num_bytes < CHUNK_BYTES:
        raise InvalidArgument(f"the buffer needs at least {CHUNK_BYTES} bytes, found {num_bytes}")
    try:
        # Zeros would all be the kernel's one page of zeros.
        return np.full((num_bytes // CHUNK_BYTES, CHUNK_BYTES // _ITEM_BYTES), 1, dtype=np.int64)
    except MemoryError:
        raise OutOfMemory(f"no room for {num_bytes} bytes, from which the memory's rate would be measured") from None


def read_buffer(buffer: Buffer, num_threads: int, seconds: float) -> float:
    """Read chunks in random order, each thread its own; bytes per second of all of them.

    Raises:
        InvalidArgument: no thread, or no time.

    """
    if num_threads < 1 or not seconds > 0:
        raise InvalidArgument(f"wanted at least 1 thread and some time, found {num_threads} threads and {seconds} s")
    counts = [0] * num_threads
    together = threading.Barrier(num_threads + 1)

    def read(thread: int) -> None:
        order = random.Random(thread)  # noqa: S311  # no secret
        together.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            _read_chunk(buffer, order.randrange(len(buffer)))
            counts[thread] += 1

    threads = [threading.Thread(target=read, args=(number,), name=f"read-{number}", daemon=True) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    together.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(counts) * CHUNK_BYTES / (time.perf_counter() - start)


def _read_chunk(buffer: Buffer, chunk: int) -> None:
    np.add.reduce(buffer[chunk])
