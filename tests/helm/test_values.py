"""values.yaml, its schema, and what is refused, in words that help."""

import json
from collections.abc import Iterator

import pytest
import yaml

from tests.helm.chart import CHART, Document, refusal, render, wanted_shards
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
        ({"ingress.enabled": True}, "ingress.host must be set"),
        ({"grpcRoute.enabled": True}, "must name a Gateway"),
        ({**CASES["route"], **CASES["certificates of theirs"]}, "leave one of them"),
        ({"fullnameOverride": "Mesh"}, "/fullnameOverride"),
    ],
)
def test_contradictions_and_mistakes_are_refused_by_name(values: Document, words: str) -> None:
    assert words in refusal(values)


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
