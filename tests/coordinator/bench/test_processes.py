"""Child processes end with their context, and say why they ended before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coordinator.bench.processes import Child, children
from protos.errors import MeshError


def own_children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if "timeit" in process.cmdline()]


async def test_children_are_heard_and_gone() -> None:
    # Any program of lines will do; this one answers once and then sleeps.
    program = ("timeit", "-n", "1", "-r", "1", "-s", "print('ready', input(), flush=True)", "import time; time.sleep(60)")
    with children("a child", [program, program]) as started:
        assert len(own_children()) == 2
        for number, child in enumerate(started):
            child.say(f"go {number}")
        assert [await child.hear(20) for child in started] == ["ready go 0", "ready go 1"]
        with pytest.raises(MeshError, match=r"a child said nothing for 0\.01 s"):
            await started[0].hear(0.01)
    assert own_children() == []


async def test_a_child_that_ends_says_its_last_line() -> None:
    with (
        children("the reader of memory", [("shardworker", "measure-memory", "--threads", "0")]) as (child,),
        pytest.raises(MeshError, match=r"the reader of memory ended with exit code 2: shardworker: .*--threads"),
    ):
        await child.hear(20)


async def test_speaking_to_a_child_that_has_ended_is_no_error() -> None:
    with Child("a child", ("shardworker", "--version")) as child:
        assert "version" in await child.hear(20)
        with pytest.raises(MeshError, match="exit code 0"):
            await child.hear(20)
        child.say("x" * 100_000)


@pytest.mark.parametrize("arguments", [("coordinator.bench.echo", "unix:{}/e.sock"), ("shardworker", "measure-memory", "--wait")])
def test_a_child_ends_when_its_parent_is_gone(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", *(argument.format(tmp_path) for argument in arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() in {"listening\n", "ready\n"}
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
