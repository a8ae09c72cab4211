from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from coordinator.models.config import Config
from coordinator.models.names import EXPERTS, STANDARD
from coordinator.models.registry import FAMILIES, Family, check_families, describe
from coordinator.models.spec import Role
from protos.errors import ModelError


def family(name: str, architecture: str, names: Any) -> Family:
    return cast("Family", SimpleNamespace(__name__=name, ARCHITECTURES=(architecture,), NAMES=names))


def test_every_family_is_found() -> None:
    assert sorted(FAMILIES) == [
        "Glm4MoeForCausalLM",
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "OlmoeForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ]


def test_architecture_that_two_families_claim_is_refused() -> None:
    with pytest.raises(ImportError, match="XForCausalLM is claimed by one and two"):
        check_families([family("one", "XForCausalLM", STANDARD), family("two", "XForCausalLM", STANDARD)])


@pytest.mark.parametrize(
    "role", [Role.EMBEDDING, Role.O, Role.FEED_FORWARD_NORM, Role.UP, Role.K_BIAS, Role.EXPERT_DOWN, Role.ROUTER]
)
def test_family_without_a_needed_name_is_refused(role: Role) -> None:
    names = {key: name for key, name in {**STANDARD, **EXPERTS}.items() if key is not role}
    with pytest.raises(ImportError, match=rf"x\.NAMES lacks {role.name}"):
        check_families([family("x", "XForCausalLM", names)])


@pytest.mark.parametrize(
    ("architectures", "found"),
    [(["GptOssForCausalLM"], "'GptOssForCausalLM'"), ([], "none"), (None, "none"), (["A", "B"], "'A' and 'B'")],
)
def test_unknown_architecture_is_refused_with_the_known_ones(architectures: object, found: str) -> None:
    with pytest.raises(ModelError) as error:
        describe(Config("config.json", {"architectures": architectures}))
    assert str(error.value) == (
        f"config.json: architectures names {found}, which is not supported; supported are Glm4MoeForCausalLM, LlamaForCausalLM, "
        "MixtralForCausalLM, OlmoeForCausalLM, Qwen2MoeForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"
    )


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", [1], {"a": 1}])
def test_architectures_of_another_type_are_refused(architectures: object) -> None:
    with pytest.raises(ModelError, match="architectures must be a list of strings"):
        describe(Config("config.json", {"architectures": architectures}))
