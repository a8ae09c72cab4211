"""The architecture, as tests over the sources: where imports may point, how big things may be, what must not occur."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protos", "coordinator", "shardworker")

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
# 200 of them are how both sides read a checkpoint's headers: a file must not be sound to one and damaged to the other.
# 350 are what both servers do about strangers: certificates, their reloading, the guard around a call, health for probes.
# 150 are how both daemons serve metrics.
MAX_PROTOS_LINES = 1700

# A name imports only from floors beneath its own; a folder named here is one notion, free within itself but for cycles.
COORDINATOR_FLOORS = (
    "channel certificates api_keys heat trace_context discovery attempts workers.supplier",
    "rounds recovery config request pages scores reduce client embedded text models gguf_import workers.client commands.running",
    "sequence sampler router resident fanout planning commands.options commands.console",
    "workers.loading workers.roster workers.assignment",
    "scheduler completion head served_model access workers.pool",
    "microbatches workers.warming",
    "forward progress intake observer tally",
    "mesh",
    "canary metrics span_attributes",
    "engine spans",
    "proof",
    "resharding",
    "supervisor status tracing",
    "service exposition",
    "telemetry",
    "app",
    "private_mesh",
    "bench",
    "commands",
    "cli",
    "__main__",
)
SHARDWORKER_FLOORS = (
    "peers lease tally memory bandwidth plan tables safetensors_file executor kernels",
    "weights kv source",
    "supply",
    "loader shard",
    "operands",
    "session",
    "loading",
    "holding",
    "service exposition",
    "app",
    "cli",
    "__main__",
)

WITHOUT_TORCH = (
    "coordinator.scheduler",
    "coordinator.pages",
    "coordinator.request",
    "coordinator.sequence",
    "coordinator.planning",
    "coordinator.bench",
    "coordinator.commands.bench",
    "coordinator.commands.profile",
    "protos.errors",
    "protos.rpc",
    "protos.log",
    "protos.listen",
    "shardworker.cli",
)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_generated(path: Path) -> bool:
    return path.stem.endswith(("_pb2", "_pb2_grpc"))


SOURCES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}
WRITTEN = {name: path for name, path in SOURCES.items() if not is_generated(path)}
TREES = {name: ast.parse(path.read_text()) for name, path in WRITTEN.items()}


def imported(node: ast.AST) -> Iterator[str]:
    """Modules that an import statement names; of `from package import module`, the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        for alias in node.names:
            full_name = f"{node.module}.{alias.name}"
            yield full_name if full_name in SOURCES else str(node.module)


def all_imports(name: str) -> set[str]:
    """Every module that a module names anywhere, for types too."""
    return {target for node in ast.walk(TREES[name]) for target in imported(node)}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def run_time_imports(name: str) -> set[str]:
    """Modules that are imported when a module is, directly; its own packages and those of its imports included."""
    found, waiting = {name}, list(ast.iter_child_nodes(TREES[name]))
    while waiting:
        node = waiting.pop()
        found.update(imported(node))
        if not is_type_checking(node) and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return {".".join(parts[: length + 1]) for parts in (target.split(".") for target in found) for length in range(len(parts))}


def reached_at_run_time(name: str) -> set[str]:
    reached, waiting = set(), [name]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += run_time_imports(module) if module in TREES else ()
    return reached


def of_package(package: str) -> list[str]:
    return [name for name in WRITTEN if name == package or name.startswith(f"{package}.")]


def floor_entry(floors: tuple[str, ...], name: str) -> tuple[int, str] | None:
    """Floor and name there of a module, by the longest name that fits: `commands.options` before `commands`."""
    own = name.partition(".")[2]
    entries = [(number, entry) for number, floor in enumerate(floors) for entry in floor.split()]
    fitting = [(number, entry) for number, entry in entries if own == entry or own.startswith(f"{entry}.")]
    return max(fitting, key=lambda found: len(found[1]), default=None)


@pytest.mark.parametrize(("package", "allowed"), [("protos", "protos"), ("coordinator", "protos"), ("shardworker", "protos")])
def test_the_services_meet_only_in_protos(package: str, allowed: str) -> None:
    targets = {(name, target) for name in of_package(package) for target in all_imports(name)}
    assert targets
    wrong = {(name, target) for name, target in targets if target.split(".")[0] in set(PACKAGES) - {package, allowed}}
    assert wrong == set()


@pytest.mark.parametrize(("package", "floors"), [("coordinator", COORDINATOR_FLOORS), ("shardworker", SHARDWORKER_FLOORS)])
def test_imports_point_down_from_floor_to_floor(package: str, floors: tuple[str, ...]) -> None:
    wrong = []
    for name in of_package(package):
        here = floor_entry(floors, name)
        for target in sorted(all_imports(name)):
            there = floor_entry(floors, target) if target.startswith(f"{package}.") else None
            if there and (here is None or not (there[0] < here[0] or there[1] == here[1])):
                wrong.append(f"{name} -> {target}")
    assert wrong == []


@pytest.mark.parametrize(("package", "floors"), [("coordinator", COORDINATOR_FLOORS), ("shardworker", SHARDWORKER_FLOORS)])
def test_every_module_has_a_floor_and_every_floor_modules(package: str, floors: tuple[str, ...]) -> None:
    entries = {name: floor_entry(floors, name) for name in of_package(package)}
    packages = {name for name, path in WRITTEN.items() if path.name == "__init__.py"}
    assert {name for name, entry in entries.items() if entry is None} <= packages
    assert {entry[1] for entry in entries.values() if entry} == {entry for floor in floors for entry in floor.split()}


def test_no_import_goes_round_in_a_circle() -> None:
    imports = {name: all_imports(name) & WRITTEN.keys() - {name} for name in WRITTEN}
    while leaves := {name for name, targets in imports.items() if not targets & imports.keys()}:
        imports = {name: targets for name, targets in imports.items() if name not in leaves}
    assert imports == {}


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_what_only_decides_never_imports_torch(package: str) -> None:
    modules = of_package(package)
    assert modules
    for name in modules:
        reached = reached_at_run_time(name)
        assert not {module for module in reached if module.split(".")[0] == "torch"}, f"{name} imports torch"


@pytest.mark.parametrize(
    "name", ["coordinator.app", "coordinator.private_mesh", "coordinator.commands.generate", "shardworker.app"]
)
def test_who_uses_no_tls_does_not_wait_for_its_library(name: str) -> None:
    assert not any(module.split(".")[0] == "cryptography" for module in reached_at_run_time(name))
    assert "cryptography" in {module.split(".")[0] for module in reached_at_run_time("protos.certificates")}


def test_who_sends_no_traces_needs_no_library_for_them() -> None:
    needing = {name for name in WRITTEN if any(target.split(".")[0] == "opentelemetry" for target in all_imports(name))}
    assert needing == {"coordinator.spans", "coordinator.tracing"}
    assert not needing & reached_at_run_time("coordinator.__main__")


def test_the_search_for_torch_finds_it_where_it_is() -> None:
    assert "torch" in reached_at_run_time("coordinator.forward")
    assert "torch" in reached_at_run_time("shardworker.app")


def test_transformers_is_for_tests_only() -> None:
    assert [name for name in WRITTEN if any(target.split(".")[0] == "transformers" for target in all_imports(name))] == []


FORBIDDEN = ("pickle", "cPickle", "dill", "marshal", "shelve", "torch.load", "eval", "exec", "torch.hub.load")


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        # As a call: `model.eval()` would be another thing.
        names = {dotted(node.func)} if isinstance(node, ast.Call) else set(imported(node))
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        yield from (name for name in names if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN[:5])


@pytest.mark.parametrize("name", WRITTEN)
def test_no_file_runs_what_it_reads(name: str) -> None:
    assert list(forbidden_in(TREES[name])) == []


@pytest.mark.parametrize(
    "source", ["import pickle", "from torch import load", "torch.load(p)", "eval(x)", "import pickle as p", "pickle.loads(b)"]
)
def test_the_search_for_forbidden_things_finds_them(source: str) -> None:
    assert list(forbidden_in(ast.parse(source)))


def test_files_are_small() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in WRITTEN.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_small() -> None:
    functions = {
        f"{name}.{node.name}": int(node.end_lineno or 0) - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in functions.items() if length > MAX_FUNCTION_LINES} == {}


def test_the_contract_stays_small() -> None:
    assert sum(len(WRITTEN[name].read_text().splitlines()) for name in of_package("protos")) <= MAX_PROTOS_LINES


@pytest.mark.parametrize("name", WRITTEN)
def test_every_module_says_what_it_is(name: str) -> None:
    if TREES[name].body:
        assert ast.get_docstring(TREES[name])


def test_git_ignores_no_source() -> None:
    patterns = (ROOT / ".gitignore").read_text().split()
    anywhere = [pattern.rstrip("/") for pattern in patterns if not pattern.startswith("/")]
    paths = [path.relative_to(ROOT) for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > len(WRITTEN)
    assert [path for path in paths if any(fnmatch(part, pattern) for part in path.parts for pattern in anywhere)] == []


def test_the_readme_names_every_file_and_folder_of_the_top_level() -> None:
    ignored = [pattern.strip("/") for pattern in (ROOT / ".gitignore").read_text().split()]
    entries = {
        path.name
        for path in ROOT.iterdir()
        if path.name != ".git" and not any(fnmatch(path.name, pattern) for pattern in ignored)
        # git keeps no empty folders.
        if path.is_file() or any(path.iterdir())
    }
    tree = re.search(r"## The tree\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert tree
    named = {line.split()[0].rstrip("/") for line in tree[1].splitlines() if line and not line.startswith(" ")}
    assert named == entries
