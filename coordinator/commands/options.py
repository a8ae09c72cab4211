"""Flags that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from coordinator.config import DEVICES, DTYPES, QUANTIZATIONS, WIRES, ModelSettings

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")

device_option = click.option(
    "--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Of embedded workers."
)

_MODEL_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice(["auto", *DTYPES]),
        default="auto",
        show_default=True,
        help="Arithmetic; auto: the checkpoint's.",
    ),
    click.option(
        "--quantize",
        type=click.Choice(list(QUANTIZATIONS)),
        default="none",
        show_default=True,
        help="Matrices of the workers; the output head has at least 8 bits, routers, norms, biases and embedding stay whole.",
    ),
    click.option(
        "--load-format",
        type=click.Choice(["auto", "random"]),
        default="auto",
        show_default=True,
        help="random: only config.json is read.",
    ),
)


def model_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the flags that say how a model is kept."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


def mesh_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the flags that say how a mesh computes."""
    for option in (
        click.option("--kv-tokens", type=click.IntRange(min=1), help="Tokens of KV cache; default: 65536 or what fits."),
        click.option(
            "--wire",
            type=click.Choice(list(WIRES)),
            default="bf16",
            show_default=True,
            help="Activations between coordinator and workers.",
        ),
    ):
        command = option(command)
    return command


_PRIVATE_MESH_OPTIONS = (
    click.option("--model", required=True, help="Folder or hub id."),
    click.option("--shards", type=click.IntRange(min=1), default=1, show_default=True, help="Workers of the private mesh."),
    click.option("--threads", type=click.IntRange(1, 4096), help="Of each worker; default: the cores, shared evenly."),
    device_option,
    model_options,
    mesh_options,
)


def private_mesh_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add --model and the flags of a mesh that lives as long as the command."""
    for option in reversed(_PRIVATE_MESH_OPTIONS):
        command = option(command)
    return command


def model_settings(flags: dict[str, Any]) -> ModelSettings:
    """Make settings of the flags that `model_options` and `mesh_options` added, and of --model."""
    return ModelSettings(
        model=flags["model"],
        dtype=flags["dtype"],
        quantization=flags["quantize"],
        wire=flags["wire"],
        random_weights=flags["load_format"] == "random",
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
insecure_option = click.option("--insecure", is_flag=True, help="Allow TCP without TLS.")
