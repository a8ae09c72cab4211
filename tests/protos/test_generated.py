"""The .proto files explain themselves, and the generated code is theirs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc_tools
import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.name for path in (ROOT / "protos").glob("*.proto"))
WITH_SERVICE = [name for name in NAMES if "\nservice " in (ROOT / "protos" / name).read_text()]
# Field numbers of descriptor.proto, which paths in its SourceCodeInfo are made of.
FIELDS_OF = {
    descriptor_pb2.FileDescriptorProto: {"message_type": 4, "enum_type": 5, "service": 6},
    descriptor_pb2.DescriptorProto: {"field": 2, "nested_type": 3, "enum_type": 4},
    descriptor_pb2.EnumDescriptorProto: {"value": 2},
    descriptor_pb2.ServiceDescriptorProto: {"method": 2},
}


def run_protoc(names: Sequence[str], *flags: str) -> None:
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{ROOT}", f"-I{well_known}", *flags, *(f"protos/{name}" for name in names)]
    assert protoc.main(arguments) == 0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    path = tmp_path_factory.mktemp("protos") / "descriptors"
    run_protoc(NAMES, "--include_source_info", f"--descriptor_set_out={path}")
    return list(descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file)


def elements(parent: Any, path: tuple[int, ...] = (), name: str = "") -> Iterator[tuple[tuple[int, ...], Any, str]]:
    for kind, number in FIELDS_OF.get(type(parent), {}).items():
        for index, element in enumerate(getattr(parent, kind)):
            here, full_name = (*path, number, index), f"{name}.{element.name}"
            yield here, element, full_name
            # What protoc makes of a map is written by nobody.
            if kind != "nested_type" or not element.options.map_entry:
                yield from elements(element, here, full_name)


def test_every_field_enum_value_service_and_method_has_a_comment(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    seen, missing = 0, []
    for file in files:
        places = file.source_code_info.location
        comments = {tuple(place.path): place.leading_comments + place.trailing_comments for place in places}
        for path, element, name in elements(file):
            # A message may speak through its fields.
            if not isinstance(element, descriptor_pb2.DescriptorProto):
                seen += 1
                missing += [] if comments.get(path, "").strip() else [f"{file.name}: {name[1:]}"]
    assert missing == []
    assert seen > 200


def test_every_enum_begins_with_an_unspecified_value(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    firsts = [enum.value[0].name for file in files for enum in file.enum_type]
    assert len(firsts) >= 5
    assert all(name.endswith("_UNSPECIFIED") for name in firsts)


def test_every_method_has_a_request_and_a_response_of_its_own(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    methods = [method for file in files for service in file.service for method in service.method]
    assert {(method.input_type, method.output_type) for method in methods} == {
        (f".shardmesh.v1.{method.name}Request", f".shardmesh.v1.{method.name}Response") for method in methods
    }
    assert {file.package for file in files} == {"shardmesh.v1"}


def test_the_committed_code_is_what_the_protos_generate(tmp_path: Path) -> None:
    run_protoc(NAMES, f"--python_out={tmp_path}", f"--pyi_out={tmp_path}")
    run_protoc(WITH_SERVICE, f"--grpc_python_out={tmp_path}")
    fresh = {path.name: path.read_text() for path in (tmp_path / "protos").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "protos").glob("*_pb2*") if path.is_file()}
    assert committed.keys() == fresh.keys()
    assert [name for name in fresh if fresh[name] != committed[name]] == [], "run `make protos`"
