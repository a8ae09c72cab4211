from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import stat
import subprocess
import sys
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import torch

from shardworker import cli
from shardworker.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging is set up once for a process; the runner's streams are gone after a test."""
    monkeypatch.setattr(cli, "configure_logging", lambda *_: None)


class Worker:
    """A worker process."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardworker", "serve", "--device", "cpu", "--threads", "1", *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        assert self.process.stdout
        self.line = self.process.stdout.readline()

    def end(self) -> tuple[int, str, str]:
        rest, errors = self.process.communicate(timeout=30)
        return self.process.returncode, rest, errors


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.process.kill()
        worker.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_worker_and_removes_its_socket(tmp_path: Path, workers: list[Worker], number: int) -> None:
    path = tmp_path / "w.sock"
    worker = Worker("--listen", f"unix:{path}")
    workers.append(worker)
    assert worker.line == f"listening on unix:{path}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    worker.process.send_signal(number)
    code, rest, errors = worker.end()
    assert (code, rest) == (0, "")
    assert "Traceback" not in errors
    assert not path.exists()
    assert tmp_path.exists()


def test_the_end_of_standard_input_ends_an_embedded_worker(tmp_path: Path, workers: list[Worker]) -> None:
    folder = tmp_path / "mesh"
    folder.mkdir()
    (folder / "of-the-parent").touch()
    worker = Worker("--listen", f"unix:{folder}/w.sock", "--embedded-in", str(folder))
    workers.append(worker)
    assert worker.end()[0] == 0
    assert not folder.exists()


def test_an_embedded_worker_that_is_told_to_end_leaves_the_folder_to_its_parent(tmp_path: Path, workers: list[Worker]) -> None:
    folder = tmp_path / "mesh"
    folder.mkdir()
    worker = Worker("--listen", f"unix:{folder}/w.sock", "--embedded-in", str(folder))
    workers.append(worker)
    worker.process.terminate()
    assert worker.process.wait(60) == 0
    assert folder.exists()
    assert not list(folder.iterdir())


PARENT = """
import os, subprocess, sys
folder = sys.argv[1]
command = [sys.executable, "-m", "shardworker", "serve", "--device", "cpu", "--embedded-in", folder]
worker = subprocess.Popen([*command, "--listen", f"unix:{folder}/w.sock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
if sys.argv[2] == "listening":
    worker.stdout.readline()
print(worker.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("moment", ["starting", "listening"])
def test_a_killed_parent_leaves_nothing(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "mesh"
    folder.mkdir()
    # The worker inherits this pipe too: it ends when the worker has.
    reading, writing = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), moment],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writing, env=ENVIRONMENT,
    )  # fmt: skip
    os.close(writing)
    assert parent.stdout
    assert parent.stdout.readline()
    assert (folder / "w.sock").exists() or moment == "starting"
    parent.kill()
    parent.communicate()
    with os.fdopen(reading, "rb") as pipe:
        pipe.read()
    assert not folder.exists()


def test_a_free_port_is_taken_and_named_and_is_then_in_use(workers: list[Worker]) -> None:
    worker = Worker("--listen", "127.0.0.1:0", "--insecure")
    workers.append(worker)
    address = worker.line.removeprefix("listening on ").strip()
    port = int(address.rpartition(":")[2])
    assert port > 0
    socket.create_connection(("127.0.0.1", port)).close()
    code, errors = refused("--listen", address, "--insecure")
    assert code == 2
    assert "in use" in errors


def refused(*args: str) -> tuple[int, str]:
    """Exit code and the one line on standard error."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["shardworker", "serve", *args]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        pytest.raises(SystemExit) as end,
    ):
        main()
    assert out.getvalue() == ""
    (line,) = errors.getvalue().splitlines()
    assert line.startswith("shardworker: ")
    return int(str(end.value)), line


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--listen", "127.0.0.1:7000"], "say --insecure"),
        (["--listen", "nonsense"], "neither HOST:PORT nor unix:PATH"),
        (["--listen", "127.0.0.1:0", "--tls", "/none"], "TLS folder /none: tls.crt is missing; wanted tls.crt, tls.key, ca.crt"),
        (["--listen", "unix:w.sock", "--health-listen", "8080"], "'8080' is neither HOST:PORT nor unix:PATH"),
        (["--listen", "127.0.0.1:99999", "--insecure"], "neither HOST:PORT nor unix:PATH"),
        (["--listen", "unix:"], "needs a path"),
        (["--listen", "unix:/no/such/folder/w.sock"], "no folder"),
        (["--listen", "unix:/tmp/" + "x" * 200], "107 bytes"),
        (["--listen", "203.0.113.1:7000", "--insecure"], "cannot listen"),
        (["--listen", "unix:w.sock", "--threads", "0"], "--threads"),
        (["--listen", "unix:w.sock", "--threads", "many"], "--threads"),
        (["--listen", "unix:w.sock", "--device", "tpu"], "--device"),
        (["--listen", "unix:w.sock", "--log-level", "loud"], "--log-level"),
        (["--listen", "unix:w.sock", "--model", "m"], "--model"),
        ([], "--listen"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(args: list[str], text: str) -> None:
    code, errors = refused(*args)
    assert code == 2
    assert text in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_a_mistake() -> None:
    code, errors = refused("--listen", "unix:w.sock", "--device", "cuda")
    assert code == 2
    assert "torch finds no CUDA device" in errors


def test_a_foreign_file_at_the_socket_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    path.write_text("mine")
    code, errors = refused("--listen", f"unix:{path}")
    assert code == 2
    assert "no socket" in errors
    assert path.read_text() == "mine"


def test_a_living_listener_keeps_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        code, errors = refused("--listen", f"unix:{path}")
        assert code == 2
        assert "in use" in errors
        assert path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path, workers: list[Worker]) -> None:
    path = tmp_path / "w.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    worker = Worker("--listen", f"unix:{path}")
    workers.append(worker)
    assert worker.line.startswith("listening on")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(path))
