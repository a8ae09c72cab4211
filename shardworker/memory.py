"""How much memory the device has, and how much of it is free: the host's figures within the limits of its control group."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import NamedTuple

import torch

_KIB = 1024


class Memory(NamedTuple):
    """Bytes."""

    total: int
    free: int


def device_memory(device: torch.device) -> Memory:
    """Memory of the device; what can be reclaimed (file cache) counts as free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What torch's allocator keeps but does not use can be used again.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Memory(total, free)
    return _within(_host_memory(), _cgroup_memory(Path("/sys/fs/cgroup")))


def peak_rss_bytes() -> int:
    """Highest resident set of this process.

    VmHWM begins anew with a program; getrusage's figure, the fallback, may be that of the process it was started from.
    """
    if (peak := _read_fields(Path("/proc/self/status")).get("VmHWM")) is not None:
        return peak * _KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def _host_memory() -> Memory:
    fields = _read_fields(Path("/proc/meminfo"))
    if "MemTotal" in fields and "MemAvailable" in fields:
        return Memory(fields["MemTotal"] * _KIB, fields["MemAvailable"] * _KIB)
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    return Memory(total, total)


def _cgroup_memory(root: Path) -> Memory | None:
    """Limit and rest of a container's control group, of version 2 or 1; none where there is no limit."""
    for limit_file, usage_file, stat_file, inactive in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            limit, usage = (int((root / name).read_text()) for name in (limit_file, usage_file))
        except (OSError, ValueError):  # not this version, or "max"
            continue
        reclaimable = _read_fields(root / stat_file).get(inactive, 0)
        return Memory(limit, max(0, limit - usage + reclaimable))
    return None


def _within(host: Memory, group: Memory | None) -> Memory:
    return host if group is None else Memory(min(host.total, group.total), min(host.free, group.free))


def _read_fields(path: Path) -> dict[str, int]:
    """Lines of `name value` or `name: value unit`."""
    fields: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        name, _, rest = line.replace(":", " ").partition(" ")
        value = rest.split()[:1]
        if value and value[0].isdigit():
            fields[name] = int(value[0])
    return fields
