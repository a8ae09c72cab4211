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


async def test_a_short_job_runs_here_if_the_device_is_idle(executor: Any) -> None:
    assert not torch.is_inference_mode_enabled()
    result, queue_ns, compute_ns = await executor.run_short(lambda: (threading.get_ident(), torch.is_inference_mode_enabled()))
    assert result == (threading.get_ident(), True)
    assert queue_ns > 0 < compute_ns
    assert not torch.is_inference_mode_enabled()


async def test_a_short_job_waits_for_those_before_it(executor: Any) -> None:
    gate, seen = threading.Event(), []
    first = executor.submit(lambda: (gate.wait(), seen.append("long")))
    second = asyncio.ensure_future(executor.run_short(lambda: seen.append("short")))
    # The event loop is not held up by what the device does.
    await asyncio.sleep(0.01)
    assert seen == []
    gate.set()
    await asyncio.gather(first, second)
    assert seen == ["long", "short"]


async def test_an_error_of_a_short_job_reaches_its_caller(executor: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        await executor.run_short(lambda: 1 // 0)
    assert (await executor.run_short(lambda: 7)).result == 7


async def test_work_beside_the_device_gives_it_jobs_between_others(executor: Any) -> None:
    gate, seen = threading.Event(), []

    def work(on_device: Any) -> str:
        seen.append(("beside", threading.get_ident() != on_device(threading.get_ident), torch.is_inference_mode_enabled()))
        gate.wait()
        return on_device(lambda: "done")

    under_way = executor.beside(work)
    # The device is free while the work waits for something else.
    assert (await executor.submit(lambda: 1)).result == 1
    gate.set()
    assert await under_way == "done"
    assert seen == [("beside", True, True)]


async def test_an_error_on_the_device_reaches_the_work_beside_and_its_waiter(executor: Any) -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await executor.beside(lambda on_device: on_device(fail))
    assert await executor.beside(lambda _: 1) == 1
