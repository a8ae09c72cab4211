"""Security, point by point, of every pod in every case of the matrix."""

import pytest

from tests.helm.chart import Document, Rendered, containers, render
from tests.helm.matrix import CASES

RESTRICTED_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


@pytest.fixture(params=CASES)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return render(CASES[request.param])


def pods(rendered: Rendered) -> dict[str, Document]:
    found = {name: template["spec"] for name, template in rendered.workloads()}
    assert len(found) >= 2
    return found


def test_pods_meet_the_restricted_standard(rendered: Rendered) -> None:
    for pod in pods(rendered).values():
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "hostUsers"}
        assert all(volume.keys() - {"name"} <= RESTRICTED_VOLUMES for volume in pod["volumes"])
        for container in containers(pod):
            own = container["securityContext"]
            assert own == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert all("hostPort" not in port for port in container.get("ports", []))


def test_any_user_id_will_do(rendered: Rendered) -> None:
    for pod in pods(rendered).values():
        asked = {key for part in (pod, *containers(pod)) for key in part["securityContext"]}
        assert not asked & {"runAsUser", "runAsGroup", "supplementalGroups", "seLinuxOptions"}


def test_pods_write_to_empty_folders_only_but_for_the_job_that_fills_the_claim(rendered: Rendered) -> None:
    for name, template in rendered.workloads():
        pod = template["spec"]
        scratch = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
        for container in containers(pod):
            written = {mount["name"] for mount in container.get("volumeMounts", []) if not mount.get("readOnly")}
            assert written - scratch == ({"model"} if container["name"] == "fetch" else set()), name


def test_containers_say_what_they_need(rendered: Rendered) -> None:
    for pod in pods(rendered).values():
        for container in containers(pod):
            assert "memory" in container["resources"]["limits"]
            assert container["image"].rpartition(":")[2] not in {"", "latest"}
            assert container["imagePullPolicy"] == "IfNotPresent"


def test_only_coordinators_that_watch_have_a_token(rendered: Rendered) -> None:
    watching = bool(rendered.of_kind("Role"))
    for _, template in rendered.workloads():
        is_coordinator = template["metadata"]["labels"]["app.kubernetes.io/component"] == "coordinator"
        assert template["spec"]["automountServiceAccountToken"] is (is_coordinator and watching)
        assert template["spec"]["enableServiceLinks"] is False
    assert all(account["automountServiceAccountToken"] is False for account in rendered.of_kind("ServiceAccount"))


def test_secrets_are_read_only_files_of_the_group(rendered: Rendered) -> None:
    for pod in pods(rendered).values():
        secret = {volume["name"]: volume["secret"] for volume in pod["volumes"] if "secret" in volume}
        assert all(volume["defaultMode"] == 0o440 for volume in secret.values())
        for container in containers(pod):
            assert all(mount.get("readOnly") for mount in container.get("volumeMounts", []) if mount["name"] in secret)


def test_no_secret_stands_in_an_argument_or_a_variable(rendered: Rendered) -> None:
    for pod in pods(rendered).values():
        for container in containers(pod):
            for variable in container.get("env", []):
                assert "TOKEN" not in variable["name"] or "secretKeyRef" in variable["valueFrom"]
            assert "hf_x" not in str(container)


def mounted_secrets(pod: Document) -> set[str]:
    return {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}


def test_secrets_go_to_who_needs_them() -> None:
    for case in ("defaults", "callers show certificates", "cert-manager"):
        rendered = render(CASES[case])
        assert mounted_secrets(rendered.pod("coordinator")) == {"mesh-coordinator-tls", "mesh-key-hashes"}
        assert mounted_secrets(rendered.pod("worker")) == {"mesh-worker-tls"}
        assert mounted_secrets(rendered.pod("model")) == set()


def test_the_test_trusts_the_coordinator_and_has_nothing_of_its_identity() -> None:
    volumes = {volume["name"]: volume["secret"] for volume in render().pod("test")["volumes"] if "secret" in volume}
    assert volumes["tls"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    with_certificate = render(CASES["callers show certificates"]).pod("test")
    assert mounted_secrets(with_certificate) == {"mesh-caller-tls", "mesh-caller-key"}


def test_the_hub_token_goes_to_who_downloads() -> None:
    for case, who in (("hub", "coordinator"), ("new claim for many nodes", "model")):
        rendered = render(CASES[case])
        for _, template in rendered.workloads():
            names = [variable["name"] for container in containers(template["spec"]) for variable in container.get("env", [])]
            assert ("HF_TOKEN" in names) is (template["metadata"]["labels"]["app.kubernetes.io/component"] == who)


def test_coordinators_may_watch_slices_and_write_one_lease() -> None:
    rendered = render()
    (role,) = rendered.of_kind("Role")
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "resourceNames": ["mesh-coordinator"],
            "verbs": ["get", "update", "create"],
        },
    ]
    (binding,) = rendered.of_kind("RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "mesh-coordinator", "namespace": "models"}]
    assert rendered.pod("coordinator")["serviceAccountName"] == "mesh-coordinator"
    assert rendered.names("Lease") == {"mesh-coordinator"}


def test_nothing_reaches_beyond_its_namespace(rendered: Rendered) -> None:
    assert not rendered.of_kind("ClusterRole", "ClusterRoleBinding")
    assert {document["metadata"]["namespace"] for document in rendered.documents} == {"models"}


def test_without_discovery_by_kubernetes_there_are_no_rights() -> None:
    assert not render(CASES["dns"]).of_kind("Role", "RoleBinding", "Lease")


def peers(policy: Document, direction: str) -> list[tuple[object, list[object]]]:
    """Rules of a policy as (peers, ports)."""
    key = {"ingress": "from", "egress": "to"}[direction]
    return [(rule.get(key, "anyone"), [port["port"] for port in rule["ports"]]) for rule in policy["spec"][direction]]


def of_component(name: str) -> list[Document]:
    labels = {"app.kubernetes.io/name": "shardmesh", "app.kubernetes.io/instance": "mesh", "app.kubernetes.io/component": name}
    return [{"podSelector": {"matchLabels": labels}}]


MONITORING = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
DNS = ("anyone", [53, 53])
HUB = ("anyone", [443])


def test_workers_hear_coordinators_and_prometheus_and_reach_nobody() -> None:
    for case in CASES:
        for policy in render(CASES[case]).of_kind("NetworkPolicy"):
            if policy["metadata"]["name"] == "mesh-worker":
                assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
                scraped = [] if case == "no metrics" else [(MONITORING, [7009])]
                assert peers(policy, "ingress") == [(of_component("coordinator"), [7001]), *scraped]
                assert peers(policy, "egress") == []


@pytest.mark.parametrize(
    ("case", "ingress", "egress"),
    [
        (
            "defaults",
            [("anyone", [7000]), (MONITORING, [7009])],
            [(of_component("worker"), [7001]), ([{"ipBlock": {"cidr": "0.0.0.0/0"}}], [443, 6443])],
        ),
        ("dns", [("anyone", [7000]), (MONITORING, [7009])], [(of_component("worker"), [7001]), DNS]),
        (
            "hub",
            [("anyone", [7000]), (MONITORING, [7009])],
            [(of_component("worker"), [7001]), ([{"ipBlock": {"cidr": "0.0.0.0/0"}}], [443, 6443]), DNS, HUB],
        ),
        (
            "load balancer",
            [([{"ipBlock": {"cidr": "10.0.0.0/8"}}, *of_component("test")], [7000]), (MONITORING, [7009])],
            [(of_component("worker"), [7001]), ([{"ipBlock": {"cidr": "10.96.0.1/32"}}], [443]), ("anyone", [4317])],
        ),
        (
            "no metrics",
            [("anyone", [7000])],
            [(of_component("worker"), [7001]), ([{"ipBlock": {"cidr": "0.0.0.0/0"}}], [443, 6443])],
        ),
    ],
)
def test_coordinators_hear_callers_and_reach_workers_and_the_api_server(case: str, ingress: object, egress: object) -> None:
    policy = render(CASES[case]).get("NetworkPolicy", "mesh-coordinator")
    assert peers(policy, "ingress") == ingress
    assert peers(policy, "egress") == egress


def test_the_fetching_job_reaches_the_hub_and_hears_nobody() -> None:
    policy = render().get("NetworkPolicy", "mesh-model")
    assert (peers(policy, "ingress"), peers(policy, "egress")) == ([], [DNS, HUB])


def test_the_fetching_job_reaches_what_it_is_told_to_beside_the_hub() -> None:
    rendered = render(CASES["everything of theirs in pods"])
    assert peers(rendered.get("NetworkPolicy", "mesh-model"), "egress") == [DNS, HUB, ("anyone", [3128])]
    assert ("anyone", [3128]) not in peers(rendered.get("NetworkPolicy", "mesh-coordinator"), "egress")


def test_a_volume_is_read_only_to_its_node_where_its_claim_is() -> None:
    for case, values in CASES.items():
        for _, template in render(values).workloads():
            for volume in template["spec"]["volumes"]:
                if claim := volume.get("persistentVolumeClaim"):
                    assert claim.get("readOnly", False) is (case == "existing claim")


def test_openshift_chooses_the_group_itself() -> None:
    assert render().pod("worker")["securityContext"]["fsGroup"] == 10001
    on_openshift = render(apis=("security.openshift.io/v1",))
    assert all("fsGroup" not in pod["securityContext"] for pod in pods(on_openshift).values())


def test_everything_is_closed_by_default() -> None:
    rendered = render()
    for component in ("coordinator", "worker"):
        assert "--tls=/etc/shardmesh/tls" in rendered.arguments(component)
        assert "--insecure" not in rendered.arguments(component)
    assert "--api-keys=/etc/shardmesh/api-keys/api-keys" in rendered.arguments("coordinator")
    assert rendered.names("NetworkPolicy") == {"mesh-coordinator", "mesh-worker", "mesh-model"}
