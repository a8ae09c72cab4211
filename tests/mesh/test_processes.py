"""The programs as a person runs them: real processes, real signals, nothing left behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.tiny import add_tokenizer, make_checkpoint

COORDCTL = (sys.executable, "-m", "coordinator")
DEADLINE_S = 90


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "llama"
    make_checkpoint("llama", directory)
    return directory


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "llama"
    make_checkpoint("llama", directory)
    add_tokenizer(directory)
    return directory


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder that the programs take for temporary files; sockets need a short path, which tmp_path is not."""
    directory = Path(tempfile.mkdtemp(prefix="shardmesh-test-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _started(temporary: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """Start coordctl and make sure that it and its workers are gone at the end."""
    process = subprocess.Popen(
        [*COORDCTL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    try:
        yield process
        process.wait(DEADLINE_S)
    finally:
        process.kill()
        for leftover in _workers(temporary):
            leftover.kill()
        process.communicate()


def _run(temporary: Path, *arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COORDCTL, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


def _embedded(model: Path, *more: str) -> tuple[str | Path, ...]:
    return ("generate", "--model", model, "--prompt-ids", "5,6,7", "--dtype", "f32", "--wire", "f32", "--ignore-eos", *more)


def _assert_nothing_left(temporary: Path) -> None:
    """No process that listens in the folder, and nothing in it."""
    _, alive = psutil.wait_procs(_workers(temporary), timeout=10)
    assert not alive, [process.cmdline() for process in alive]
    assert not list(temporary.iterdir())


def _workers(temporary: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or ())
        if "shardworker" in command and str(temporary) in command:
            found.append(process)
    return found


def _first_output(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read(1)


def test_generate_prints_one_object_and_leaves_nothing(model: Path, temporary: Path) -> None:
    result = _run(temporary, *_embedded(model, "--shards", "2", "--max-tokens", "6", "--json"))
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert len(printed["token_ids"]) == 6
    assert printed["finish_reason"] == "length"
    assert printed["usage"] == {"prompt_tokens": 3, "completion_tokens": 6}
    assert result.stderr == ""
    _assert_nothing_left(temporary)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_everything(model: Path, temporary: Path, number: signal.Signals, code: int) -> None:
    with _started(temporary, *_embedded(model, "--shards", "2", "--max-tokens", "490", "--json")) as process:
        # Workers are up and the mesh is at work, or still loading: both must end alike.
        while len(_workers(temporary)) < 2:
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    _assert_nothing_left(temporary)


@pytest.mark.parametrize("moment", ["*", "*/worker-1.sock", "*/coordinator.sock"])
def test_a_kill_at_any_moment_leaves_nothing(model: Path, temporary: Path, moment: str) -> None:
    with _started(temporary, *_embedded(model, "--shards", "2", "--max-tokens", "490", "--json")) as process:
        while not list(temporary.glob(moment)) or len(_workers(temporary)) < 2:
            assert process.poll() is None
        process.kill()
        process.communicate()
        psutil.wait_procs(_workers(temporary), timeout=30)
    _assert_nothing_left(temporary)


def test_a_broken_pipe_ends_quietly(temporary: Path, text_model: Path) -> None:
    with _started(
        temporary, "generate", "--model", text_model, "--prompt", "hello", "--max-tokens", "200", "--ignore-eos"
    ) as process:
        assert _first_output(process)
        process.stdout.close()  # type: ignore[union-attr]
        process.wait(DEADLINE_S)
        errors = process.stderr.read()  # type: ignore[union-attr]
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert "Exception" not in errors
    _assert_nothing_left(temporary)


def test_a_killed_worker_ends_the_completion_with_one_line(temporary: Path, text_model: Path) -> None:
    arguments = ("--prompt", "hello", "--max-tokens", "480", "--ignore-eos", "--shards", "2")
    with _started(temporary, "generate", "--model", text_model, *arguments) as process:
        assert _first_output(process)
        _workers(temporary)[0].kill()
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert len(errors.strip().splitlines()) == 1
    assert "worker" in errors
    _assert_nothing_left(temporary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "/nonexistent/model", "--prompt", "x"), "/nonexistent/model"),
        (("--model", ".", "--prompt", "x"), "config.json"),
        (("--prompt", "x"), "--model is needed"),
        (("--model", "m", "--prompt", "x", "--prompt-ids", "1"), "exactly one"),
        (("--model", "m", "--prompt-ids", "1,x"), "--prompt-ids must be token ids"),
        (("--model", "m", "--prompt", "x", "--temperature", "nan"), "temperature must be"),
        (("--model", "m", "--prompt", "x", "--temperature=-1"), "temperature must be"),
        (("--model", "m", "--prompt", "x", "--top-p", "0"), "top_p must be"),
        (("--model", "m", "--prompt", "x", "--max-tokens", "0"), "--max-tokens"),
        (("--model", "m", "--prompt", "x", "--messages", "/nonexistent/file"), "/nonexistent/file"),
        (("--model", "m", "--prompt", "x", "--bogus"), "--bogus"),
        (("--model", "m", "--prompt", "x", "--max-tokens", "99999999999"), "99999999999"),
        (("--model", "m", "--prompt", "x", "--coordinator", "127.0.0.1:1"), "--insecure"),
        (("--model", "m", "--prompt", "x", "--shards", "0"), "--shards"),
    ],
)
def test_a_mistake_is_one_clear_line(temporary: Path, arguments: tuple[str, ...], message: str) -> None:
    result = _run(temporary, "generate", *arguments)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("coordctl: ")
    assert message in line
    assert result.stdout == ""
    _assert_nothing_left(temporary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt-ids", "5,512"), "token id 512 is outside the vocabulary of 512"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x", "--max-tokens", "600"), "the model's context holds 512"),
        (("--messages", "-"), "chat template"),
        (("--prompt", "x", "--device", "cuda"), "device cuda: torch finds no CUDA device here"),
    ],
)
def test_a_request_that_the_model_cannot_serve_is_refused_before_loading(
    text_model: Path, temporary: Path, arguments: tuple[str, ...], message: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    result = _run(temporary, "generate", "--model", text_model, *arguments, stdin='[{"role": "user", "content": "x"}]')
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("coordctl: ")
    assert message in line
    assert "coordinator unix:" not in line
    _assert_nothing_left(temporary)


@pytest.mark.parametrize("redirection", [">&-", "<&-", "2>&-", ">/dev/full"])
def test_standard_streams_may_be_closed_or_full(model: Path, temporary: Path, redirection: str) -> None:
    command = shlex.join([*COORDCTL, *map(str, _embedded(model, "--max-tokens", "2", "--json"))])
    result = subprocess.run(
        ["bash", "-c", f"{command} {redirection}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert result.returncode == (1 if "full" in redirection else 0), result.stderr
    assert result.stderr == ("coordctl: No space left on device\n" if "full" in redirection else "")
    _assert_nothing_left(temporary)


def test_serve_status_and_a_remote_completion(model: Path, temporary: Path, unused_port: int) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "shardworker", "serve", "--listen", "127.0.0.1:0", "--insecure", "--threads", "1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        addresses = [worker.stdout.readline().removeprefix("listening on ").strip() for worker in workers]  # type: ignore[union-attr]
        address = f"127.0.0.1:{unused_port}"
        serve = ("serve", "--model", model, "--listen", address, "--workers", ",".join(addresses), "--insecure")
        with _started(temporary, *serve, "--dtype", "f32", "--wire", "f32") as server:
            assert server.stdout is not None
            assert server.stdout.readline() == f"serving {model} on {address}\n"
            remote = ("generate", "--coordinator", address, "--insecure", "--prompt-ids", "5,6,7", "--max-tokens", "6")
            completed = _run(temporary, *remote, "--ignore-eos", "--json", "--model", model)
            assert completed.returncode == 0, completed.stderr
            expected = _run(temporary, *_embedded(model, "--max-tokens", "6", "--json"))
            assert json.loads(completed.stdout)["token_ids"] == json.loads(expected.stdout)["token_ids"]
            status = _run(temporary, "status", "--coordinator", address, "--insecure", "--json")
            described = json.loads(status.stdout)
            assert described["serving"] is True
            # Three workers make a mesh of two and a spare.
            assert described["num_shards"] == 2
            assert [worker["reachable"] for worker in described["workers"]] == [True] * 3
            assert sorted(worker["serving"] for worker in described["workers"]) == [False, True, True]
            assert described["load"]["completion_tokens"] == 6
            taken = _run(temporary, *serve)
            assert taken.returncode == 2
            assert f"cannot listen on {address}" in taken.stderr
            server.terminate()
            assert server.wait(DEADLINE_S) == 0
    finally:
        for worker in workers:
            worker.terminate()
            worker.communicate()
    assert [worker.returncode for worker in workers] == [0, 0, 0]
