"""A release from `helm install` to nothing."""

import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.streams import Outcome, Stream
from tests.kind.cluster import Namespace, poll, tell
from tests.kind.model import NodeFolder
from tests.kind.release import Release
from tests.kind.streams import STREAMS

pytestmark = [pytest.mark.kind, pytest.mark.timeout(600)]

FIRST_TOKEN_S = 60.0
TEST_S = 180
GONE_S = 90.0


@pytest.fixture
def namespace(make_namespace: Callable[..., Namespace], model: NodeFolder) -> Iterator[Namespace]:
    """One with the model, which goes at once: what a failure leaves would only be in the way of the other tests."""
    made = make_namespace("life")
    model.make_claim(made)
    yield made
    made.remove()


async def test_a_release_lives_and_leaves_nothing(namespace: Namespace, expected: dict[str, Outcome]) -> None:
    release = Release(namespace)
    before = namespace.everything()

    started_s = time.monotonic()
    release.apply()
    tell("helm install", time.monotonic() - started_s)
    release.wait_rolled_out()
    tell("from helm install to all pods ready", time.monotonic() - started_s)
    async with release.caller() as caller:
        first = await caller.generate(Stream("first", STREAMS[0].prompt, 1))
    took_s = time.monotonic() - started_s
    tell("from helm install to the first token", took_s)
    assert first.tokens == expected[STREAMS[0].name].tokens[:1], first
    assert took_s < FIRST_TOKEN_S

    said = release.helm("test", "--logs", f"--timeout={TEST_S}s", timeout_s=TEST_S + 30)
    assert "Succeeded" in said
    answer = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert len(answer["token_ids"]) == 16

    started_s = time.monotonic()
    release.helm("uninstall")
    poll("everything to go", lambda: namespace.everything() <= before, GONE_S)
    tell("from helm uninstall to nothing", time.monotonic() - started_s)
    assert namespace.everything() == before
