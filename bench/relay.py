"""A cable of some length between two ports of some rate: joins two TAP devices, and hands each frame on after its time.

    unshare --net .venv/bin/python -m bench.relay DELAY_MS BYTES_PER_S

Makes the devices `near` and `far` where it runs, says "ready", and relays until its standard input ends; meanwhile whoever
started it moves them to the network namespaces that they shall join. A rate of `inf` limits nothing. Linux does all this by
itself where its kernel has netem; its token bucket lets a small message pass at once, however slow the port.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_FRAME_BYTES = 65536
_MAX_FRAMES = 10_000
"""Under way in one direction; more are dropped, as a switch would do it."""


class DelayLine:
    """Frames on their way in one direction."""

    def __init__(self, delay_s: float, bytes_per_s: float) -> None:
        """Start empty."""
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._sent_s = 0.0
        self._frames: deque[tuple[float, bytes]] = deque()

    def put(self, frame: bytes, now_s: float) -> None:
        """Take a frame in; it is lost if there are too many."""
        if len(self._frames) < _MAX_FRAMES:
            frame_s = len(frame) / self._bytes_per_s
            self._sent_s = max(now_s, self._sent_s) + frame_s
            # The port at the other end sends on what it has got whole.
            self._frames.append((self._sent_s + self._delay_s + frame_s, frame))

    def take(self, now_s: float) -> list[bytes]:
        """Give the frames whose time has come, in the order in which they came in."""
        due = []
        while self._frames and self._frames[0][0] <= now_s:
            due.append(self._frames.popleft()[1])
        return due

    @property
    def next_s(self) -> float | None:
        """When the next frame is due; none if none is under way."""
        return self._frames[0][0] if self._frames else None


def relay(near: int, far: int, delay_s: float, bytes_per_s: float) -> None:
    """Carry frames between two devices until standard input ends."""
    lines = {near: (DelayLine(delay_s, bytes_per_s), far), far: (DelayLine(delay_s, bytes_per_s), near)}
    while True:
        due = [line.next_s for line, _ in lines.values() if line.next_s is not None]
        wait_s = max(0.0, min(due) - time.monotonic()) if due else None
        readable, _, _ = select.select([0, near, far], [], [], wait_s)
        if 0 in readable and not os.read(0, 1):
            return
        for device in (near, far):
            line, other = lines[device]
            if device in readable:
                _read_all(device, line)
            for frame in line.take(time.monotonic()):
                # The other end may be down, or its queue full: a lost frame, as on any cable.
                with contextlib.suppress(OSError):
                    os.write(other, frame)


def _read_all(device: int, line: DelayLine) -> None:
    with contextlib.suppress(OSError):  # nothing more to read
        while True:
            line.put(os.read(device, _FRAME_BYTES), time.monotonic())


def open_tap(name: str) -> int:
    """Make a TAP device, which goes when the descriptor that is returned is closed."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    return device


def main() -> None:
    """Run."""
    delay_s, bytes_per_s = float(sys.argv[1]) / 1e3, float(sys.argv[2])
    near, far = open_tap("near"), open_tap("far")
    # A cable does not wait for a core.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -15)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    relay(near, far, delay_s, bytes_per_s)


if __name__ == "__main__":
    main()
