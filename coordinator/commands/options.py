"""Flags that several commands share."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from coordinator.client import Credentials
from coordinator.config import DEVICES, DTYPES, QUANTIZATIONS, WIRES, ModelSettings
from protos.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

P = ParamSpec("P")
R = TypeVar("R")


class Seconds(click.FloatRange):
    """Seconds on the command line: a number, and one that a clock can reach."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401  # click's
        """Read the number."""
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is no number of seconds", param, ctx)
        return seconds


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
    return _with(_MODEL_OPTIONS, command)


_MESH_OPTIONS = (
    click.option(
        "--wire",
        type=click.Choice(list(WIRES)),
        default="bf16",
        show_default=True,
        help="Activations between coordinator and workers.",
    ),
    click.option("--kv-tokens", type=click.IntRange(min=1), help="Tokens of KV cache; default: 65536 or what fits."),
)


def mesh_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the flags that say how a mesh computes."""
    return _with(_MESH_OPTIONS, command)


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
    return _with(_PRIVATE_MESH_OPTIONS, command)


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
insecure_option = click.option("--insecure", is_flag=True, help="Allow TCP without TLS, and callers that nobody knows.")
tls_option = click.option(
    "--tls",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with tls.crt, tls.key and ca.crt: TCP goes by TLS.",
)

API_KEY_VARIABLE = "SHARDMESH_API_KEY"

_CALLER_OPTIONS = (
    tls_option,
    click.option(
        "--api-key-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help=f"File with the API key alone; default: the environment's {API_KEY_VARIABLE}.",
    ),
    insecure_option,
)


def caller_options(command: Callable[P, R]) -> Callable[P, R]:
    """Add the flags of whoever calls a coordinator."""
    return _with(_CALLER_OPTIONS, command)


def caller_credentials(flags: dict[str, Any]) -> Credentials:
    """Make a caller's credentials of the flags that `caller_options` added, and of the environment.

    Raises:
        InvalidArgument: a file cannot be read, or holds no key or certificate.

    """
    certificates = None
    if flags["tls"]:
        # Who uses no TLS does not wait for its library.
        from protos.certificates import AUTHORITIES_FILE, Certificates  # noqa: PLC0415

        certificates = Certificates(flags["tls"], needs=(AUTHORITIES_FILE,))
    return Credentials(certificates, _api_key(flags["api_key_file"]))


def _api_key(path: Path | None) -> str | None:
    if path is None:
        origin, text = f"the environment's {API_KEY_VARIABLE}", os.environ.get(API_KEY_VARIABLE)
    else:
        origin = f"--api-key-file {path}"
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            raise InvalidArgument(f"{origin} cannot be read: {error.strerror}") from None
    if text is None:
        return None
    key = text.strip()
    # It goes into a header, which would otherwise fail with the key in the error's text.
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InvalidArgument(f"{origin} must hold one API key and nothing else")
    return key


def _with(options: Sequence[Callable[[Callable[P, R]], Callable[P, R]]], command: Callable[P, R]) -> Callable[P, R]:
    """Add options so that --help shows them in this order."""
    for option in reversed(options):
        command = option(command)
    return command
