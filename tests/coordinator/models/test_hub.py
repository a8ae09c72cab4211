from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from coordinator.models.hub import resolve
from protos.errors import ModelError


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def download(model: str, **settings: Any) -> str:
        calls.append({"model": model, **settings})
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def wanted(call: dict[str, Any], names: list[str]) -> list[str]:
    return list(
        huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=call["allow_patterns"], ignore_patterns=call["ignore_patterns"]
        )
    )


def test_local_folder_is_taken_as_it_is(tmp_path: Path, downloads: list[dict[str, Any]]) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert not downloads


def test_only_needed_files_are_downloaded(tmp_path: Path, downloads: list[dict[str, Any]]) -> None:
    assert resolve("owner/some-model_1.5") == tmp_path / "snapshot"
    needed = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
    ]
    useless = [
        "pytorch_model.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "original/params.json",
        "original/model.safetensors",
        "onnx/model.onnx",
        "model-Q4_0.gguf",
        "modeling_glm.py",
        "README.md",
        ".gitattributes",
    ]
    assert wanted(downloads[0], needed + useless) == needed


def test_weights_may_be_left_out(downloads: list[dict[str, Any]]) -> None:
    resolve("owner/model", weights=False)
    assert wanted(downloads[0], ["config.json", "model.safetensors"]) == ["config.json"]


@pytest.mark.parametrize(
    "model",
    [
        "",
        "/no/such/folder",
        "../x",
        "owner/../../etc",
        "owner/name/more",
        "~/model",
        "./model",
        "a//b",
        "a b/c",
        "x\n",
        "-a/b",
        "a/b-",
        "a--b/c",
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str, downloads: list[dict[str, Any]]) -> None:
    with pytest.raises(ModelError, match="is neither an existing folder nor a hub id like owner/name") as error:
        resolve(model)
    assert "\n" not in str(error.value)
    assert not downloads


def test_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(ModelError, match=r"model\.gguf is a file: a model is a folder"):
        resolve(str(path))


class _Response:
    """As much of an HTTP answer as the library's errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError("no\nway", response=_Response()), "owner/name is gated: accept its terms on the hub and log in"),
        (
            errors.RepositoryNotFoundError("no\nway", response=_Response()),
            "neither an existing folder nor a public model on the hub",
        ),
        (errors.LocalEntryNotFoundError("no\nway"), "is no folder here, and the hub cannot be reached to download it"),
        (errors.HFValidationError("no\nway"), "is neither an existing folder nor a hub id like owner/name"),
        (errors.HfHubHTTPError("500 error\nway", response=_Response()), "cannot be downloaded from the hub: 500 error$"),
        (OSError(28, "No space left on device"), "cannot be downloaded from the hub: .*No space left on device"),
        (RuntimeError(), "cannot be downloaded from the hub: RuntimeError$"),
    ],
)
def test_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=message) as caught:
        resolve("owner/name")
    assert "\n" not in str(caught.value)
