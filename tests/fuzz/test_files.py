"""A model's folder whose files lie: headers, indices, configurations, tokenizers, and what stands in place of files."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from coordinator.config import ModelSettings
from coordinator.served_model import ServedModel
from protos.errors import MeshError
from tests.fuzz.campaign import fuzz, sent, watched
from tests.fuzz.mutation import TEXTS, WHOLE, mutate_bytes
from tests.fuzz.stack import PAGE_TOKENS, make_model

SPECIAL = (
    None,
    True,
    False,
    "",
    [],
    {},
    math.nan,
    math.inf,
    -1,
    -(2**63),
    10**30,
    0.5,
    1e308,
    -0.0,
    [[]] * 3,
    {"a": {}},
    *WHOLE,
    *TEXTS,
)
MOST = 2**20
"""Bytes of a changed tokenizer or configuration."""


class Folder:
    """A sound model's files, which are put back after each example."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.contents = {path.name: path.read_bytes() for path in directory.iterdir() if path.stat().st_size < MOST}
        self.weights = list(directory.glob("*.safetensors"))

    def open_with(self, name: str, content: bytes) -> None:
        path = self.directory / name
        path.write_bytes(content)
        try:
            open_model(self.directory, name)
        finally:
            path.unlink()
            if name in self.contents:
                path.write_bytes(self.contents[name])


def open_model(directory: Path, kind: str) -> None:
    """Read and plan as a coordinator does before it serves."""
    with watched():
        try:
            ServedModel.open(ModelSettings(str(directory))).plan(2, PAGE_TOKENS)
        except MeshError as error:
            sent[f"files, {kind}: {error.reason}"] += 1
            assert 0 < len(str(error)) < 5000
        else:
            sent[f"files, {kind}: opened"] += 1


@pytest.fixture(scope="module", params=["qwen3_moe_sharded", "glm4_moe_qk_norm"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    directory = tmp_path_factory.mktemp("model")
    make_model(request.param, directory)
    return Folder(directory)


def changed_json(random: Random, value: Any) -> Any:
    """Put something else in one place, at any depth."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(list(value))
        if random.random() < 0.1:
            return {other: item for other, item in value.items() if other != key}
        if random.random() < 0.05:
            return {**value, random.choice(TEXTS): value[key]}
        return {**value, key: changed_json(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        return [*value[:at], *([changed_json(random, value[at])] * random.choice((0, 1, 1, 1, 2))), *value[at + 1 :]]
    if isinstance(value, int) and random.random() < 0.6:
        return random.choice((value + 1, value - 1, value * 2, -value, value * 1000, *WHOLE))
    if random.random() < 0.05:
        deep: Any = value
        for _ in range(random.choice((50, 3000))):
            deep = [deep]
        return deep
    return copy.deepcopy(random.choice(SPECIAL))


@fuzz(0.015)
def test_changed_configurations_are_read_or_refused(folder: Folder, number: int) -> None:
    random = Random(number)
    names = [name for name in folder.contents if name.endswith(".json")]
    name = random.choice((*names, "config.json", "config.json", "generation_config.json"))
    content = folder.contents.get(name, b'{"eos_token_id": [2]}')
    if random.random() < 0.7:
        value = json.loads(content)
        for _ in range(random.choice((1, 1, 2))):
            value = changed_json(random, value)
        try:
            content = json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
        except RecursionError:
            content = b"[" * 5000
    else:
        content = mutate_bytes(random, content)
    folder.open_with(name, content)


@fuzz(0.015)
def test_changed_headers_are_read_or_refused(folder: Folder, number: int) -> None:
    random = Random(number)
    path = random.choice(folder.weights)
    kept = path.rename(path.with_suffix(".kept"))
    with kept.open("rb") as file:
        prefix = file.read(8)
        header = file.read(int.from_bytes(prefix, "little"))
    data_bytes = kept.stat().st_size - len(prefix) - len(header)
    if random.random() < 0.7:
        value = json.loads(header)
        for _ in range(random.choice((1, 1, 2))):
            value = changed_json(random, value)
        try:
            header = json.dumps(value).encode()
        except RecursionError:
            header = b"[" * 5000
        prefix = (len(header) if random.random() < 0.9 else random.choice(WHOLE)).to_bytes(8, "little")
    else:
        changed = mutate_bytes(random, prefix + header)
        prefix, header = changed[:8], changed[8:]
    path.write_bytes(prefix + header)
    # The data are never read: a hole will do.
    os.truncate(
        path, len(prefix) + len(header) + (data_bytes if random.random() < 0.9 else random.choice((0, 1, data_bytes - 1)))
    )
    try:
        open_model(folder.directory, "header")
    finally:
        kept.rename(path)


ODD_FILES: dict[str, Any] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a secret": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "an empty file": Path.touch,
}


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_what_is_no_file_is_passed_over_or_refused(folder: Folder, tmp_path: Path, name: str, odd: str) -> None:
    for path in folder.directory.iterdir():
        if path.name != name:
            (tmp_path / path.name).hardlink_to(path)
    ODD_FILES[odd](tmp_path / name)
    open_model(tmp_path, "no file")
