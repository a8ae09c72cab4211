from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch


async def test_jobs_run_in_order_in_one_thread_without_autograd(executor: Any) -> None:
    seen: list[tuple[int, int, bool]] = []
    jobs = [
        executor.submit(lambda n=n: seen.append((n, threading.get_ident(), torch.is_inference_mode_enabled()))) for n in range(5)
    ]
    await asyncio.gather(*jobs)
    assert [number for number, *_ in seen] == [0, 1, 2, 3, 4]
    assert {(thread != threading.get_ident(), mode) for _, thread, mode in seen} == {(True, True)}


async def test_waiting_and_working_are_measured(executor: Any) -> None:
    gate = threading.Event()
    first, second = executor.submit(gate.wait), executor.submit(lambda: 7)
    await asyncio.sleep(0.01)
    gate.set()
    assert (await first).compute_ns > 5_000_000
    result, queue_ns, compute_ns = await second
    assert result == 7
    assert queue_ns > 5_000_000 > compute_ns


async def test_an_error_reaches_the_waiter_and_the_thread_goes_on(executor: Any) -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await executor.submit(fail)
    assert (await executor.submit(lambda: 1)).result == 1


async def test_a_cancelled_wait_does_not_stop_the_job(executor: Any) -> None:
    gate, done = threading.Event(), []
    job = executor.submit(lambda: (gate.wait(), done.append(1)))
    job.cancel()
    gate.set()
    await executor.submit(lambda: None)
    assert done == [1]
