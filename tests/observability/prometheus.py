"""A real Prometheus, for as long as a test takes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.observability.promql import RULES


def find_program(name: str) -> str | None:
    """Find one of Prometheus's; SHARDMESH_REQUIRE_PROMETHEUS=1 makes its absence a failure instead of a skipped test."""
    found = shutil.which(name)
    if found is None and os.environ.get("SHARDMESH_REQUIRE_PROMETHEUS"):
        raise FileNotFoundError(f"{name} is missing, and SHARDMESH_REQUIRE_PROMETHEUS is set")
    return found


PROGRAM = find_program("prometheus")


@dataclass(frozen=True)
class Prometheus:
    url: str

    async def get(self, path: str, **parameters: str) -> Any:
        """What the API says; an error status is raised."""
        query = urllib.parse.urlencode(parameters)
        return json.loads(await asyncio.to_thread(fetch, f"{self.url}/api/v1/{path}?{query}"))["data"]

    async def wait_samples(self, series: str, count: int) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    result = (await self.get("query", query=f"count_over_time({series}[1h])"))["result"]
                except OSError:
                    result = []
                if result and int(result[0]["value"][1]) >= count:
                    return
                await asyncio.sleep(0.2)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=15) as answer:  # noqa: S310  # an address of ours
        text: str = answer.read().decode()
    return text


@asynccontextmanager
async def prometheus(folder: Path, *targets: str) -> AsyncIterator[Prometheus]:
    """Scrape the targets every second, with the chart's rules."""
    assert PROGRAM
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "shardmesh", "static_configs": [{"targets": list(targets)}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    flags = (f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}")
    quiet = asyncio.subprocess.DEVNULL
    program = await asyncio.create_subprocess_exec(PROGRAM, *flags, stdout=quiet, stderr=quiet)
    try:
        yield Prometheus(f"http://{address}")
    finally:
        program.terminate()
        await program.wait()
