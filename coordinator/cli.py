"""`coordctl`: everything that a person does with shardmesh."""

from __future__ import annotations

import importlib.metadata
import sys

import click

from coordinator.commands.generate import generate
from coordinator.commands.import_gguf import import_gguf
from coordinator.commands.plan import plan
from coordinator.commands.serve import serve
from coordinator.commands.status import status
from protos.errors import InvalidArgument, MeshError, ModelError, TopologyError

MISTAKES = (InvalidArgument, ModelError, TopologyError)
"""What the person at the keyboard can mend: exit code 2, as for a wrong flag."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(importlib.metadata.version("shardmesh"), prog_name="coordctl")
def coordctl() -> None:
    """Serve Mixture-of-Experts models on a mesh of ordinary machines."""


for command in (generate, serve, plan, status, import_gguf):
    coordctl.add_command(command)


def main() -> None:
    """Run the command line; errors are one line on standard error."""
    try:
        coordctl(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MeshError as error:
        click.echo(f"coordctl: {error}", err=True)
        sys.exit(2 if isinstance(error, MISTAKES) else 1)


if __name__ == "__main__":
    main()
