"""What can be said of the Dockerfiles, the compose file and .dockerignore without building anything."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = {name: (ROOT / name / "Dockerfile").read_text() for name in ("coordinator", "shardworker")}
PROGRAMS = {"coordinator": "coordctl", "shardworker": "shardworker"}
COMPOSE = yaml.safe_load((ROOT / "docs" / "compose.yaml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def stages(dockerfile: str) -> dict[str, str]:
    """Stages by name, the last one as ``; comments, continued lines and the blank ones between do not count."""
    lines = [line for line in dockerfile.splitlines() if line and not line.lstrip().startswith("#")]
    parts = re.split(r"^(?=FROM )", "\n".join(lines), flags=re.MULTILINE)[1:]
    named = ((re.match(r"FROM \S+(?: AS (\S+))?", part), part) for part in parts)
    return {(match and match[1]) or "": part for match, part in named}


@pytest.mark.parametrize("stage", ["packages", "tools", "libraries"])
def test_both_images_share_the_layers_of_the_libraries(stage: str) -> None:
    first, second = (stages(text)[stage] for text in DOCKERFILES.values())
    assert first == second


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_one_program_as_nobody_in_particular(name: str) -> None:
    final = stages(DOCKERFILES[name])[""]
    assert f'ENTRYPOINT ["{PROGRAMS[name]}"]' in final
    assert "STOPSIGNAL SIGTERM" in final
    # By number: Kubernetes cannot tell whether a name is root.
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", final, re.MULTILINE)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_code_comes_after_whatever_is_downloaded(name: str) -> None:
    by_name = stages(DOCKERFILES[name])
    assert "COPY . " in by_name["builder"]
    assert [stage for stage, text in by_name.items() if re.search(r"^COPY (?!--from|pyproject)", text, re.MULTILINE)] == [
        "builder"
    ]
    assert re.match(r"FROM (libraries|coordinator)\nCOPY --from=builder ", by_name[""])
    assert "pip install" not in by_name[""]


def test_a_build_is_given_only_what_a_wheel_is_made_of() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {"coordinator", "protos", "shardworker", "LICENSE", "README.md", "pyproject.toml"}
    assert {"**/*.so", "**/__pycache__"} <= set(lines)


def test_the_torch_of_the_images_is_that_of_the_environment() -> None:
    (torch,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for text in DOCKERFILES.values():
        assert f"ARG TORCH={torch}\n" in text


def test_the_compose_file_runs_this_version_closed_and_within_reach_of_this_machine_only() -> None:
    services = COMPOSE["services"]
    assert len(services) == 3
    for name, service in services.items():
        image = "coordinator" if name == "coordinator" else "worker"
        assert service["image"] == f"shardmesh/{image}:${{TAG:-{PROJECT['version']}}}"
        assert service["pull_policy"] == "never"
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert all(volume.endswith(":ro") for volume in service["volumes"])
        assert service["networks"] == (["mesh", "callers"] if name == "coordinator" else ["mesh"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert COMPOSE["networks"]["mesh"] == {"internal": True}
    named = next(word for word in services["coordinator"]["command"] if word.startswith("--workers="))
    assert named.removeprefix("--workers=").split(",") == [f"{name}:7001" for name in services if name != "coordinator"]
