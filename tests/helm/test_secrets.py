"""What the chart makes by itself: certificates and keys that the programs take, and that upgrades keep."""

import base64
import hashlib
from pathlib import Path

import pytest
from cryptography import x509

from coordinator.api_keys import PREFIX, read_keys
from protos.certificates import Certificates
from protos.tls import COORDINATOR_NAME, WORKER_NAME
from tests.helm.api_server import api_server
from tests.helm.chart import NEWEST, Document, Rendered, helm, parse, render, template_arguments
from tests.helm.matrix import CASES

SERVICE_NAMES = ["mesh-coordinator", *(f"mesh-coordinator.models{end}" for end in ("", ".svc", ".svc.cluster.local"))]


def written(secret: Document, folder: Path) -> Path:
    """A Secret as kubelet would mount it."""
    folder.mkdir()
    for name, data in secret["data"].items():
        (folder / name).write_bytes(base64.b64decode(data))
    return folder


def names_of(certificate: x509.Certificate) -> list[str]:
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return list(alternative.get_values_for_type(x509.DNSName))


def certificate_of(secret: Document) -> x509.Certificate:
    return x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))


def secret_data(rendered: Rendered) -> dict[str, Document]:
    return {secret["metadata"]["name"]: secret["data"] for secret in rendered.of_kind("Secret")}


def upgraded(rendered: Rendered, values: Document, folder: Path) -> Rendered:
    """What an upgrade makes in a cluster where the Secrets of `rendered` are."""
    arguments = template_arguments(values, "mesh", "models", NEWEST, ())
    with api_server(rendered.of_kind("Secret"), folder) as kubeconfig:
        server = ["--dry-run=server", "--disable-openapi-validation", "--is-upgrade", "--kubeconfig", str(kubeconfig)]
        text = helm(*arguments, *server).stdout
    return Rendered(parse(text))


@pytest.mark.parametrize(("role", "name"), [("coordinator", COORDINATOR_NAME), ("worker", WORKER_NAME)])
def test_the_programs_take_the_charts_certificates(role: str, name: str, tmp_path: Path) -> None:
    secret = render().get("Secret", f"mesh-{role}-tls")
    assert secret["type"] == "kubernetes.io/tls"
    identity = Certificates(written(secret, tmp_path / role), name=name).current()
    assert identity.chain
    assert identity.authorities
    certificate = x509.load_pem_x509_certificate(identity.chain)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.authorities))


def test_certificates_are_for_roles_and_coordinators_for_their_services_names_too() -> None:
    rendered = render({"tls.extraNames": ["llm.example.org"], "tls.requireCallerCertificate": True})
    names = {
        role: names_of(certificate_of(rendered.get("Secret", f"mesh-{role}-tls"))) for role in ("coordinator", "worker", "caller")
    }
    assert names["coordinator"] == [COORDINATOR_NAME, *SERVICE_NAMES, "localhost", "llm.example.org"]
    assert names["worker"] == [WORKER_NAME]
    assert COORDINATOR_NAME not in names["caller"]


def test_cert_manager_is_asked_for_the_same_names() -> None:
    certificates = {c["metadata"]["name"]: c["spec"] for c in render(CASES["cert-manager"]).of_kind("Certificate")}
    assert certificates["mesh-coordinator-tls"]["dnsNames"] == [COORDINATOR_NAME, *SERVICE_NAMES, "localhost", "llm.example.org"]
    assert certificates["mesh-worker-tls"]["dnsNames"] == [WORKER_NAME]
    assert certificates["mesh-coordinator-tls"]["issuerRef"]["name"] == certificates["mesh-ca"]["secretName"]
    theirs = {c["metadata"]["name"]: c["spec"] for c in render(CASES["cert-manager, an issuer of theirs"]).of_kind("Certificate")}
    assert set(theirs) == {"mesh-coordinator-tls", "mesh-worker-tls"}
    assert {spec["issuerRef"]["name"] for spec in theirs.values()} == {"corporate"}


def test_two_releases_trust_different_authorities_and_have_different_keys() -> None:
    one, other = (secret_data(render(release=release)) for release in ("one", "other"))
    assert one["one-ca"]["tls.crt"] != other["other-ca"]["tls.crt"]
    assert one["one-caller-key"] != other["other-caller-key"]


@pytest.mark.parametrize("max_calls", [None, 16])
def test_the_coordinator_knows_the_callers_key(max_calls: int | None, tmp_path: Path) -> None:
    rendered = render({"apiKeys.maxCalls": max_calls})
    shown = base64.b64decode(rendered.get("Secret", "mesh-caller-key")["data"]["api-key"])
    folder = written(rendered.get("Secret", "mesh-key-hashes"), tmp_path / "keys")
    (key,) = read_keys(folder / "api-keys")
    assert (key.name, key.digest, key.max_calls) == ("mesh", hashlib.sha256(shown).digest(), max_calls)
    # 48 of 62 characters: 285 bits.
    assert shown.startswith(PREFIX.encode())
    assert len(shown) == len(PREFIX) + 48
    assert shown not in (folder / "api-keys").read_bytes()


def test_an_upgrade_keeps_certificates_and_keys(tmp_path: Path) -> None:
    before = render()
    after = upgraded(before, {"shards": 4}, tmp_path)
    assert secret_data(after) == secret_data(before)
    assert after.get("Deployment", "mesh-worker")["spec"]["replicas"] == 5


def test_new_names_make_a_new_certificate_of_the_same_authority(tmp_path: Path) -> None:
    before = render()
    after = upgraded(before, {"tls.extraNames": ["llm.example.org"]}, tmp_path)
    changed = {name for name, data in secret_data(after).items() if data != secret_data(before)[name]}
    assert changed == {"mesh-coordinator-tls"}
    certificate = certificate_of(after.get("Secret", "mesh-coordinator-tls"))
    assert names_of(certificate)[-1] == "llm.example.org"
    certificate.verify_directly_issued_by(certificate_of(before.get("Secret", "mesh-ca")))


def test_a_lost_authority_is_replaced_with_all_it_signed(tmp_path: Path) -> None:
    before = render()
    rest = Rendered([secret for secret in before.of_kind("Secret") if secret["metadata"]["name"] != "mesh-ca"])
    after = upgraded(rest, {}, tmp_path)
    changed = {name for name, data in secret_data(after).items() if data != secret_data(before)[name]}
    assert changed == {"mesh-ca", "mesh-coordinator-tls", "mesh-worker-tls"}


def test_only_the_authoritys_own_secret_can_sign() -> None:
    rendered = render(CASES["callers show certificates"])
    for role in ("coordinator", "worker", "caller"):
        constraints = certificate_of(rendered.get("Secret", f"mesh-{role}-tls")).extensions.get_extension_for_class(
            x509.BasicConstraints
        )
        assert not constraints.value.ca
    mounted = {v["secret"]["secretName"] for _, t in rendered.workloads() for v in t["spec"]["volumes"] if "secret" in v}
    assert "mesh-ca" not in mounted


def test_without_them_nothing_is_made() -> None:
    assert render(CASES["nothing closed"]).of_kind("Secret") == []
    theirs = {**CASES["certificates of theirs"], **CASES["keys of theirs"]}
    assert render(theirs).of_kind("Secret") == []


def test_a_hub_token_in_the_values_becomes_a_secret() -> None:
    rendered = render(CASES["hub, token in the values"])
    assert rendered.get("Secret", "mesh-hub-token")["stringData"] == {"token": "hf_x"}
