"""A Kubernetes API server of a few lines: real HTTP on loopback, answers as it is told."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

CUT = None
"""In a stream: the connection breaks off."""


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class Answer:
    status: int = 200
    body: Any = None


@dataclass
class Stream:
    """Chunks as they are sent; ends regularly after the last one unless that is `CUT` or `last` is to be waited for."""

    chunks: list[bytes | None]
    then: asyncio.Event | None = None


@dataclass
class ApiServer:
    answer: Callable[[Asked], Answer | Stream]
    address: str = ""
    asked: list[Asked] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = await _read(reader)
            self.asked.append(asked)
            answer = self.answer(asked)
            if isinstance(answer, Stream):
                await _stream(writer, answer)
            else:
                data = json.dumps(answer.body).encode()
                head = f"HTTP/1.1 {answer.status} x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
                writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def watches(self) -> list[dict[str, str]]:
        return [asked.query for asked in self.asked if asked.query.get("watch")]


async def _read(reader: asyncio.StreamReader) -> Asked:
    head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    method, target, _ = head.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    parts = urlsplit(target)
    return Asked(method, parts.path, dict(parse_qsl(parts.query)), headers, json.loads(body) if body else None)


async def _stream(writer: asyncio.StreamWriter, stream: Stream) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
    for chunk in stream.chunks:
        if chunk is CUT:
            await writer.drain()
            writer.transport.abort()
            return
        writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        await writer.drain()
    if stream.then:
        await stream.then.wait()
    writer.write(b"0\r\n\r\n")
    await writer.drain()


@asynccontextmanager
async def api_server(answer: Callable[[Asked], Answer | Stream], tls: ssl.SSLContext | None = None) -> AsyncIterator[ApiServer]:
    server = ApiServer(answer)
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(server.serve(reader, writer)))

    listening = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=tls)
    server.address = "http://{}:{}".format(*listening.sockets[0].getsockname())
    try:
        yield server
    finally:
        listening.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def write_kubeconfig(path: Path, address: str, token: str = "t0ken") -> None:  # noqa: S107  # of a server that takes any
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "mesh"}}],
                "clusters": [{"name": "c", "cluster": {"server": address}}],
                "users": [{"name": "u", "user": {"token": token}}],
            }
        )
    )


def refusal(code: int, reason: str, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": reason, "code": code}
