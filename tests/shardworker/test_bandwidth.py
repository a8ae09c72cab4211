"""Reading memory: a plausible rate, by all threads, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from math import nan

import pytest

from protos.errors import InvalidArgument, OutOfMemory
from shardworker import bandwidth
from shardworker.bandwidth import CHUNK_BYTES, make_buffer, read_bandwidth, read_buffer

COMMAND = (sys.executable, "-m", "shardworker", "measure-memory")


@pytest.mark.parametrize("threads", [1, 3])
def test_rate_is_plausible(threads: int) -> None:
    assert 1e8 < read_bandwidth(threads, 0.02, 4 * CHUNK_BYTES) < 1e13


def test_rate_counts_the_chunks_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}

    def read_chunk(buffer: bandwidth.Buffer, chunk: int) -> None:
        seen.setdefault(threading.current_thread().name, set()).add(chunk)
        assert buffer[chunk].nbytes == CHUNK_BYTES
        done.wait(0.001)

    done = threading.Event()
    monkeypatch.setattr(bandwidth, "_read_chunk", read_chunk)
    rate = read_bandwidth(2, 0.05, 3 * CHUNK_BYTES + 5)
    # At most one chunk a millisecond and thread.
    assert 0 < rate < 2.2 * 1000 * CHUNK_BYTES
    assert set(seen) == {"read-0", "read-1"}
    assert set.union(*seen.values()) == {0, 1, 2}


def test_buffer_is_memory_and_not_the_page_of_zeros() -> None:
    buffer = make_buffer(2 * CHUNK_BYTES)
    assert buffer.nbytes == 2 * CHUNK_BYTES
    assert bool((buffer == 1).all())


@pytest.mark.parametrize(
    ("threads", "seconds", "num_bytes"),
    [(0, 1, CHUNK_BYTES), (1, 0, CHUNK_BYTES), (1, nan, CHUNK_BYTES), (1, 1, CHUNK_BYTES - 1)],
)
def test_too_little_of_anything_is_refused(threads: int, seconds: float, num_bytes: int) -> None:
    with pytest.raises(InvalidArgument, match="at least"):
        read_bandwidth(threads, seconds, num_bytes)


def test_too_little_memory_is_said() -> None:
    with pytest.raises(OutOfMemory, match="no room for"):
        make_buffer(2**60)


def test_a_thread_more_reads_the_same_buffer() -> None:
    buffer = make_buffer(CHUNK_BYTES)
    assert read_buffer(buffer, 2, 0.01) > 0


def test_command_prints_one_object_after_it_was_told_to_begin() -> None:
    command = [*COMMAND, "--threads", "2", "--seconds", "0.02", "--wait"]
    result = subprocess.run(command, input="go\n", capture_output=True, text=True, check=True)
    ready, line = result.stdout.splitlines()
    assert ready == "ready"
    assert json.loads(line)["bytes_per_s"] > 1e8
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [("--threads", "0"), ("--seconds", "0"), ("--bytes", "1")])
def test_a_mistake_is_one_line_and_exit_code_2(arguments: tuple[str, str]) -> None:
    result = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("shardworker: ")
    assert arguments[0] in line
