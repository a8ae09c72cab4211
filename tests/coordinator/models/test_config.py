from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from coordinator.models.config import MAX_FILE_BYTES, Config, read_config, read_stop_ids
from protos.errors import ModelError


def config(**values: Any) -> Config:
    return Config("config.json", values)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (True, "true"),
        (-1, "-1"),
        (0, "0"),
        (2**24 + 1, "16777217"),
        (10**400, "1000"),
        pytest.param(10**5000, "a number of thousands of digits", id="digits"),
        (1.0, "1.0"),
        ("8", '"8"'),
        ([8], "[8]"),
        ({}, "{}"),
        (float("nan"), "NaN"),
    ],
)
def test_integer_that_is_none_is_refused(value: object, found: str) -> None:
    with pytest.raises(ModelError) as error:
        config(layers=value).integer("layers")
    assert str(error.value).startswith(f"config.json: layers must be an integer in [1, 16777216], found {found}")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), float("-inf"), -1, 0, 10**400, 1e31, [1.0], {}])
def test_number_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ModelError, match=r"^config\.json: eps must be a number > 0 and <= 1e\+30, found "):
        config(eps=value).number("eps")


@pytest.mark.parametrize("value", [0, 1, "true", [], {}])
def test_boolean_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ModelError, match=r"^config\.json: tied must be true or false, found "):
        config(tied=value).boolean("tied")


@pytest.mark.parametrize("value", [True, -1, 2**31, "2", [2, "3"], [2, None], {"a": 1}, 1.5])
def test_token_ids_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(ModelError, match=r"eos must be an integer in \[0, 16777216\] or a list of them"):
        config(eos=value).integers("eos")


def test_values_are_read() -> None:
    found = config(a=3, b=2.5, c=True, d="x", e=[1, 2], f=7, g={"k": 1}, h=["x"], n=None)
    assert found.integer("a") == 3
    assert found.number("b") == 2.5
    assert found.number("a") == 3.0
    assert found.boolean("c") is True
    assert found.text("d") == "x"
    assert found.integers("e") == (1, 2)
    assert found.integers("f") == (7,)
    assert found.texts("h") == ("x",)
    section = found.section("g")
    assert section
    assert section.integer("k") == 1
    assert section.source == "config.json: g"


def test_endless_names_are_refused_in_few_words() -> None:
    found = config(a="x" * 10**6, b=["x" * 10**6], c=3, d=[3])
    for read, key in ((found.text, "a"), (found.texts, "b"), (found.text, "c"), (found.texts, "d")):
        with pytest.raises(ModelError, match="of up to 256 characters, found") as raised:
            read(key)
        assert len(str(raised.value)) < 200


def test_a_pipe_in_place_of_a_config_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ModelError, match="is not a regular file"):
        read_stop_ids(tmp_path)


def test_null_is_absent() -> None:
    found = config(n=None)
    assert not found.has("n")
    assert found.integer("n", default=4) == 4
    assert found.section("n") is None
    assert found.integers("n") == ()
    with pytest.raises(ModelError, match=r"^config\.json: n is missing, it must be an integer in \[1, 16777216\]$"):
        found.integer("n")


def test_second_spelling_counts_where_the_first_is_absent() -> None:
    assert config(num_local_experts=8).integer("num_experts", "num_local_experts") == 8
    assert config(num_experts=4, num_local_experts=8).integer("num_experts", "num_local_experts") == 4
    with pytest.raises(ModelError, match=r"num_experts or num_local_experts is missing"):
        config().integer("num_experts", "num_local_experts")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_has_two_spellings(key: str) -> None:
    assert config(**{key: "bfloat16"}).dtype == "bfloat16"
    assert config().dtype is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "a": 2}', 'key "a" occurs twice'),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not valid JSON"),
        (b"[]", r"must hold a JSON object, found \[\]"),
        (b"null", "must hold a JSON object, found null"),
    ],
)
def test_damaged_config_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=message) as error:
        read_config(tmp_path)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_overflowing_number_is_refused_where_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"rope_theta": 1e999}')
    with pytest.raises(ModelError, match="rope_theta must be a number"):
        read_config(tmp_path).number("rope_theta")


def test_huge_config_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ModelError, match="bytes are too many, at most 16777216"):
        read_config(tmp_path)


def test_missing_folder_and_config_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        read_config(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("generation", "model", "found"),
    [
        (None, 2, (2,)),
        (None, [2, 3], (2, 3)),
        (None, None, ()),
        ({}, 2, (2,)),
        ({"eos_token_id": None}, 2, (2,)),
        ({"eos_token_id": 5}, 2, (5,)),
        ({"eos_token_id": [7, 5, 7]}, 2, (7, 5)),
        ({"eos_token_id": 0}, 2, (0,)),
    ],
)
def test_stop_ids_come_from_the_generation_config_first(
    tmp_path: Path, generation: dict[str, Any] | None, model: object, found: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": model}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_stop_ids(tmp_path) == found


def test_damaged_generation_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelError, match=r'^generation_config\.json: eos_token_id must be .*, found "</s>"'):
        read_stop_ids(tmp_path)
