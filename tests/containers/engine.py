"""podman, as these tests speak to it, and the two images that `tests/containers/run` builds with it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any, Self

from tests.faults.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

TAG = os.environ.get("SHARDMESH_TEST_TAG", "test")
WORKER = f"localhost/shardmesh/worker:{TAG}"
COORDINATOR = f"localhost/shardmesh/coordinator:{TAG}"

COMMAND_S = 120.0
SOME_USER = 1234567890
"""No account of any image; its group is 0, as clusters do that give each namespace ids of its own."""
CLOSED = (
    "--read-only",
    f"--user={SOME_USER}:0",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
)
"""What the chart asks for too."""


def podman(*arguments: str) -> str:
    """Run podman and give what it prints on standard output.

    Raises:
        AssertionError: it failed; with what it said.

    """
    result = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=COMMAND_S, check=False)
    assert result.returncode == 0, f"podman {' '.join(arguments)}: {result.stdout}{result.stderr}"
    return result.stdout.strip()


def missing() -> str | None:
    """Say what is not there that these tests need."""
    try:
        subprocess.run(["podman", "info"], capture_output=True, timeout=COMMAND_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return "podman is not here, or does not work"
    for image in (WORKER, COORDINATOR):
        if subprocess.run(["podman", "image", "exists", image], timeout=COMMAND_S, check=False).returncode:
            return f"there is no image {image}: make test-images builds it"
    return None


def inspect(name: str) -> dict[str, Any]:
    """Give what podman knows of an image or a container."""
    found: dict[str, Any] = json.loads(podman("inspect", name))[0]
    return found


def run_shell(image: str, script: str) -> str:
    """Run a script in a container of an image, closed as in a cluster and without a network; give what it prints."""
    return podman("run", "--rm", "--network=none", *CLOSED, "--entrypoint=sh", image, "-euc", script)


class Container:
    """A running container."""

    def __init__(self, name: str) -> None:
        """Made by `Containers.run`."""
        self.name = name

    @property
    def state(self) -> dict[str, Any]:
        """As podman knows it."""
        state: dict[str, Any] = inspect(self.name)["State"]
        return state

    def printed(self) -> str:
        """Both outputs, of all its lives."""
        return subprocess.run(
            ["podman", "logs", self.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_S,
            check=True,
        ).stdout

    async def wait_printed(self, text: str, deadline_s: float) -> None:
        """Wait until it printed something."""

        def has() -> bool:
            printed = self.printed()
            assert self.state["Running"] or text in printed, f"{self.name} ended:\n{printed}"
            return text in printed

        await wait_until(f"{self.name} to print {text!r}", has, deadline_s)

    def kill(self) -> None:
        """End it by SIGKILL."""
        podman("kill", "--signal=KILL", self.name)

    def start(self) -> None:
        """Start it again after it ended."""
        podman("start", self.name)

    def execute(self, *command: str) -> str:
        """Run a program beside its own; give what that prints."""
        return podman("exec", self.name, *command)

    def stop(self, grace_s: int) -> float:
        """Send SIGTERM, and SIGKILL after `grace_s` seconds; return the seconds that its end took."""
        started_s = time.monotonic()
        podman("stop", f"--time={grace_s}", self.name)
        return time.monotonic() - started_s

    def published(self, port: int) -> str:
        """Address on this machine of a port inside."""
        return podman("port", self.name, f"{port}/tcp")


class Containers:
    """All containers of a test, on a network of their own; they end and the network goes with the context."""

    def __init__(self, model: Path) -> None:
        """Start none.

        Args:
            model: folder that each of them sees, read-only, as /model.

        """
        self._model = model
        self._network = f"shardmesh-test-{os.getpid()}-{time.monotonic_ns()}"
        self._names: list[str] = []

    def run(self, name: str, image: str, *arguments: str, publish: int | None = None) -> Container:
        """Start one, which the others find by its name.

        Args:
            name: unique in this context.
            image: to run.
            arguments: of its program.
            publish: port that this machine can reach too.

        """
        full_name = f"{self._network}-{name}"
        flags = [f"--publish=127.0.0.1::{publish}"] if publish else []
        self._names.append(full_name)
        network = f"--network={self._network}:alias={name}"
        volume = f"--volume={self._model}:/model:ro"
        podman("run", "--detach", f"--name={full_name}", network, volume, *CLOSED, *flags, image, *arguments)
        return Container(full_name)

    def __enter__(self) -> Self:
        """Make the network."""
        podman("network", "create", self._network)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove all of it."""
        if self._names:
            podman("rm", "--force", "--ignore", "--time=0", *self._names)
        podman("network", "rm", self._network)
