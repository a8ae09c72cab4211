"""Strict validation of rendered documents: Kubernetes' own schemas of a version, and hand-written ones of custom resources.

`crds.yaml` holds what this chart uses of each custom resource and nothing else. An unknown kind is an error, not a warning.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from referencing import Registry
from referencing.jsonschema import DRAFT7

from tests.helm.chart import Document

SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
CUSTOM = yaml.safe_load(Path(__file__).with_name("crds.yaml").read_text())
METADATA = "_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def errors(documents: list[Document], version: str) -> list[str]:
    """Everything that is wrong with them for a version of Kubernetes, as lines."""
    return [line for document in documents for line in _errors(document, version)]


def _errors(document: Document, version: str) -> list[str]:
    title = f"{document['kind']}/{document['metadata']['name']}"
    validator = _validator(document["apiVersion"], document["kind"], version)
    if validator is None:
        return [f"{title}: {document['apiVersion']} {document['kind']} is unknown to {version}"]
    return [
        f"{title}: {'/'.join(map(str, error.absolute_path))}: {error.message[:160]}" for error in validator.iter_errors(document)
    ]


@functools.cache
def _validator(api_version: str, kind: str, version: str) -> jsonschema.Draft7Validator | None:
    group, _, level = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.split(".")[0], level) if part)
    path = SCHEMAS / f"v{version}-local-strict" / f"{name}.json"
    if path.exists():
        schema = json.loads(path.read_text())
    elif spec := CUSTOM.get(f"{api_version} {kind}"):
        constants = {"apiVersion": {"const": api_version}, "kind": {"const": kind}}
        schema = closed({"properties": {**constants, "metadata": {"$ref": METADATA}, "spec": spec}, "required": ["spec"]})
    else:
        return None
    return jsonschema.Draft7Validator(schema, registry=_registry(version))


def closed(schema: Any) -> Any:
    """The same, with every object's properties named and no other allowed."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    return {"type": "object", "additionalProperties": False, **result} if isinstance(schema.get("properties"), dict) else result


@functools.cache
def _registry(version: str) -> Registry[Any]:
    definitions = json.loads((SCHEMAS / f"v{version}-local-strict" / "_definitions.json").read_text())
    resource = DRAFT7.create_resource(definitions)
    return Registry().with_resources([("_definitions.json", resource), ("https://kubernetes.io/api/_definitions.json", resource)])
