"""The chart's command lines, certificates and keys make a mesh: its containers as processes, Secrets as folders."""

import base64
import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.helm.chart import CHART, Document, Rendered, helm, render
from tests.helm.matrix import CASES
from tests.helm.test_rules import RULES
from tests.tiny import add_tokenizer, make_checkpoint

DEADLINE_S = 90
PROGRAMS = {"coordctl": "coordinator", "shardworker": "shardworker"}
# A machine beside the cluster has other ways to find workers.
ELSEWHERE = {"--discover", "--lease"}


@dataclass
class Pod:
    """A container's command line, as it is on this machine."""

    spec: Document
    rendered: Rendered
    folder: Path

    def command(self, **replaced: str) -> list[str]:
        """Its words; `replaced` names flags without dashes, with underscores."""
        (container,) = self.spec["containers"]
        program, *rest = container["command"]
        words = [sys.executable, "-m", PROGRAMS[program], *rest]
        for argument in container["args"]:
            flag, _, value = argument.partition("=")
            new = replaced.get(flag.removeprefix("--").replace("-", "_"), self.path(value))
            if flag not in ELSEWHERE:
                words.append(f"{flag}={new}" if value else flag)
        return words

    def path(self, value: str) -> str:
        """Where a mounted path is here; other values unchanged."""
        volumes = {volume["name"]: volume.get("secret") for volume in self.spec["volumes"]}
        for mount in self.spec["containers"][0]["volumeMounts"]:
            if value.startswith(mount["mountPath"]) and (secret := volumes[mount["name"]]):
                return value.replace(mount["mountPath"], str(self._mounted(secret)), 1)
        return value

    def _mounted(self, volume: Document) -> Path:
        data = self.rendered.get("Secret", volume["secretName"])["data"]
        files = {item["path"]: data[item["key"]] for item in volume["items"]} if "items" in volume else data
        folder = self.folder / "-".join([volume["secretName"], *sorted(files)])
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_bytes(base64.b64decode(text))
        return folder


@dataclass
class Running:
    rendered: Rendered
    folder: Path
    metrics: dict[str, str]
    """Where each pod answers scrapes."""
    address: str = ""

    def pod(self, component: str) -> Pod:
        return Pod(self.rendered.pod(component), self.rendered, self.folder)

    def key(self) -> str:
        return base64.b64decode(self.rendered.get("Secret", "mesh-caller-key")["data"]["api-key"]).decode()


def start(stack: ExitStack, log: Path, command: list[str]) -> str:
    """Run to the end of the stack; the last word of the first line of its output."""
    errors = stack.enter_context(log.open("w"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    stack.callback(process.communicate, timeout=DEADLINE_S)
    stack.callback(process.terminate)
    assert process.stdout
    line = process.stdout.readline().split()
    assert line, log.read_text()
    return line[-1]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("pods")
    make_checkpoint("llama", folder / "model")
    add_tokenizer(folder / "model")
    names = ("worker-0", "worker-1", "coordinator")
    mesh = Running(render(), folder, {name: f"127.0.0.1:{free_port()}" for name in names})
    with ExitStack() as stack:
        commands = {
            name: mesh.pod(name.partition("-")[0]).command(
                model=str(folder / "model"),
                listen="127.0.0.1:0",
                health_listen=f"unix:{folder}/{name}",
                metrics_listen=mesh.metrics[name],
            )
            for name in names
        }
        workers = [start(stack, folder / f"{name}.log", commands[name]) for name in names[:2]]
        serve = commands["coordinator"]
        address = start(stack, folder / "coordinator.log", [*serve, f"--workers={','.join(workers)}"])
        mesh.address = f"localhost:{address.rpartition(':')[2]}"
        yield mesh


def test_the_charts_test_gets_its_tokens(running: Running) -> None:
    command = running.pod("test").command(coordinator=running.address)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 16


def test_the_command_of_the_notes_gets_an_answer(running: Running) -> None:
    notes = helm("install", "mesh", str(CHART), "--dry-run=client").stdout.partition("NOTES:")[2].replace("\\\n", " ")
    found = re.search(r"sh -c '(?P<script>[^']+)' +coordctl (?P<words>generate .*) --prompt", notes)
    assert found
    words = found["words"].replace("localhost:7000", running.address).split()
    words = [running.pod("coordinator").path(word) for word in words]
    command = ["sh", "-c", found["script"], sys.executable, "-m", "coordinator", *words, "--prompt", "abc", "--max-tokens", "8"]
    done = subprocess.run(command, input=running.key(), capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_nobody_without_a_key_gets_one(running: Running) -> None:
    words = ["--coordinator", running.address, "--tls", running.pod("test").path("/etc/shardmesh/tls"), "--prompt", "abc"]
    command = [sys.executable, "-m", "coordinator", "generate", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert "API key" in done.stderr


@pytest.mark.parametrize(
    ("listener", "service", "serving"),
    [
        ("coordinator", "", True),
        ("coordinator", "shardmesh.v1.Generation", True),
        ("worker-0", "", True),
        ("worker-1", "shardmesh.v1.ShardWorker", True),
        ("worker-1", "shardmesh.v1.Generation", False),
    ],
)
def test_probes_are_answered_in_plaintext(running: Running, listener: str, service: str, serving: bool) -> None:
    # That of Kubernetes before 1.24 asks what kubelet's own asks later.
    (container,) = render(kube_version="1.20.0").pod("worker")["containers"]
    _, flag, script, address, _ = container["livenessProbe"]["exec"]["command"]
    assert address == "127.0.0.1:7008"
    command = [sys.executable, flag, script, f"unix:{running.folder}/{listener}", service]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode == 0) is serving, done.stderr


def scrape(running: Running, pod: str) -> str:
    with urllib.request.urlopen(f"http://{running.metrics[pod]}/metrics", timeout=DEADLINE_S) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.parametrize("pod", ["worker-0", "worker-1"])
def test_workers_tell_of_their_shards(running: Running, pod: str) -> None:
    assert "shardmesh_shard_loaded 1.0" in scrape(running, pod).splitlines()


def test_alerts_and_autoscalers_ask_for_metrics_that_coordinators_have(running: Running) -> None:
    text = scrape(running, "coordinator")
    # A counter's and a histogram's series have names of their own.
    told = set(re.findall(r"^# TYPE (\w+) (?:gauge|counter)$", text, re.MULTILINE))
    told |= {f"{name}_bucket" for name in re.findall(r"^# TYPE (\w+) histogram$", text, re.MULTILINE)}
    scalers = str(render(CASES["hpa"]).of_kind("HorizontalPodAutoscaler")) + str(render(CASES["keda"]).of_kind("ScaledObject"))
    expressions = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    asked = {name for text in (scalers, *expressions) for name in re.findall(r"\bshardmesh_\w+", text)}
    assert {"shardmesh_num_requests_waiting", "shardmesh_serving"} <= asked
    assert asked <= told
