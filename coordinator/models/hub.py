"""From what a person calls a model to a folder: a local one as it is, a Hugging Face hub id downloaded.

Only what is needed is fetched: JSON, tokenizer, chat template and safetensors, never pickles or another format's weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from protos.errors import ModelError

CONFIG_PATTERNS = ("*.json", "*.jinja", "tokenizer.model")
"""Enough to plan with random weights."""
WEIGHT_PATTERNS = ("*.safetensors",)
IGNORED_PATTERNS = ("original/*", "*/*", "consolidated*.safetensors")
"""Copies of the weights in other layouts."""

# As the hub itself demands: no leading or trailing dot or dash, none of them twice, at most 96 characters a part.
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9_][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII)


def resolve(model: str, *, weights: bool = True) -> Path:
    """Find the folder of a model, downloading it where `model` is a hub id; files already in the hub's cache are reused.

    Args:
        model: path of a folder, or "owner/name".
        weights: whether to fetch the weights too.

    Raises:
        ModelError: neither a folder nor a hub id; unknown, gated or unreachable on the hub.

    """
    path = Path(model)
    if model and path.is_dir():
        return path
    if model and path.exists():
        raise ModelError(f"{model} is a file: a model is a folder with config.json and safetensors files, or a hub id")
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model!r} is neither an existing folder nor a hub id like owner/name")
    return _download(model, weights=weights)


def _download(model: str, *, weights: bool) -> Path:
    # Takes a third of a second to import, which local models need not wait for.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [*CONFIG_PATTERNS, *(WEIGHT_PATTERNS if weights else ())]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=list(IGNORED_PATTERNS)))
    except GatedRepoError as error:
        raise ModelError(f"{model} is gated: accept its terms on the hub and log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{model} is neither an existing folder nor a public model on the hub") from error
    except HFValidationError as error:
        raise ModelError(f"{model!r} is neither an existing folder nor a hub id like owner/name") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(f"{model} is no folder here, and the hub cannot be reached to download it") from error
    except Exception as error:  # the library lets errors of its transport through, of classes that change
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{model} cannot be downloaded from the hub: {first_line}") from error
