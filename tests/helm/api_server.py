"""As much of an API server as `helm template --dry-run=server` asks for: which APIs there are, and the Secrets of a namespace."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.helm.chart import Document

VERSION = {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
KINDS = {
    "v1": "ConfigMap PersistentVolumeClaim Pod Secret Service ServiceAccount",
    "apps/v1": "Deployment",
    "batch/v1": "Job",
    "coordination.k8s.io/v1": "Lease",
    "networking.k8s.io/v1": "NetworkPolicy",
    "policy/v1": "PodDisruptionBudget",
    "rbac.authorization.k8s.io/v1": "Role RoleBinding",
}


@contextlib.contextmanager
def api_server(secrets: list[Document], folder: Path) -> Iterator[Path]:
    """Serve on a free port of this machine; give a kubeconfig."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(_answers(secrets)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "users": [{"name": "u", "user": {}}],
        "current-context": "c",
    }
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(json.dumps(config))
    try:
        yield kubeconfig
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answers(secrets: list[Document]) -> dict[str, Document]:
    groups = [name for name in KINDS if name != "v1"]
    answers: dict[str, Document] = {
        "/version": VERSION,
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(name) for name in groups]},
        **{f"/apis/{name}" if name in groups else "/api/v1": _resources(name) for name in KINDS},
    }
    for secret in secrets:
        metadata = secret["metadata"]
        # As helm marks what it installs.
        release = {"meta.helm.sh/release-name": metadata["labels"]["app.kubernetes.io/instance"]}
        owned = {**release, "meta.helm.sh/release-namespace": metadata["namespace"], **metadata.get("annotations", {})}
        kept = {**secret, "metadata": {**metadata, "annotations": owned}}
        answers[f"/api/v1/namespaces/{metadata['namespace']}/secrets/{metadata['name']}"] = kept
    return answers


def _group(name: str) -> Document:
    version = {"groupVersion": name, "version": name.partition("/")[2]}
    return {"name": name.partition("/")[0], "versions": [version], "preferredVersion": version}


def _resources(name: str) -> Document:
    resources = [
        {
            "name": kind.lower().removesuffix("y") + ("ies" if kind.endswith("y") else "s"),
            "kind": kind,
            "namespaced": True,
            "verbs": ["get"],
        }
        for kind in KINDS[name].split()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": resources}


def _handler(answers: dict[str, Document]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0])
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(missing if answer is None else answer).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Handler
