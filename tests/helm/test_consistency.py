"""What one resource says of another is so: selectors, ports, names, mounts, files."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from tests.helm.chart import Document, Rendered, containers, render, selects, wanted_shards
from tests.helm.matrix import CASES

THEIRS = {
    "hub",
    "weights",
    "coordinator-certificate",
    "worker-certificate",
    "caller-certificate",
    "public-certificate",
    "keys",
    "my-key",
    "pull",
    "llm",
    "mesh-ca",
}
"""Objects of the user's own that the matrix names."""


@pytest.fixture(params=CASES)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return render(CASES[request.param])


def templates_of(rendered: Rendered, selector: Document) -> list[Document]:
    return [template for _, template in rendered.workloads() if selects(selector, template["metadata"]["labels"])]


def ports_of(template: Document) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"] for container in template["spec"]["containers"] for port in container.get("ports", [])
    }


def test_services_select_pods_and_name_their_ports(rendered: Rendered) -> None:
    services = rendered.of_kind("Service")
    assert len(services) == (4 if rendered.of_kind("ServiceMonitor") else 2)
    for service in services:
        (template,) = templates_of(rendered, service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports_of(template)
            assert port["protocol"] == "TCP"


def test_every_port_says_its_protocol(rendered: Rendered) -> None:
    for _, template in rendered.workloads():
        for container in containers(template["spec"]):
            assert all(port["protocol"] == "TCP" for port in container.get("ports", []))


def test_a_workload_selects_its_own_pods_and_no_others(rendered: Rendered) -> None:
    for deployment in rendered.of_kind("Deployment"):
        assert templates_of(rendered, deployment["spec"]["selector"]) == [deployment["spec"]["template"]]


def test_disruption_budgets_select_one_workload(rendered: Rendered) -> None:
    for budget in rendered.of_kind("PodDisruptionBudget"):
        assert len(templates_of(rendered, budget["spec"]["selector"])) == 1


def test_policies_are_of_pods_that_exist_and_open_ports_that_they_have(rendered: Rendered) -> None:
    for policy in rendered.of_kind("NetworkPolicy"):
        (template,) = templates_of(rendered, policy["spec"]["podSelector"])
        for rule in policy["spec"]["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= set(ports_of(template).values())
        for rule in policy["spec"]["egress"]:
            for peer in rule.get("to", []):
                if "podSelector" in peer:
                    (target,) = templates_of(rendered, peer["podSelector"])
                    assert {port["port"] for port in rule["ports"]} <= set(ports_of(target).values())


def references(pod: Document) -> Iterator[tuple[str, str]]:
    yield "ServiceAccount", pod["serviceAccountName"]
    for volume in pod["volumes"]:
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in containers(pod):
        for source in container.get("envFrom", []):
            yield "ConfigMap", source["configMapRef"]["name"]
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield "Secret", reference["name"]


def test_what_pods_refer_to_exists(rendered: Rendered) -> None:
    made = {(document["kind"], document["metadata"]["name"]) for document in rendered.documents}
    made |= {("Secret", document["spec"]["secretName"]) for document in rendered.of_kind("Certificate")}
    for name, template in rendered.workloads():
        missing = {reference for reference in references(template["spec"]) if reference not in made}
        assert {other for _, other in missing} <= THEIRS, name


def test_mounts_have_volumes_volumes_have_mounts_and_paths_differ(rendered: Rendered) -> None:
    for _, template in rendered.workloads():
        volumes = [volume["name"] for volume in template["spec"]["volumes"]]
        mounts = [mount for container in containers(template["spec"]) for mount in container.get("volumeMounts", [])]
        assert len(set(volumes)) == len(volumes)
        assert set(volumes) == {mount["name"] for mount in mounts}
        for container in containers(template["spec"]):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(set(paths)) == len(paths)


def test_files_in_arguments_are_in_what_is_mounted(rendered: Rendered) -> None:
    for _, template in rendered.workloads():
        for container in containers(template["spec"]):
            mounts = [PurePosixPath(mount["mountPath"]) for mount in container["volumeMounts"]]
            for argument in container.get("args", []):
                for path in re.findall(r"=(/\S+)$", argument):
                    assert any(PurePosixPath(path).is_relative_to(mount) for mount in mounts), argument


def test_programs_listen_where_ports_and_probes_say(rendered: Rendered) -> None:
    for component, listeners in (
        ("coordinator", {"callers": "--listen", "health": "--health-listen", "metrics": "--metrics-listen"}),
        ("worker", {"rounds": "--listen", "health": "--health-listen", "metrics": "--metrics-listen"}),
    ):
        (container,) = rendered.pod(component)["containers"]
        ports = ports_of(rendered.template(component))
        listening = {
            name: int(given[0].rpartition(":")[2]) for name, flag in listeners.items() if (given := value(container, flag))
        }
        assert listening == ports
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["grpc"]["port"] == ports["health"]


def value(container: Document, flag: str) -> list[str]:
    return [argument.partition("=")[2] for argument in container["args"] if argument.startswith(f"{flag}=")]


def test_coordinators_look_for_workers_where_their_service_is(rendered: Rendered) -> None:
    (container,) = rendered.pod("coordinator")["containers"]
    (where,) = value(container, "--discover")
    kind, name, port = where.split(":")
    service = rendered.get("Service", name.rpartition("/")[2])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["ports"][0]["port"] == int(port)
    if kind == "kubernetes":
        assert name.startswith("$(POD_NAMESPACE)/")
        assert {"name": "POD_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}} in container["env"]
        assert rendered.names("Lease") == {lease.rpartition("/")[2] for lease in value(container, "--lease")}
    else:
        assert kind == "dns"
        assert value(container, "--lease") == []


def test_workers_are_as_many_as_shards_and_spares(rendered: Rendered) -> None:
    replicas = rendered.get("Deployment", "mesh-worker")["spec"]["replicas"]
    assert replicas >= wanted_shards(rendered)
    assert render(CASES["many"]).get("Deployment", "mesh-worker")["spec"]["replicas"] == 10
    assert render(CASES["three shards"]).get("Deployment", "mesh-worker")["spec"]["replicas"] == 3


def test_coordinators_get_the_time_they_ask_for(rendered: Rendered) -> None:
    pod = rendered.pod("coordinator")
    (container,) = pod["containers"]
    (grace,) = value(container, "--grace")
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert sleep[0] == "sleep"
    # Two seconds in which ended streams hear of it, and some for the process to end.
    assert pod["terminationGracePeriodSeconds"] >= int(sleep[1]) + int(grace) + 10


def test_the_model_has_one_path_for_all_who_read_it(rendered: Rendered) -> None:
    (path,) = value(rendered.pod("coordinator")["containers"][0], "--model")
    streamed = value(rendered.pod("coordinator")["containers"][0], "--weights") == ["stream"]
    mounts = {
        component: [mount for mount in rendered.pod(component)["containers"][0]["volumeMounts"] if mount["name"] == "model"]
        for component in ("coordinator", "worker")
    }
    assert mounts["worker"] == ([] if streamed else mounts["coordinator"])
    if mounts["coordinator"]:
        assert path.startswith("/models")
    else:
        assert streamed
        assert path == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_job_fills_the_folder_that_the_coordinator_opens_and_waits_for() -> None:
    rendered = render(CASES["new claim for many nodes"])
    (fetch,) = rendered.pod("model")["containers"]
    model, revision, directory = fetch["args"][1:]
    assert (model, revision) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "refs/pr/1")
    pod = rendered.pod("coordinator")
    assert value(pod["containers"][0], "--model") == [directory]
    assert pod["initContainers"][0]["args"][1] == directory


def affinity_terms(pod: Document) -> list[Document]:
    terms: list[Document] = (
        pod.get("affinity", {}).get("podAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", [])
    )
    return terms


def test_a_claim_of_one_node_keeps_all_who_mount_it_there(rendered: Rendered) -> None:
    claims = rendered.of_kind("PersistentVolumeClaim")
    one_node = bool(claims) and claims[0]["spec"]["accessModes"] == ["ReadWriteOnce"]
    mounting = [
        template for _, template in rendered.workloads() if any(v["name"] == "model" for v in template["spec"]["volumes"])
    ]
    for _, template in rendered.workloads():
        own = [term for term in affinity_terms(template["spec"]) if "shardmesh.dev/mounts" in str(term)]
        if template in mounting and one_node:
            (term,) = own
            assert term["topologyKey"] == "kubernetes.io/hostname"
            assert [
                other for _, other in rendered.workloads() if selects(term["labelSelector"], other["metadata"]["labels"])
            ] == mounting
        elif template not in mounting:
            assert own == []


def test_affinity_of_their_own_is_kept() -> None:
    pod = render(CASES["everything of theirs in pods"]).pod("coordinator")
    assert [term["topologyKey"] for term in affinity_terms(pod)] == ["zone", "kubernetes.io/hostname"]
    assert "nodeAffinity" in pod["affinity"]


def test_pods_are_spread_by_their_own_component(rendered: Rendered) -> None:
    for component in ("coordinator", "worker"):
        template = rendered.template(component)
        for constraint in template["spec"].get("topologySpreadConstraints", []):
            assert templates_of(rendered, constraint["labelSelector"]) == [template]


def test_ways_in_lead_to_ports_of_services(rendered: Rendered) -> None:
    ports = {
        service["metadata"]["name"]: {key for port in service["spec"]["ports"] for key in (port["name"], port["port"])}
        for service in rendered.of_kind("Service")
    }
    for ingress in rendered.of_kind("Ingress"):
        backend = ingress["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert backend["port"]["name"] in ports[backend["name"]]
        assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/backend-protocol"] == "GRPCS"
    for route in rendered.of_kind("GRPCRoute"):
        (backend,) = route["spec"]["rules"][0]["backendRefs"]
        assert backend["port"] in ports[backend["name"]]
    for policy in rendered.of_kind("BackendTLSPolicy"):
        (target,) = policy["spec"]["targetRefs"]
        assert target["sectionName"] in ports[target["name"]]


def test_monitors_find_the_port(rendered: Rendered) -> None:
    for monitor in rendered.of_kind("PodMonitor"):
        (template,) = templates_of(rendered, monitor["spec"]["selector"])
        assert monitor["spec"]["podMetricsEndpoints"][0]["port"] in ports_of(template)
    for monitor in rendered.of_kind("ServiceMonitor"):
        found = [s for s in rendered.of_kind("Service") if selects(monitor["spec"]["selector"], s["metadata"]["labels"])]
        (service,) = found
        assert monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}


def test_coordinators_and_workers_are_scraped() -> None:
    for case, kind in (("pod monitor", "PodMonitor"), ("service monitor", "ServiceMonitor")):
        assert render(CASES[case]).names(kind) == {"mesh-coordinator", "mesh-worker"}
    assert render(CASES["no metrics"]).names("PodMonitor") == set()


def test_a_family_of_addresses_is_listened_on() -> None:
    for values, host in (({}, "0.0.0.0"), (CASES["IPv6"], "[::]")):  # noqa: S104  # in a pod
        arguments = [argument for component in ("coordinator", "worker") for argument in render(values).arguments(component)]
        listening = [argument.partition("=")[2] for argument in arguments if argument.partition("=")[0].endswith("listen")]
        assert len(listening) == 6
        assert {address.rpartition(":")[0] for address in listening} == {host}


def test_autoscalers_own_the_number_of_coordinators() -> None:
    for case, kind in (("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        rendered = render(CASES[case])
        (scaler,) = rendered.of_kind(kind)
        assert "replicas" not in rendered.get("Deployment", scaler["spec"]["scaleTargetRef"]["name"])["spec"]
    assert render().get("Deployment", "mesh-coordinator")["spec"]["replicas"] == 1


def test_without_a_lease_there_are_never_two_coordinators() -> None:
    strategies = {case: render(CASES[case]).get("Deployment", "mesh-coordinator")["spec"]["strategy"]["type"] for case in CASES}
    # Nor where their plans may differ: each would wait for the other.
    assert {case for case, strategy in strategies.items() if strategy == "RollingUpdate"} == {"images"}
    assert strategies["dns"] == "Recreate"


def test_upgrades_of_the_chart_alone_start_no_pod_anew(rendered: Rendered) -> None:
    for _, template in rendered.workloads():
        if "spec" in template and template.get("kind") != "Pod":
            labels = template["metadata"]["labels"]
            assert not labels.keys() & {"helm.sh/chart", "app.kubernetes.io/version"}


def test_health_is_asked_by_the_names_that_the_programs_answer() -> None:
    rendered = render()
    asked = {
        component: {
            probe: rendered.pod(component)["containers"][0][probe]["grpc"].get("service", "")
            for probe in ("startupProbe", "livenessProbe", "readinessProbe")
        }
        for component in ("coordinator", "worker")
    }
    assert asked["coordinator"] == {"startupProbe": "", "livenessProbe": "", "readinessProbe": "shardmesh.v1.Generation"}
    assert set(asked["worker"].values()) == {""}


def test_callers_services_have_no_port_of_metrics(rendered: Rendered) -> None:
    for service in rendered.of_kind("Service"):
        ports = [port["name"] for port in service["spec"]["ports"]]
        assert len(ports) == 1
        if ports == ["metrics"]:
            # Those that are not ready too: an alert says that they do not serve.
            assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)


@pytest.mark.parametrize("release", ["mesh", "a-release-of-one-name-that-is-too-long-for-its-pods"])
def test_keda_asks_for_this_releases_coordinators_only(release: str) -> None:
    (scaler,) = render(CASES["keda"], release=release).of_kind("ScaledObject")
    name = scaler["spec"]["scaleTargetRef"]["name"]
    (pattern,) = re.findall(r'pod=~"([^"]+)"', scaler["spec"]["triggers"][0]["metadata"]["query"])
    # What a ReplicaSet makes of it: 63 characters, of which the last 5 are random.
    for revision in ("5d8f7c9b64", "7bd9"):
        assert re.fullmatch(pattern, f"{name}-{revision}-"[:58] + "x2vbn")
    for other in (f"{name}-coordinator-7bd9-x2vbn", f"{name}-worker-7bd9-x2vbn", f"{name}-test"):
        assert not re.fullmatch(pattern, other)


def test_starting_gets_the_seconds_that_the_worker_needs() -> None:
    for seconds, probes in ((120, 60), (301, 151)):
        probe = render({"worker.startupSeconds": seconds}).pod("worker")["containers"][0]["startupProbe"]
        assert (probe["failureThreshold"], probe["periodSeconds"]) == (probes, 2)


def test_starting_gets_the_seconds_that_the_model_needs() -> None:
    for seconds, probes in ((600, 120), (61, 13)):
        probe = render({"model.startupSeconds": seconds}).pod("coordinator")["containers"][0]["startupProbe"]
        assert (probe["failureThreshold"], probe["periodSeconds"]) == (probes, 5)
