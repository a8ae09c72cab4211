"""What a wheel of this tree holds: everything that runs, the contract as text, and nothing of the tests."""

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protos", "coordinator", "shardworker")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves build folders behind.
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        "dist",
        ".",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (path,) = (folder / "dist").glob("*.whl")
    return zipfile.Path(path)


def test_a_wheel_holds_all_sources_protos_and_types(wheel: zipfile.Path) -> None:
    suffixes = {".py", ".pyi", ".proto", ".typed"}
    sources = {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*") if path.suffix in suffixes}
    packed = {name for name in wheel.root.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    compiled = {name for name in packed if name.startswith("shardworker/native/_operations.")} - sources
    assert len(compiled) == 1, "the tests' machine has a C compiler"
    assert packed - compiled == sources
    assert {f"{name}/py.typed" for name in PACKAGES} <= packed
    assert "protos/shardworker.proto" in packed


def test_a_wheel_installs_both_programs_and_the_licence(wheel: zipfile.Path) -> None:
    (entry_points,) = (name for name in wheel.root.namelist() if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(wheel.root.read(entry_points).decode())
    assert dict(parser["console_scripts"]) == {"coordctl": "coordinator.cli:main", "shardworker": "shardworker.cli:main"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.root.namelist())


@pytest.mark.parametrize("program", ["coordctl", "shardworker"])
def test_an_installed_program_tells_its_version(program: str) -> None:
    path = Path(sys.executable).parent / program
    result = subprocess.run([path, "--version"], check=True, capture_output=True, text=True)
    assert result.stdout == f"{program}, version 0.1.0\n"
    assert result.stderr == ""
