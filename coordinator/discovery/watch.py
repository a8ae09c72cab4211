"""A list of Kubernetes objects, kept up to date for as long as it is wanted.

List, then watch from there. When the server ends a watch in its own time the next one goes on where it ended, which bookmarks
keep recent. After anything else (a server that restarts, an error, 410 Gone because the history is over) everything is read anew:
credentials, list, watch. Until then the last list holds.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import structlog

from coordinator.discovery.api import ApiError, KubernetesApi
from protos.errors import InvalidArgument, MeshError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from coordinator.discovery.api import Json

log = structlog.get_logger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
SHORTEST_WATCH_S = 1.0
"""A watch that ended sooner, without any event, was not ended for its age."""

_GONE = 410
_NOT_FOUND = 404


class Backoff:
    """Pauses between attempts: twice as long each time, and by chance shorter, so that many clients do not come at once."""

    def __init__(self) -> None:
        """Begin with the shortest."""
        self._pause_s = FIRST_PAUSE_S

    def next_s(self) -> float:
        """Give the next pause, seconds."""
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.5, 1.0)  # noqa: S311  # no secret

    def reset(self) -> None:
        """Begin with the shortest again."""
        self._pause_s = FIRST_PAUSE_S


class ObjectWatch:
    """All objects of one kind in one namespace that a label selects."""

    def __init__(
        self,
        paths: Callable[[str], Sequence[str]],
        selector: str,
        connect: Callable[[], Awaitable[KubernetesApi]] = KubernetesApi.connect,
    ) -> None:
        """Ask nothing yet.

        Args:
            paths: of the list, given the coordinator's own namespace; the first one that the server knows is taken.
            selector: of labels.
            connect: gives a connection with fresh credentials.

        """
        self._paths = paths
        self._selector = selector
        self._connect = connect
        self._backoff = Backoff()
        # What is wrong at present, as far as the log tells already.
        self._told = ""

    async def snapshots(self) -> AsyncGenerator[list[Json]]:
        """Give all objects, now and after each change, for ever.

        Raises:
            InvalidArgument: nothing says where the API server is.

        """
        connected = False
        while True:
            try:
                async with aclosing(await self._connect()) as api:
                    connected = True
                    async for objects in self._follow(api):
                        yield objects
            except MeshError as error:
                if isinstance(error, InvalidArgument) and not connected:
                    raise
                if isinstance(error, ApiError) and error.status == _GONE:
                    log.info("the watch's history is over: listing anew")
                elif self._told != str(error):
                    self._told = str(error)
                    log.warning("watch is broken, the last answer holds", error=self._told)
            await asyncio.sleep(self._backoff.next_s())

    async def _follow(self, api: KubernetesApi) -> AsyncGenerator[list[Json]]:
        path, listing = await self._list(api)
        objects = {_name(one): one for one in _field(listing, "items") or ()}
        version = _version(listing)
        yield list(objects.values())
        while True:
            began, quiet = time.monotonic(), True
            query = {"labelSelector": self._selector, "resourceVersion": version}
            async with aclosing(api.watch(path, query)) as events:
                async for event in events:
                    quiet = False
                    version = _apply(event, objects) or version
                    self._note_sound()
                    if event["type"] != "BOOKMARK":
                        yield list(objects.values())
            if quiet and time.monotonic() - began < SHORTEST_WATCH_S:
                raise ApiError(f"GET {path}: the watch ended as soon as it began")
            self._note_sound()

    def _note_sound(self) -> None:
        if self._told:
            log.info("watch is sound again")
        self._told = ""
        self._backoff.reset()

    async def _list(self, api: KubernetesApi) -> tuple[str, Json]:
        paths = self._paths(api.namespace)
        for path in paths:
            try:
                return path, await api.request("GET", path, {"labelSelector": self._selector})
            except ApiError as error:
                if error.status != _NOT_FOUND or path == paths[-1]:
                    raise
        raise ValueError("a watch without a path")


def _apply(event: Json, objects: dict[str, Json]) -> str | None:
    """Change `objects` as an event says; give the version up to which they are known, if it says so.

    Raises:
        ApiError: the event is an error, or is none at all.

    """
    kind, changed = _field(event, "type"), _field(event, "object")
    if not isinstance(kind, str):
        raise ApiError(f"watch: no event: {str(event)[:200]}")
    if kind == "ERROR":
        status = _field(changed, "code")
        raise ApiError(f"watch: {_field(changed, 'message') or changed}", status if isinstance(status, int) else 0)
    if kind in {"ADDED", "MODIFIED"}:
        objects[_name(changed)] = changed
    elif kind == "DELETED":
        objects.pop(_name(changed), None)
    elif kind != "BOOKMARK":
        # Of a later version of the API, which does not know that we do not.
        return None
    return _version(changed)


def _name(found: Json) -> str:
    name = _field(_field(found, "metadata"), "name")
    if not isinstance(name, str):
        raise ApiError(f"an object without a name: {str(found)[:200]}")
    return name


def _version(found: Json) -> str:
    version = _field(_field(found, "metadata"), "resourceVersion")
    if not isinstance(version, str):
        raise ApiError(f"an object without a resourceVersion: {str(found)[:200]}")
    return version


def _field(found: Any, key: str) -> Any:  # noqa: ANN401  # JSON
    return found.get(key) if isinstance(found, dict) else None
