"""Who may call: API keys, of which only hashes are kept, how many calls each may have under way, and which may change the mesh.

The file has a line for each key, read again whenever the file changes:

    # name  SHA-256 of the key in hex  most Generate calls at once, or - for no limit  operator, or nothing
    alice   4f3c...                    4
    olga    93ab...                    -                                               operator

Names are of letters, digits, dot, dash and underscore; empty lines and lines that begin with # say nothing. A key is random
and of 256 bits, hence one plain hash keeps it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from protos.errors import Forbidden, InvalidArgument, TooManyCalls, Unauthenticated
from protos.watched import WatchedFiles

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import grpc

KEY_BYTES = 32
PREFIX = "shardmesh_"
"""Of every key: programs that look for lost secrets find it by that."""

FOR_OPERATORS = "/shardmesh.v1.Generation/Reshard"
"""What changes the mesh for all callers."""

_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<digest>[0-9a-fA-F]{64})\s+(?P<max_calls>-|[1-9][0-9]{0,5})(?P<operator>\s+operator)?"
)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN = "/grpc.health.v1.Health/"
_LIMITED = "/shardmesh.v1.Generation/Generate"
_SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the file."""

    name: str
    digest: bytes
    max_calls: int | None
    is_operator: bool = False


class ApiKeys:
    """The keys of a file; a guard for `protos.interceptors`."""

    def __init__(self, path: Path) -> None:
        """Read the file for the first time.

        Raises:
            InvalidArgument: it cannot be read, has a line that is none, or no key.

        """
        self._keys = WatchedFiles([path], lambda: read_keys(path))
        self._under_way: Counter[str] = Counter()
        if not self._keys.current():
            raise InvalidArgument(f"API keys {path}: there is none; make one with coordctl api-key NAME --file {path}")

    @contextlib.contextmanager
    def __call__(self, method: str, context: grpc.aio.ServicerContext) -> Iterator[None]:
        """Let a call in that shows a key, and as many as the key allows; health is open to all.

        Raises:
            Unauthenticated: no key, or one that is not in the file.
            Forbidden: the call is for operators, and the key is not one of theirs.
            TooManyCalls: as many Generate calls are under way as the key allows.

        """
        if method.startswith(_OPEN):
            yield
            return
        key = self._find(_shown_key(context))
        # Each call has a context of its own, which ends with it.
        structlog.contextvars.bind_contextvars(caller=key.name)
        if method == FOR_OPERATORS and not key.is_operator:
            raise Forbidden(
                f"{method} needs an operator's API key, found that of {key.name}: make one with coordctl api-key --operator"
            )
        if method != _LIMITED:
            yield
            return
        if key.max_calls is not None and self._under_way[key.name] >= key.max_calls:
            raise TooManyCalls(f"{key.name} has {key.max_calls} calls under way, as many as its API key allows: retry after one")
        self._under_way[key.name] += 1
        try:
            yield
        finally:
            self._under_way[key.name] -= 1

    def _find(self, shown: str) -> ApiKey:
        digest = hashlib.sha256(shown.encode()).digest()
        found = None
        for key in self._keys.current():
            # All of them, each in constant time: how long it takes says nothing.
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise Unauthenticated("the API key is not known here: ask whoever runs this coordinator for one")
        return found


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read a file of keys; one without any is good, and lets nobody in.

    Raises:
        InvalidArgument: it cannot be read, or a line is not as it must be. No line is shown: it may hold a key by mistake.

    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InvalidArgument(f"API keys {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"API keys {path}: not a text file") from None
    keys: list[ApiKey] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if not match:
            raise InvalidArgument(f"API keys {path}: line {number} is not NAME SHA256 LIMIT [operator], LIMIT a number >= 1 or -")
        limit = match["max_calls"]
        key = ApiKey(
            name=match["name"],
            digest=bytes.fromhex(match["digest"]),
            max_calls=None if limit == "-" else int(limit),
            is_operator=match["operator"] is not None,
        )
        if any(key.name == other.name or key.digest == other.digest for other in keys):
            raise InvalidArgument(f"API keys {path}: line {number} has the name or the key of an earlier line")
        keys.append(key)
    return tuple(keys)


def add_key(path: Path, name: str, max_calls: int | None, *, is_operator: bool = False) -> str:
    """Make a key, append its line to the file (mode 0600), return it: nobody else will ever show it.

    Args:
        path: of the file.
        name: of whoever gets the key.
        max_calls: most Generate calls at once; None: no limit.
        is_operator: whether the key may change the mesh.

    Raises:
        InvalidArgument: the name cannot be one, or is there already; the file is broken or cannot be written.

    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"a key's name has 1 to 64 letters, digits, dots, dashes and underscores, found {name!r}")
    if path.exists() and any(key.name == name for key in read_keys(path)):
        raise InvalidArgument(f"API keys {path}: {name} has a key already; remove its line or take another name")
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    line = f"{name} {hashlib.sha256(key.encode()).hexdigest()} {max_calls or '-'}{' operator' if is_operator else ''}\n"
    try:
        ends_in_line = not path.exists() or not path.stat().st_size or path.read_bytes().endswith(b"\n")
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)
            # In one write: who reads meanwhile sees all of the line or nothing.
            file.write(line if ends_in_line else "\n" + line)
    except OSError as error:
        raise InvalidArgument(f"API keys {path}: cannot be written: {error.strerror}") from None
    return key


def _shown_key(context: grpc.aio.ServicerContext) -> str:
    values = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
    if not values:
        raise Unauthenticated("no API key: send it as metadata, authorization: Bearer KEY")
    if len(values) > 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_SCHEME):
        raise Unauthenticated("the metadata authorization must be there once, as Bearer KEY")
    return values[0][len(_SCHEME) :].strip()
