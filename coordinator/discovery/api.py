"""The Kubernetes API over asyncio, as far as discovery needs it: requests and watches of objects as plain JSON.

Where the API server is and how it is spoken to is the `kubernetes` client's to know: in a cluster by what the pod was given,
elsewhere by KUBECONFIG. It is imported when it is needed, for that takes seconds; its models of objects, which refuse what they
do not know, are not used. A token that the kubelet has replaced is read again by the client, everything else by connecting anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from protos.errors import InvalidArgument, MeshError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
    from types import ModuleType

Json = dict[str, Any]

REQUEST_S = 10.0
"""Longest that a request may take; of a watch, its beginning."""
WATCH_S = 60
"""How long the server shall keep up a watch, seconds: a connection that died in silence is found out then."""

_MAX_LINE_BYTES = 64 * 1024 * 1024
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_DEFAULT_CONFIG = "~/.kube/config"
_BAD_REQUEST = 400


class ApiError(MeshError):
    """The API server refused, or is not there."""

    def __init__(self, text: str, status: int = 0) -> None:
        """Say what is wrong.

        Args:
            text: with the server's own message.
            status: of HTTP; 0: there was no answer.

        """
        super().__init__(text)
        self.status = status


class KubernetesApi:
    """A connection to the API server."""

    def __init__(self, client: Any, namespace: str) -> None:  # noqa: ANN401  # of a library without types
        """Wrap the client; see `connect`."""
        self._client = client
        self.namespace = namespace
        """Of this pod, or of the context in KUBECONFIG."""

    @classmethod
    async def connect(cls) -> Self:
        """Read how to reach the API server, anew each time; nothing is sent yet.

        Raises:
            InvalidArgument: nothing says where it is.

        """
        client, config = await asyncio.to_thread(_import)
        configuration = client.Configuration()
        paths = os.environ.get("KUBECONFIG")
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ and not paths:
                config.load_incluster_config(configuration)
                namespace = await asyncio.to_thread(_NAMESPACE_FILE.read_text)
            else:
                _check_file(paths or _DEFAULT_CONFIG)
                await config.load_kube_config(paths, client_configuration=configuration)
                namespace = config.list_kube_config_contexts(paths)[1]["context"].get("namespace", "default")
        except (config.ConfigException, OSError) as error:
            raise InvalidArgument(
                f"the Kubernetes API cannot be reached: {error} (a pod needs its service account's token, others KUBECONFIG)"
            ) from None
        return cls(client.ApiClient(configuration), namespace.strip())

    async def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout_s: float = REQUEST_S,
    ) -> Json:
        """Send a request, and give the object that is answered.

        Raises:
            ApiError: refused, or no answer within `timeout_s` seconds.

        """
        async with self._response(method, path, query or {}, body, timeout_s) as response:
            answer: Json = json.loads(await response.read())
            return answer

    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[Json]:
        """Give the events of a list of objects; ends after about `WATCH_S` seconds, when the server has had enough.

        Raises:
            ApiError: refused, or broken off.

        """
        asked = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(WATCH_S)}
        async with self._response("GET", path, asked, None, WATCH_S + REQUEST_S) as response:
            async for line in whole_lines(response.content.iter_any()):
                yield json.loads(line)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.close()

    @contextlib.asynccontextmanager
    async def _response(
        self, method: str, path: str, query: Mapping[str, str], body: Json | None, timeout_s: float
    ) -> AsyncIterator[Any]:
        import aiohttp  # noqa: PLC0415  # as the client, of which it is a part

        serialized = await self._client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params={"Accept": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            answer = await self._client.call_api(*serialized, _request_timeout=aiohttp.ClientTimeout(total=timeout_s))
            async with answer.response as response:
                if response.status >= _BAD_REQUEST:
                    raise ApiError(f"{method} {path}: {_message(await response.read())}", response.status)
                yield response
        except TimeoutError:
            raise ApiError(f"{method} {path}: no end within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiError(f"{method} {path}: {error or type(error).__name__}") from None


async def whole_lines(chunks: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
    """Give the lines of a stream; what follows the last line's end was broken off and is left out.

    Raises:
        ValueError: a line is longer than any object can be.

    """
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > _MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {_MAX_LINE_BYTES} bytes")


def _import() -> tuple[ModuleType, ModuleType]:
    return importlib.import_module("kubernetes.aio.client"), importlib.import_module("kubernetes.aio.config")


def _check_file(paths: str) -> None:
    # The client would print that there is none, and complain of what is not in it.
    if not any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep)):
        raise FileNotFoundError(f"there is no file {paths}")


def _message(body: bytes) -> str:
    """Read what the server says of its refusal: the message of a Status object, or whatever it is."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return str(json.loads(body)["message"])
    return body.decode(errors="replace").strip()[:200] or "refused without a reason"
