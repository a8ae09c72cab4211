"""The Job that fills the claim: its program, run as the Job runs it, against a library that only says what it was asked for."""

import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from tests.helm.chart import ROOT, render

LIBRARY = """
import json, pathlib

def snapshot_download(model, *, revision, local_dir, allow_patterns, ignore_patterns):
    if model == "nobody/nothing":
        raise ValueError("no such\\nmodel")
    folder = pathlib.Path(local_dir)
    folder.mkdir(parents=True)
    (folder / "asked.json").write_text(json.dumps([model, revision, allow_patterns, ignore_patterns]))
"""


@pytest.fixture
def fetch(tmp_path: Path) -> list[str]:
    """The command line without the model."""
    (tmp_path / "huggingface_hub.py").write_text(LIBRARY)
    (container,) = render().pod("model")["containers"]
    assert container["command"] == ["python", "-c"]
    return [sys.executable, "-c", container["args"][0]]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)


def test_a_model_is_fetched_once_into_a_folder_that_is_marked_last(fetch: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "owner" / "name" / "main"
    done = run([*fetch, "owner/name", "main", str(folder)], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    asked = (folder / "asked.json").read_text()
    assert asked.startswith('["owner/name", "main", ["*.json"')
    assert '"*.safetensors"' in asked
    assert (folder / ".complete").exists()
    (folder / "asked.json").unlink()
    assert run([*fetch, "owner/name", "main", str(folder)], tmp_path).returncode == 0
    assert not (folder / "asked.json").exists()


def test_a_failed_try_leaves_its_log() -> None:
    (job,) = render().of_kind("Job")
    # With OnFailure the pod, and its log, would go with the last failure.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_revisions_have_folders_of_their_own() -> None:
    revisions = ["a/b", "a-b", "a", "a_b", "a.b"]
    folders = [render({"model.revision": revision}).pod("model")["containers"][0]["args"][-1] for revision in revisions]
    assert len({PurePosixPath(folder) for folder in folders}) == len(revisions)
    assert len({PurePosixPath(folder).parent for folder in folders}) == 1


def test_what_cannot_be_fetched_is_said_in_one_line_and_marks_nothing(fetch: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    done = run([*fetch, "nobody/nothing", "main", str(folder)], tmp_path)
    assert done.returncode == 1
    assert done.stderr == "nobody/nothing at main cannot be fetched: no such model\n"
    assert not folder.exists()
