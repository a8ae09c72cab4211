from __future__ import annotations

from typing import TYPE_CHECKING

import psutil
import torch

from shardworker import memory

if TYPE_CHECKING:
    from pathlib import Path


def test_figures_are_those_of_the_process_and_its_host() -> None:
    found = memory.device_memory(torch.device("cpu"))
    assert 0 < found.free <= found.total <= psutil.virtual_memory().total
    assert memory.peak_rss_bytes() >= psutil.Process().memory_info().rss // 2


def test_a_control_group_of_version_2_limits(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert memory._cgroup_memory(tmp_path) == (1000, 550)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup_memory(tmp_path) is None


def test_a_control_group_of_version_1_limits(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("700\n")
    assert memory._cgroup_memory(tmp_path) == (1000, 300)
