"""docs/kubernetes.md: its values are values of the chart, its commands those of the programs and of NOTES.txt."""

import re

import pytest
import yaml

from tests.helm.chart import CHART, NEWEST, OLDEST, ROOT, Document, helm, render
from tests.helm.schemas import errors

PAGE = (ROOT / "docs" / "kubernetes.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def flattened(values: Document, path: str = "") -> Document:
    """As `render` takes them."""
    flat: Document = {}
    for key, value in values.items():
        # Keys with dots are the user's own, and so is what holds them.
        nested = isinstance(value, dict) and value and not any("." in name for name in value)
        flat |= flattened(value, f"{path}{key}.") if nested else {path + key: value}
    return flat


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.partition("\n")[0])
def test_values_on_the_page_are_values_of_the_chart(block: str) -> None:
    rendered = render(flattened(yaml.safe_load(block)))
    assert rendered.documents != render().documents
    for version in (OLDEST, NEWEST):
        assert errors(rendered.documents, version) == []


def test_the_page_has_values_for_many_tasks() -> None:
    assert len(BLOCKS) >= 8


def test_the_second_command_is_that_of_the_notes() -> None:
    notes = helm("install", "mesh", str(CHART), "--dry-run=client").stdout.partition("NOTES:")[2].replace(" -n default", "")
    (command,) = re.findall(r"    kubectl get secret mesh-caller-key .*?\n\n", PAGE, re.DOTALL)
    assert command in notes


def test_names_on_the_page_are_names_of_the_release() -> None:
    made = {document["metadata"]["name"] for document in render().documents}
    named = set(re.findall(r"\bmesh-[a-z]+(?:-[a-z]+)*\b", PAGE)) - {"mesh-model-"}
    assert named - made == set()


def test_values_named_in_the_text_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for path in re.findall(r"`((?:model|coordinator|worker|tls|networkPolicy|apiKeys)\.[A-Za-z.]+)`", PAGE):
        place = values
        for key in path.split("."):
            assert key in place, path
            place = place[key]


def test_images_on_the_page_are_those_of_the_chart() -> None:
    images = {container["image"] for _, template in render().workloads() for container in template["spec"]["containers"]}
    assert set(re.findall(r"\bshardmesh/\w+:[0-9.]+\d", PAGE)) == images
