"""Taking an address: never one that somebody else has, never a file that is no socket, never a socket for everybody."""

import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from protos.errors import InvalidArgument
from protos.listen import bind, unbind
from protos.rpc import server_options

MakeServer = Callable[[], grpc.aio.Server]


@pytest.fixture
async def make_server() -> AsyncIterator[MakeServer]:
    servers: list[grpc.aio.Server] = []

    def make() -> grpc.aio.Server:
        servers.append(grpc.aio.server(options=server_options(max_send_bytes=1000, max_receive_bytes=1000)))
        return servers[-1]

    yield make
    for server in servers:
        await server.stop(None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def can_connect(path: Path) -> bool:
    with closing(socket.socket(socket.AF_UNIX)) as client:
        return client.connect_ex(str(path)) == 0


def leave_stale_socket(path: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(path))


async def test_a_socket_is_private_and_the_umask_is_put_back(make_server: MakeServer, path: Path) -> None:
    before = os.umask(0o022)
    try:
        server = make_server()
        assert await bind(server, f"unix:{path}") == f"unix:{path}"
        await server.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert can_connect(path)


async def test_a_living_socket_is_refused_and_stays_alive(make_server: MakeServer, path: Path) -> None:
    first = make_server()
    await bind(first, f"unix:{path}")
    await first.start()
    before = path.stat().st_ino
    with pytest.raises(InvalidArgument, match="is in use"):
        await bind(make_server(), f"unix:{path}")
    assert path.stat().st_ino == before
    assert can_connect(path)


async def test_a_stale_socket_is_replaced(make_server: MakeServer, path: Path) -> None:
    leave_stale_socket(path)
    server = make_server()
    await bind(server, f"unix:{path}")
    await server.start()
    assert can_connect(path)


async def test_a_file_that_is_no_socket_is_refused_and_kept(make_server: MakeServer, path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(InvalidArgument, match="no socket"):
        await bind(make_server(), f"unix:{path}")
    assert path.read_text() == "precious"


async def test_a_link_is_refused_and_kept(make_server: MakeServer, path: Path, tmp_path: Path) -> None:
    leave_stale_socket(tmp_path / "target")
    path.symlink_to(tmp_path / "target")
    with pytest.raises(InvalidArgument, match="no socket"):
        await bind(make_server(), f"unix:{path}")
    assert path.is_symlink()


async def test_a_missing_folder_is_named(make_server: MakeServer, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no folder .*/none"):
        await bind(make_server(), f"unix:{tmp_path}/none/s")


async def test_port_zero_becomes_the_port_that_was_taken(make_server: MakeServer) -> None:
    server = make_server()
    host, _, port = (await bind(server, "127.0.0.1:0")).rpartition(":")
    await server.start()
    assert host == "127.0.0.1"
    with closing(socket.socket()) as client:
        assert client.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("by", ["a server of ours", "another program"])
async def test_a_port_in_use_is_refused(make_server: MakeServer, by: str) -> None:
    with closing(socket.socket()) as other:
        if by == "another program":
            other.bind(("127.0.0.1", 0))
            other.listen()
            address = f"127.0.0.1:{other.getsockname()[1]}"
        else:
            first = make_server()
            address = await bind(first, "127.0.0.1:0")
            await first.start()
        with pytest.raises(InvalidArgument, match=f"cannot listen on {address}: the address is in use"):
            await bind(make_server(), address)


async def test_an_address_of_another_host_is_refused(make_server: MakeServer) -> None:
    with pytest.raises(InvalidArgument, match="not of this host"):
        await bind(make_server(), "192.0.2.1:0")  # of TEST-NET-1: nobody's


def test_unbind_removes_the_socket_once_and_only_a_socket_address(path: Path) -> None:
    leave_stale_socket(path)
    unbind(f"unix:{path}")
    assert not path.exists()
    unbind(f"unix:{path}")
    unbind("127.0.0.1:1")
