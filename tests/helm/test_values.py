"""values.yaml, its schema, and what is refused, in words that help."""

import json
import shlex
from collections.abc import Iterator

import pytest
import yaml

from tests.helm.chart import CHART, Document, helm, refusal, render, template_arguments, wanted_shards
from tests.helm.matrix import CASES

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def closed_objects(schema: Document, values: Document, path: str = "") -> Iterator[tuple[str, Document, Document]]:
    yield path, schema, values
    for key, inner in schema["properties"].items():
        if (
            "properties" in inner
            and isinstance(values.get(key), dict)
            and set(inner["properties"]) != {"requests", "limits", "claims"}
        ):
            yield from closed_objects(inner, values[key], f"{path}.{key}")


def test_the_schema_names_every_value_and_no_other() -> None:
    seen = list(closed_objects(SCHEMA, VALUES))
    assert len(seen) > 20
    for path, schema, values in seen:
        assert schema["additionalProperties"] is False, path
        # Helm itself adds `global`.
        assert set(schema["properties"]) - {"global"} == set(values), path


def test_every_top_level_value_is_used_in_the_matrix_or_by_default() -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    for path, _, values in closed_objects(SCHEMA, VALUES):
        for key in values:
            assert f".{key}" in templates or f'"{key}"' in templates, f"{path}.{key} is read nowhere"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shards": 3}, "shards is 3: a power of two is wanted; set allowUneven=true"),
        ({"shards": 0}, "/shards"),
        ({"shards": "2"}, "/shards"),
        ({"shard": 4}, "'shard' not allowed"),
        ({"worker.replicas": 4}, "'replicas' not allowed"),
        ({"worker.resources.limts": {}}, "'limts' not allowed"),
        ({"worker.resources.limits": {"memory": "lots"}}, "memory"),
        ({"coordinator.replicas": 0}, "/coordinator/replicas"),
        ({"tls.mode": "on"}, "/tls/mode"),
        ({"model.path": "../etc", "model.source": "existingClaim", "model.claim.existing": "x"}, "/model/path"),
        ({"model.source": "existingClaim"}, "model.claim.existing must name the claim"),
        ({"model.claim.existing": "x"}, "belong to model.source=existingClaim"),
        ({"model.source": "hub", "model.delivery": "shared"}, "set model.delivery=stream"),
        ({"model.source": "hub", "model.revision": "v2"}, "needs model.source=newClaim"),
        ({"coordinator.warmSpares": True}, "needs model.delivery=shared"),
        ({"model.hubId": ""}, "model.hubId must say which model"),
        ({"model.claim.accessMode": "ReadOnlyMany"}, "cannot be filled"),
        ({"model.hubToken.existingSecret": "a", "model.hubToken.value": "b"}, "not both"),
        ({"discovery": "dns", "coordinator.replicas": 2}, "several coordinators need discovery=kubernetes"),
        ({"tls.mode": "existing"}, "must name the Secrets"),
        ({"tls.workerSecret": "x"}, "belong to tls.mode=existing"),
        ({"tls.mode": "off", "tls.requireCallerCertificate": True}, "need TLS"),
        ({"apiKeys.existingCallerSecret": "x"}, "goes with apiKeys.existingSecret"),
        ({"autoscaling.mode": "hpa", "autoscaling.minReplicas": 9}, "more than maxReplicas"),
        ({"autoscaling.mode": "keda"}, "autoscaling.prometheusAddress must say"),
        ({"metrics.enabled": False, "metrics.monitor": "podMonitor"}, "metrics.monitor=podMonitor reads metrics"),
        ({"metrics.enabled": False, "metrics.rules": True}, "metrics.rules=true reads metrics"),
        ({"metrics.enabled": False, "metrics.dashboard": True}, "metrics.dashboard=true reads metrics"),
        ({"metrics.enabled": False, **CASES["keda"]}, "autoscaling.mode=keda reads metrics"),
        ({"metrics.enabled": False, **CASES["hpa"]}, "autoscaling.mode=hpa reads metrics"),
        ({"worker.maxSurge": 0}, "no worker could ever be replaced"),
        ({"worker.maxSurge": "0%", "worker.maxUnavailable": "00%"}, "no worker could ever be replaced"),
        (
            {"worker.resources.limits": {"memory": "512Mi"}},
            "worker.resources.limits.memory is 512Mi, less than what is requested, 1Gi",
        ),
        ({"coordinator.resources.limits": {"cpu": "200m"}}, "coordinator.resources.limits.cpu is 200m, less than"),
        ({"coordinator.resources.limits": {"memory": 1000000}}, "less than what is requested, 512Mi"),
        ({"worker.podLabels": {"app.kubernetes.io/name": "x"}}, "worker.podLabels: app.kubernetes.io/name is a label that"),
        ({"commonLabels": {"shardmesh.dev/mounts": "x"}}, "commonLabels: shardmesh.dev/mounts is a label that"),
        ({"metrics.labels": {"helm.sh/chart": "x"}}, "metrics.labels: helm.sh/chart is a label that"),
        ({"commonLabels": {"team": "a"}, "worker.podLabels": {"team": "b"}}, "worker.podLabels: team is in commonLabels already"),
        ({"commonLabels": {"team": "not a label"}}, "/commonLabels/team"),
        ({"coordinator.podLabels": {"a/b/c": "x"}}, "/coordinator/podLabels"),
        ({"ingress.enabled": True}, "ingress.host must be set"),
        ({"grpcRoute.enabled": True}, "must name a Gateway"),
        ({**CASES["route"], **CASES["certificates of theirs"]}, "leave one of them"),
        ({"fullnameOverride": "Mesh"}, "/fullnameOverride"),
    ],
)
def test_contradictions_and_mistakes_are_refused_by_name(values: Document, words: str) -> None:
    assert words in refusal(values)


@pytest.mark.parametrize(
    ("request_", "limit"), [("1Gi", "1024Mi"), ("1500m", 2), ("999k", "1M"), ("1G", "1Gi"), ("0.5", "500m"), (1000000000, "1G")]
)
def test_a_limit_may_be_as_much_as_is_requested_in_any_unit(request_: str | int, limit: str | int) -> None:
    resources = {"requests": {"memory": request_}, "limits": {"memory": limit}}
    assert render({"worker.resources": resources}).pod("worker")["containers"][0]["resources"]["limits"]["memory"] == limit


def test_what_is_taken_away_is_not_asked_for() -> None:
    rendered = render({"worker.resources": None, "commonLabels": None, "worker.podLabels": {"team": "a"}})
    assert rendered.pod("worker")["containers"][0]["resources"] is None
    assert rendered.template("worker")["metadata"]["labels"]["team"] == "a"


def test_an_autoscaler_of_an_api_that_the_cluster_does_not_know_is_refused() -> None:
    assert render(CASES["hpa"], kube_version="1.23.0").of_kind("HorizontalPodAutoscaler")
    done = helm(*template_arguments(CASES["hpa"], "mesh", "models", "1.22.0", ()), check=False)
    assert "it needs autoscaling/v2, from Kubernetes 1.23 on, found v1.22.0" in done.stderr


def notes(*values: str) -> str:
    return helm("install", "mesh", str(CHART), "--dry-run=client", *(f"--set-json={value}" for value in values)).stdout.partition(
        "NOTES:"
    )[2]


def test_notes_are_a_command_whatever_the_prompt() -> None:
    prompt = """It's a "test" of $HOME"""
    command = notes(f"test.prompt={json.dumps(prompt)}").partition("    kubectl -n default get secret")[2].partition("\n\n")[0]
    assert shlex.split(command.replace("\\\n", ""))[-2:] == ["--prompt", prompt]


@pytest.mark.parametrize(
    ("bad", "good", "words"),
    [
        (["coordinator.replicas=2"], ["coordinator.kvTokens=65536"], "coordinator.kvTokens is not set"),
        (['autoscaling.mode="hpa"'], ["coordinator.kvTokens=65536"], "coordinator.kvTokens is not set"),
        (
            ["grpcRoute.enabled=true", 'grpcRoute.parentRefs=[{"name":"gateway"}]'],
            ['grpcRoute.caConfigMap="ca"'],
            "nothing here says so to the gateway",
        ),
        (
            ["ingress.enabled=true", 'ingress.host="llm.example.org"', "tls.requireCallerCertificate=true"],
            ["tls.requireCallerCertificate=false"],
            "proxy-ssl-secret",
        ),
    ],
)
def test_notes_warn_of_what_is_missing(bad: list[str], good: list[str], words: str) -> None:
    assert words in notes(*bad)
    assert words not in notes(*bad, *good)
    assert words not in notes()


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 64, 4096])
def test_powers_of_two_need_no_word_more(shards: int) -> None:
    assert wanted_shards(render({"shards": shards})) == shards


def test_large_numbers_stay_numbers() -> None:
    arguments = render(CASES["many"]).arguments("coordinator")
    assert {"--kv-tokens=1048576", "--max-waiting=1000000"} <= set(arguments)


def test_what_is_not_said_is_the_programs_own_choice() -> None:
    flags = {argument.partition("=")[0] for argument in render().arguments("coordinator")}
    assert not flags & {"--kv-tokens", "--max-rows", "--wire", "--recovery-timeout", "--round-timeout", "--warm-spares"}
    assert not any(argument.startswith("--threads") for argument in render({"worker.threads": None}).arguments("worker"))


def test_without_keys_or_certificates_the_coordinator_is_told_that_this_is_meant() -> None:
    def insecure(**values: object) -> bool:
        return "--insecure" in render({key.replace("_", "."): value for key, value in values.items()}).arguments("coordinator")

    assert not insecure()
    assert insecure(apiKeys_enabled=False)
    assert not insecure(apiKeys_enabled=False, tls_requireCallerCertificate=True)
    assert insecure(tls_mode="off")


def test_the_test_is_left_out_where_it_could_only_fail() -> None:
    without = {case for case, values in CASES.items() if not render(values).of_kind("Pod")}
    assert without == {"certificates of theirs", "hashes of theirs only"}
