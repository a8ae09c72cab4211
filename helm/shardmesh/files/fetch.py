"""Fills a folder with a model from the hub, once: one that is complete is left as it is. Arguments: hub id, revision, folder."""

import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from coordinator.models.hub import CONFIG_PATTERNS, IGNORED_PATTERNS, WEIGHT_PATTERNS

model, revision, directory = sys.argv[1:]
# Written last; coordinators wait for it.
mark = Path(directory, ".complete")
if mark.exists():
    sys.exit()
try:
    snapshot_download(
        model,
        revision=revision,
        local_dir=directory,
        allow_patterns=[*CONFIG_PATTERNS, *WEIGHT_PATTERNS],
        ignore_patterns=list(IGNORED_PATTERNS),
    )
    mark.touch()
except Exception as error:  # noqa: BLE001  # whatever it is, its first line says it, and the Job tries again
    sys.exit(f"{model} at {revision} cannot be fetched: {' '.join(str(error).split()) or type(error).__name__}")
