"""Machines and the network between them, in miniature: one network namespace for each, all on one switch.

Nothing has a name outside: a namespace lives as long as the process that holds it, which ends with its standard input, and so
with this process, however that ends; devices go with their namespaces. Delays and slow ports are a cable (`bench/relay.py`)
between the first node and the switch; fast ports, which that could not serve, are Linux' token bucket (tbf) at both of their
ends, which lets the first few thousand bytes pass at once. Needs root.
"""

from __future__ import annotations

import math
import os
import select
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
COMMAND_S = 10.0
"""Longest that a command which sets something up may take."""
TOOLS = ("ip", "bridge", "tc", "nsenter", "unshare")
_SUBNET = "10.77.0"
_RELAYED_BITS_PER_S = 2e8
"""Fastest port that the relay can be."""
_BUCKET_S = 2.5e-4
"""Of a port's rate: what may go in one burst; a timer is no finer."""
_LEAST_BUCKET_BYTES = 3200
_QUEUE_S = 0.3
_BUNDLE_BYTES = 65536


def missing() -> str | None:
    """Say why there can be no such network here; none if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"network namespaces need {', '.join(absent)} (of iproute2 and util-linux)"
    if not Path("/dev/net/tun").exists():
        return "a network with delay needs /dev/net/tun"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False, timeout=COMMAND_S).returncode:  # noqa: S607
        return "this machine allows no new network namespaces"
    return None


class Process:
    """A process that ends when its standard input does; leaving the context ends it."""

    def __init__(self, command: Sequence[str], stderr: int | None = None) -> None:
        """Start it in the root of the repository."""
        self._process = subprocess.Popen(  # noqa: S603  # ourselves
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, start_new_session=True
        )
        self.pid = self._process.pid

    def wait_line(self, deadline_s: float = COMMAND_S) -> str:
        """Give the first line of its standard output, or nothing if it ended or took too long."""
        stream = self._process.stdout
        if stream is None or not select.select([stream], [], [], deadline_s)[0]:
            return ""
        return stream.readline().strip()

    def __enter__(self) -> Self:
        """Use as a context."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it, and wait for its end."""
        self._process.kill()
        self._process.communicate()


class Network:
    """A switch and its nodes; node 0 is the one with the long cable."""

    def __init__(self, num_nodes: int) -> None:
        """Describe it; entering the context makes it."""
        self._stack = ExitStack()
        self._num_nodes = num_nodes
        self._switch = 0
        self._nodes: list[int] = []
        self._cable = ExitStack()

    def __enter__(self) -> Self:
        """Make namespaces and cables; the network has no delay and no limit."""
        with ExitStack() as stack:
            self._switch = self._namespace(stack)
            _run(self._switch, "ip link add bridge type bridge")
            _run(self._switch, "ip link set bridge up")
            for number in range(self._num_nodes):
                self._nodes.append(self._namespace(stack))
                self._plug(number)
            stack.enter_context(self._cable)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove everything."""
        self._stack.close()

    @staticmethod
    def address(node: int) -> str:
        """Address of a node."""
        return f"{_SUBNET}.{node + 1}"

    def inside(self, node: int, command: Sequence[str]) -> list[str]:
        """Make the command that runs one in a node's namespace; the process is the same, so signals and pipes go through."""
        return [*_enter(self._nodes[node]), *command]

    def shape(self, rtt_s: float, bits_per_s: float | None) -> None:
        """Change the way to node 0 and all ports; what was connected to node 0 is not any more.

        Args:
            rtt_s: of the way between node 0 and any other, beyond what the machine itself takes.
            bits_per_s: of each port in each direction; None for no limit.

        """
        self._cable.close()
        _run(self._nodes[0], "ip link del eth0", check=False)
        relayed = bits_per_s if bits_per_s and bits_per_s <= _RELAYED_BITS_PER_S else None
        if rtt_s or relayed:
            self._plug_cable(rtt_s / 2, relayed / 8 if relayed else math.inf)
        else:
            self._plug(0)
        for number, node in enumerate(self._nodes):
            for pid, device in ((node, "eth0"), (self._switch, f"port{number}")):
                _limit(pid, device, None if relayed else bits_per_s)

    def cut(self, node: int) -> None:
        """Have the switch drop all frames from and to a node; its device does not notice."""
        _run(self._switch, f"bridge link set dev port{node} state 0")

    def mend(self, node: int) -> None:
        """Have the switch forward a node's frames again."""
        _run(self._switch, f"bridge link set dev port{node} state 3")

    def _namespace(self, stack: ExitStack) -> int:
        """Make a namespace; the process id of its holder stands for it."""
        holder = stack.enter_context(Process(["unshare", "--net", "sh", "-c", "echo here; exec cat"]))
        if holder.wait_line() != "here":
            raise OSError("a network namespace could not be made")
        _run(holder.pid, "ip link set lo up")
        return holder.pid

    def _plug(self, number: int) -> None:
        _run(self._nodes[number], f"ip link add eth0 type veth peer name port{number} netns {self._switch}")
        self._connect(number)

    def _plug_cable(self, delay_s: float, bytes_per_s: float) -> None:
        relay = self._cable.enter_context(
            Process(["unshare", "--net", sys.executable, "-m", "bench.relay", str(delay_s * 1e3), str(bytes_per_s)])
        )
        if relay.wait_line() != "ready":
            raise OSError("the relay did not start")
        _run(relay.pid, f"ip link set near netns {self._nodes[0]} name eth0")
        _run(relay.pid, f"ip link set far netns {self._switch} name port0")
        self._connect(0)

    def _connect(self, number: int) -> None:
        _run(self._switch, f"ip link set port{number} master bridge up")
        _run(self._nodes[number], f"ip address add {self.address(number)}/24 dev eth0")
        _run(self._nodes[number], "ip link set eth0 up")


def _limit(pid: int, device: str, bits_per_s: float | None) -> None:
    """Limit what a device sends."""
    _run(pid, f"tc qdisc del dev {device} root", check=False)
    bundle = _BUNDLE_BYTES
    if bits_per_s:
        bucket = max(_LEAST_BUCKET_BYTES, int(bits_per_s / 8 * _BUCKET_S))
        limit = bucket + int(bits_per_s / 8 * _QUEUE_S)
        _run(pid, f"tc qdisc add dev {device} root tbf rate {bits_per_s:.0f}bit burst {bucket} limit {limit}")
        # The kernel sends several frames as one, which a small bucket does not hold.
        bundle = min(bundle, bucket // 2)
    _run(pid, f"ip link set {device} gso_max_size {bundle}", check=False)


def _enter(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--net"]


def _run(pid: int, command: str, *, check: bool = True) -> None:
    found = subprocess.run([*_enter(pid), *command.split()], capture_output=True, text=True, check=False, timeout=COMMAND_S)  # noqa: S603
    if check and found.returncode:
        raise OSError(f"{command}: {found.stderr.strip()}")
