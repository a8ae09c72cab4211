"""The families: every module of this package that states `ARCHITECTURES`, checked once when this one is imported."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Protocol, cast

import coordinator.models
from coordinator.models.spec import Role
from protos.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coordinator.models.config import Config
    from coordinator.models.spec import ModelSpec

_ALWAYS = frozenset(
    {
        Role.EMBEDDING,
        Role.FINAL_NORM,
        Role.HEAD,
        Role.ATTENTION_NORM,
        Role.Q,
        Role.K,
        Role.V,
        Role.O,
        Role.FEED_FORWARD_NORM,
    }
)
_TOGETHER = (
    frozenset({Role.GATE, Role.UP, Role.DOWN}),
    frozenset({Role.ROUTER, Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN}),
    frozenset({Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN}),
    frozenset({Role.Q_NORM, Role.K_NORM}),
    frozenset({Role.Q_BIAS, Role.K_BIAS, Role.V_BIAS}),
)
"""Sets of roles of which a family names all or none."""


class Family(Protocol):
    """What a family's module holds."""

    __name__: str
    ARCHITECTURES: tuple[str, ...]
    """Values of `architectures` in config.json."""
    NAMES: Mapping[Role, str]
    """Checkpoint name of every role that a model of the family may have."""

    def describe(self, config: Config) -> ModelSpec:
        """Make the spec of a config."""


def describe(config: Config) -> ModelSpec:
    """Make the spec of a model.

    Raises:
        ModelError: no supported architecture, or a value that is missing, out of range or not supported.

    """
    named = config.texts("architectures")
    for architecture in named:
        if architecture in FAMILIES:
            return FAMILIES[architecture].describe(config)
    found = " and ".join(repr(name) for name in named[:3]) or "none"
    raise ModelError(
        f"{config.source}: architectures names {found}, which is not supported; supported are {', '.join(sorted(FAMILIES))}"
    )


def find_families() -> dict[str, Family]:
    """Import every module of the package and collect the families among them by architecture."""
    modules = (
        importlib.import_module(info.name) for info in pkgutil.iter_modules(coordinator.models.__path__, "coordinator.models.")
    )
    return check_families(cast("Family", module) for module in modules if hasattr(module, "ARCHITECTURES"))


def check_families(modules: Iterable[Family]) -> dict[str, Family]:
    """Collect families by architecture.

    Raises:
        ImportError: an architecture is claimed twice, or a role without which there is no model has no name.

    """
    families: dict[str, Family] = {}
    for module in modules:
        _check_roles(module)
        for architecture in module.ARCHITECTURES:
            if architecture in families:
                raise ImportError(f"{architecture} is claimed by {families[architecture].__name__} and {module.__name__}")
            families[architecture] = module
    return families


def _check_roles(module: Family) -> None:
    named = frozenset(module.NAMES)
    missing = _ALWAYS - named
    for together in _TOGETHER:
        if named & together:
            missing |= together - named
    if missing:
        raise ImportError(f"{module.__name__}.NAMES lacks {', '.join(sorted(role.name for role in missing))}")


FAMILIES = find_families()
"""Family by architecture."""
