"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
import resource
from importlib.metadata import version
from pathlib import Path

_KIB = 1024


def describe_machine() -> dict[str, object]:
    """CPU model, cores, memory and the versions that a number depends on; imports torch."""
    import torch  # noqa: PLC0415  # takes seconds, and the rest of this package needs none

    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
        "grpcio": version("grpcio"),
        "shardmesh": version("shardmesh"),
    }


def peak_rss_bytes() -> int:
    """Highest resident set of this process so far."""
    # getrusage's figure may be that of the process which this one was started from.
    if (peak := _field(Path("/proc/self/status"), "VmHWM")) is not None:
        return int(peak.split()[0]) * _KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def _field(path: Path, name: str) -> str | None:
    """Value of the first line `name : value`; none where there is no such file or line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
