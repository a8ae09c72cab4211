"""A release of the chart, and callers of it from outside the cluster."""

from __future__ import annotations

import asyncio
import base64
import subprocess
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import grpc

from tests.faults.streams import Caller
from tests.helm.chart import CHART, ROOT, find_tool
from tests.kind.cluster import COORDINATOR, WORKER, is_ready, poll, run_tool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.kind.cluster import Json, Namespace

VALUES = ROOT / "tests" / "kind" / "values.yaml"
NAME = "mesh"
ROLLOUT_S = 200.0
STREAM_S = 240.0
"""Longest that a stream may take on a machine which does much else, recoveries included."""
PORT = 7000


class Release:
    """The release `mesh` of one namespace."""

    def __init__(self, namespace: Namespace) -> None:
        """Install nothing yet."""
        self.namespace = namespace
        self._sets: tuple[str, ...] = ()
        self._is_installed = False

    def helm(self, command: str, *arguments: str, timeout_s: float = 120.0) -> str:
        """Run a command of helm on it."""
        return run_tool("helm", command, NAME, *arguments, "--namespace", self.namespace.name, timeout_s=timeout_s)

    def apply(self, *sets: str) -> None:
        """Install it, or upgrade it to the values of these tests and these ones besides: KEY=VALUE."""
        images = [word for key, image in (("coordinator", COORDINATOR), ("worker", WORKER)) for word in _image(key, image)]
        words = [f"--set={one}" for one in (*images, *sets)]
        self.helm("upgrade" if self._is_installed else "install", str(CHART), f"--values={VALUES}", *words)
        self._is_installed, self._sets = True, sets

    def change(self, *sets: str) -> None:
        """Upgrade it as somebody does who changes some values and keeps all others."""
        self.helm("upgrade", str(CHART), "--reuse-values", *(f"--set={one}" for one in sets))
        self._sets = (*self._sets, *sets)

    def settle(self) -> None:
        """Bring it back to the values of these tests, all its pods ready."""
        if self._sets or not self._is_installed:
            self.apply()
        self.wait_rolled_out()

    def wait_rolled_out(self) -> None:
        """Wait until all pods are of the latest values, and ready."""
        for component in ("worker", "coordinator"):
            words = ("rollout", "status", f"deployment/{NAME}-{component}", f"--timeout={ROLLOUT_S:.0f}s")
            self.namespace.kubectl(*words, timeout_s=ROLLOUT_S + 10)

    def pods(self, component: str) -> list[Json]:
        """Pods of a component that are ready and not told to go."""
        selector = f"app.kubernetes.io/instance={NAME},app.kubernetes.io/component={component}"
        return [pod for pod in self.namespace.pods(selector) if is_ready(pod)]

    def pod_names(self, component: str) -> set[str]:
        """Names of those."""
        return {pod["metadata"]["name"] for pod in self.pods(component)}

    def lease_holder(self) -> str:
        """Name of the coordinator that assigns plans, as the Lease says; empty: nobody."""
        holder: str = self.namespace.get("lease", f"{NAME}-coordinator")["spec"].get("holderIdentity") or ""
        return holder.rpartition("_")[0]

    @asynccontextmanager
    async def caller(self, pod: str = "") -> AsyncIterator[Caller]:
        """Give a caller outside the cluster, with what the chart made for it: whom to trust, and a key.

        Args:
            pod: coordinator that is called; empty: any that is ready.

        """
        credentials = await asyncio.to_thread(self._credentials)
        forward = self.forward(pod)
        address = await asyncio.to_thread(forward.__enter__)
        try:
            async with Caller(address, credentials, stream_s=STREAM_S) as caller:
                yield caller
        finally:
            await asyncio.to_thread(forward.__exit__, None, None, None)

    def authority(self) -> bytes:
        """Give the certificate of the authority that callers trust."""
        return self._secret("coordinator-tls", "ca.crt")

    def _credentials(self) -> grpc.ChannelCredentials:
        key = self._secret("caller-key", "api-key").decode()
        return grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(self.authority()), grpc.access_token_call_credentials(key)
        )

    def _secret(self, name: str, key: str) -> bytes:
        return base64.b64decode(self.namespace.get("secret", f"{NAME}-{name}")["data"][key])

    @contextmanager
    def forward(self, pod: str = "") -> Iterator[str]:
        """Let a port of this machine lead to a coordinator; give its address, with the name that is in the certificate."""
        pod = pod or min(poll("a coordinator that is ready", lambda: self.pod_names("coordinator"), ROLLOUT_S))
        command = [find_tool("kubectl") or "kubectl", "--namespace", self.namespace.name]
        command += ["port-forward", "--address=127.0.0.1", f"pod/{pod}", f":{PORT}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                assert process.stdout
                line = process.stdout.readline()
                assert line.startswith("Forwarding from 127.0.0.1:"), f"{' '.join(command)}: {line}"
                yield f"localhost:{line.split()[2].rpartition(':')[2]}"
            finally:
                process.kill()


def _image(component: str, image: str) -> tuple[str, str]:
    repository, _, tag = image.rpartition(":")
    return f"{component}.image.repository={repository}", f"{component}.image.tag={tag}"
