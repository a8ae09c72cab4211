"""The import as a whole: a folder that is either complete or not there.

Everything is written to a folder beside the wanted one and renamed at the end. What an interrupted import left there is swept
away by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from coordinator.gguf_import.config import generation_config, model_config, read_dimensions
from coordinator.gguf_import.header import GgufFile, read_gguf
from coordinator.gguf_import.safetensors import write_checkpoint
from coordinator.gguf_import.tokenizer import tokenizer_files
from coordinator.gguf_import.weights import read_values, weights
from protos.errors import InvalidArgument, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RECORD = "gguf_import.json"
"""What a folder was made from, and what belongs to it."""

MAX_FILE_BYTES = 4 * 10**9

_DTYPES = {"f32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16), "f16": ("F16", torch.float16)}
_LOCK = "import.lock"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import has made, or found made already."""

    architecture: str
    layers: int
    num_tensors: int
    num_bytes: int
    """Of the weights."""
    fresh: bool
    """False if the folder was there already."""


def import_gguf(
    file: Path,
    directory: Path,
    *,
    dtype: str = "f32",
    progress: Callable[[int, int], None] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Imported:
    """Turn a llama-family GGUF into a Hugging Face folder.

    Args:
        file: the GGUF.
        directory: the folder to make; absent or empty, or an earlier import of the same file, which is left as it is.
        dtype: of the weights: "f32" (exactly what the quantized ones stand for), "bf16" or "f16".
        progress: told the bytes of weights written so far, and of all.
        max_file_bytes: of one safetensors file.

    Raises:
        ModelError: the file cannot be imported.
        InvalidArgument: the folder cannot be used.

    """
    source = read_gguf(file)
    origin = {"sha256": _digest(source), "dtype": dtype}
    if (earlier := _earlier(directory, origin)) is not None:
        return earlier
    with _partial(directory) as partial:
        made = _write(source, partial, dtype, progress, max_file_bytes)
        _write_record(partial, origin, made)
    return made


def _write(
    source: GgufFile, directory: Path, dtype: str, progress: Callable[[int, int], None] | None, max_file_bytes: int
) -> Imported:
    dimensions = read_dimensions(source)
    config = model_config(source, dimensions, dtype)
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(generation_config(source), indent=2) + "\n",
        **tokenizer_files(source.metadata, dimensions.vocabulary, dimensions.context),
    }
    listed = {weight.name: weight for weight in weights(source, dimensions)}
    name, torch_dtype = _DTYPES[dtype]
    total = sum(weight.num_elements for weight in listed.values()) * torch_dtype.itemsize
    done = 0

    def read(weight: str) -> Iterator[bytes]:
        nonlocal done
        for piece in read_values(source, listed[weight], torch_dtype):
            yield piece
            done += len(piece)
            if progress:
                progress(done, total)

    for file, text in texts.items():
        (directory / file).write_text(text, encoding="utf-8")
    write_checkpoint(directory, {name: weight.shape for name, weight in listed.items()}, name, read, max_bytes=max_file_bytes)
    return Imported(str(config["model_type"]), dimensions.layers, len(listed), total, fresh=True)


def _digest(source: GgufFile) -> str:
    with source.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_record(directory: Path, origin: dict[str, str], made: Imported) -> None:
    files = {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.name != _LOCK}
    record = {"origin": origin, "made": asdict(made), "files": files}
    (directory / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _earlier(directory: Path, origin: dict[str, str]) -> Imported | None:
    """Tell what an earlier import of the same file has made; None if the folder is free."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    try:
        record = json.loads((directory / RECORD).read_bytes())
        made = Imported(**{**record["made"], "fresh": False})
        complete = all((directory / name).stat().st_size == size for name, size in record["files"].items())
        same = record["origin"] == origin
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidArgument(f"{directory} exists and is not an earlier import: give another folder, or remove it") from None
    if not same or not complete:
        what = "is damaged" if same else f"was imported from another file, or not as {origin['dtype']}"
        raise InvalidArgument(f"{directory} {what}: give another folder, or remove it")
    return made


@contextlib.contextmanager
def _partial(directory: Path) -> Iterator[Path]:
    """Give a folder that becomes `directory` at the end, or vanishes if anything is raised."""
    partial = directory.absolute().with_name(directory.absolute().name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if not (partial / _LOCK).exists() and any(partial.iterdir()):
            raise InvalidArgument(f"{partial} is in the way and not from an import: remove it, or give another folder")
        lock = (partial / _LOCK).open("ab")
    except OSError as error:
        raise InvalidArgument(f"{partial} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InvalidArgument(f"another import is writing {partial}: wait for it") from None
        for leftover in partial.iterdir():
            if leftover.name != _LOCK:
                leftover.unlink()
        try:
            yield partial
            (partial / _LOCK).unlink()
            partial.rename(directory.absolute())
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise ModelError(f"{partial} cannot be written: {error.strerror}: make room, or give another folder") from None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
