"""A file of a model's folder, opened with suspicion: a regular one, within its folder, of bearable size.

What a link may do. Files of a snapshot in the hub's cache are links to blobs of the same model, `models--OWNER--NAME/blobs`:
links into such a folder are followed, and so are links within the model's folder, as Kubernetes makes them for its volumes. Any
other link is refused: a folder that came from elsewhere could make a program read, and tell of, any file of its host.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from protos.errors import ModelError


def open_model_file(path: Path) -> int:
    """Open for reading; gives the descriptor.

    Raises:
        OSError: missing or not readable.
        ModelError: no regular file, or a link out of the folder.

    """
    try:
        # Looked at first: to open a device may do something, and to open a pipe may wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path} is not a regular file")
        _check_within_folder(path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from error


def read_model_file(path: Path, most_bytes: int) -> bytes:
    """Read all of a small file.

    Raises:
        ModelError: missing, unreadable, too large, no regular file, or a link out of the folder.

    """
    try:
        with os.fdopen(open_model_file(path), "rb") as file:
            size, data = os.fstat(file.fileno()).st_size, file.read(most_bytes + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > most_bytes:
        raise ModelError(f"{path}: {size} bytes are too many, at most {most_bytes} are read")
    return data


def _check_within_folder(path: Path) -> None:
    folder, target = (Path(os.path.realpath(place)) for place in (path.parent, path))
    blobs = target.parent
    if not target.is_relative_to(folder) and not (blobs.name == "blobs" and blobs.parent.name.startswith("models--")):
        raise ModelError(
            f"{path} is a link to {target}, which is neither in the model's folder nor in the hub's cache: "
            "copy the file, or name the folder that holds it"
        )
