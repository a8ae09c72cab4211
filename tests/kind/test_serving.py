"""Who may call a mesh in a cluster gets the tokens of a private mesh; who may not gets none."""

import json

import grpc
import pytest

from tests.faults.streams import Caller, Outcome, Stream, differences
from tests.kind.cluster import COORDINATOR, Json
from tests.kind.release import NAME, PORT, Release
from tests.kind.streams import STREAMS

pytestmark = [pytest.mark.kind, pytest.mark.timeout(600)]

ANSWER_S = 180.0


async def test_a_caller_outside_gets_the_tokens_of_a_private_mesh(release: Release, expected: dict[str, Outcome]) -> None:
    async with release.caller() as caller:
        found = await caller.generate_all(STREAMS)
        mesh = await caller.mesh()
    assert [text for stream in STREAMS for text in differences(stream, found[stream.name], expected[stream.name])] == []
    assert (mesh.serving, mesh.num_shards, len(mesh.workers)) == (True, 2, 3)


async def test_a_caller_without_a_key_gets_nothing(release: Release) -> None:
    authority = release.authority()
    with release.forward() as address:
        async with Caller(address, grpc.ssl_channel_credentials(authority)) as caller:
            outcome = await caller.generate(Stream("nobody", STREAMS[0].prompt, 1))
    assert (outcome.code, outcome.tokens) == (grpc.StatusCode.UNAUTHENTICATED, [])


def test_a_pod_gets_the_tokens_of_a_private_mesh(release: Release, expected: dict[str, Outcome]) -> None:
    stream = STREAMS[0]
    name = "coordctl"
    overrides = json.dumps({"spec": closed_pod(stream)})
    release.namespace.kubectl("run", name, f"--image={COORDINATOR}", "--restart=Never", f"--overrides={overrides}")
    try:
        answer = json.loads(release.namespace.wait_pod_ended(name, ANSWER_S))
    finally:
        release.namespace.kubectl("delete", "pod", name, "--now")
    wanted = expected[stream.name]
    assert (answer["token_ids"], answer["text"]) == (wanted.tokens, wanted.text)


def closed_pod(stream: Stream) -> Json:
    """`coordctl generate`, as a pod that meets the restricted Pod Security Standard."""
    prompt = ",".join(map(str, stream.prompt))
    return {
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "fsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "coordctl",
                "image": COORDINATOR,
                "args": [
                    "generate",
                    f"--coordinator={NAME}-coordinator:{PORT}",
                    "--tls=/tls",
                    f"--prompt-ids={prompt}",
                    f"--max-tokens={stream.max_tokens}",
                    "--ignore-eos",
                    "--json",
                ],
                "env": [
                    {
                        "name": "SHARDMESH_API_KEY",
                        "valueFrom": {"secretKeyRef": {"name": f"{NAME}-caller-key", "key": "api-key"}},
                    }
                ],
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": True,
                },
                "volumeMounts": [
                    {"name": "tls", "mountPath": "/tls", "readOnly": True},
                    {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  # of the pod
                ],
            }
        ],
        "volumes": [
            {
                "name": "tls",
                "secret": {"secretName": f"{NAME}-coordinator-tls", "items": [{"key": "ca.crt", "path": "ca.crt"}]},
            },
            {"name": "tmp", "emptyDir": {}},
        ],
    }
