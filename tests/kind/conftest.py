"""These tests need a cluster with the images. They are skipped, and say so, unless SHARDMESH_REQUIRE_CLUSTER=1 asks for them.

With that a cluster which is not there is a failure. KUBECONFIG alone does not ask: it may name a cluster that others depend on.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack

import pytest

from protos.generation_pb2 import FinishReason
from tests.faults.streams import Outcome, Stream
from tests.helm.chart import ROOT
from tests.kind.cluster import Namespace, missing
from tests.kind.model import NodeFolder
from tests.kind.release import Release
from tests.kind.streams import STREAMS
from tests.smollm2 import SMOLLM2

NAMESPACES = pytest.StashKey[list[Namespace]]()
LOCAL_S = 180


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NAMESPACES] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Whatever failed is shown with what the cluster knows of it."""
    report = yield
    if report.failed:
        report.sections += [
            (f"namespace {namespace.name}", namespace.describe()) for namespace in item.config.stash.get(NAMESPACES, [])
        ]
    return report


@pytest.fixture(autouse=True, scope="session")
def _cluster() -> None:
    if not os.environ.get("SHARDMESH_REQUIRE_CLUSTER"):
        pytest.skip("`make test-kind` runs these in the cluster of KUBECONFIG")
    if reason := missing():
        pytest.fail(reason)


@pytest.fixture(scope="session")
def make_namespace(request: pytest.FixtureRequest, _cluster: None) -> Iterator[Callable[..., Namespace]]:
    """Makes namespaces of this run's own, which go with it."""
    run = f"shardmesh-test-{secrets.token_hex(3)}"
    with ExitStack() as stack:

        def make(purpose: str, *, restricted: bool = True) -> Namespace:
            namespace = Namespace(f"{run}-{purpose}")
            request.config.stash[NAMESPACES].append(namespace)
            stack.callback(namespace.remove)
            namespace.make(restricted=restricted)
            return namespace

        yield make


@pytest.fixture(scope="session")
def model(make_namespace: Callable[..., Namespace]) -> Iterator[NodeFolder]:
    folder = NodeFolder(make_namespace("files", restricted=False))
    try:
        folder.fill()
        yield folder
    finally:
        folder.remove()


@pytest.fixture(scope="session")
def shared_release(make_namespace: Callable[..., Namespace], model: NodeFolder) -> Release:
    namespace = make_namespace("mesh")
    model.make_claim(namespace)
    return Release(namespace)


@pytest.fixture
def release(shared_release: Release) -> Release:
    """The one that tests share, as the values of these tests want it."""
    shared_release.settle()
    return shared_release


@pytest.fixture(scope="session")
def expected() -> dict[str, Outcome]:
    """What a private mesh on this machine answers to each stream."""
    return {stream.name: ask_private_mesh(stream) for stream in STREAMS}


def ask_private_mesh(stream: Stream) -> Outcome:
    sampling = [f"--{name.replace('_', '-')}={value}" for name, value in stream.sampling.items()]
    command = [sys.executable, "-m", "coordinator", "generate", f"--model={SMOLLM2}", "--shards=2", "--threads=1"]
    command += ["--dtype=f32", "--wire=f32", "--kv-tokens=8192", "--ignore-eos", "--json", *sampling]
    command += [f"--prompt-ids={','.join(map(str, stream.prompt))}", f"--max-tokens={stream.max_tokens}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LOCAL_S, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    usage = (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"])
    reason = FinishReason.Value(f"FINISH_REASON_{answer['finish_reason'].upper()}")
    return Outcome(tokens=answer["token_ids"], text=answer["text"], usage=usage, reason=reason)
