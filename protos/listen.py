"""How a server of ours takes an address: plainly refused if somebody has it, private if it is a socket file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from protos.errors import InvalidArgument

if TYPE_CHECKING:
    import grpc

_CONNECT_DEADLINE_S = 1.0


async def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Bind a server that is not started yet; return the address with the port that was really taken.

    A socket file gets mode 0600. One that nobody listens on any more is replaced.

    Args:
        server: to be bound.
        address: checked by `protos.rpc.check_address`.
        credentials: of TLS, for TCP; a socket file has none.

    Raises:
        InvalidArgument: the address is in use or cannot be taken.

    """
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        await _clear(path)
        before = os.umask(0o177)
        try:
            _add_port(server, address, None)
        finally:
            os.umask(before)
        return address
    port = _add_port(server, address, credentials)
    return f"{address.rpartition(':')[0]}:{port}"


def unbind(address: str) -> None:
    """Remove the socket file of a stopped server, if it had one."""
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        port: int = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise InvalidArgument(f"cannot listen on {address}: the address is in use, not of this host, or not permitted")
    return port


async def _clear(path: Path) -> None:
    """Remove a stale socket; gRPC itself would steal a living one without a word."""
    if not _is_there(path):
        return
    try:
        async with asyncio.timeout(_CONNECT_DEADLINE_S):
            _, writer = await asyncio.open_unix_connection(path)
    except (FileNotFoundError, ConnectionRefusedError):
        unbind(f"unix:{path}")
        return
    except (OSError, TimeoutError) as error:
        raise InvalidArgument(f"cannot listen on unix:{path}: {error or 'it does not answer'}") from None
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    raise InvalidArgument(f"cannot listen on unix:{path}: the address is in use")


def _is_there(path: Path) -> bool:
    """Whether there is a socket already; anything else is refused."""
    if not path.parent.is_dir():
        raise InvalidArgument(f"cannot listen on unix:{path}: there is no folder {path.parent}")
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InvalidArgument(f"cannot listen on unix:{path}: {error.strerror}") from None
    if not is_socket:
        raise InvalidArgument(f"cannot listen on unix:{path}: a file that is no socket is there")
    return True
