"""`coordctl`: everything that a person does with shardmesh."""

from __future__ import annotations

import importlib

import click

from protos.program import run_program

COMMANDS = {
    "generate": "Generate text from a prompt, a chat or token ids.",
    "serve": "Serve a model on workers that run already.",
    "plan": "Show who holds what and how much memory that takes.",
    "status": "Show workers, epoch, plan, load and health of a mesh.",
    "reshard": "Cut a mesh into another number of shards while it serves.",
    "top": "Show a mesh at work, renewed every second.",
    "bench": "Measure a private mesh: tokens per second, and where their time goes.",
    "profile": "Write a timeline of some tokens, for Perfetto.",
    "certs": "Make certificates for a mesh on one machine.",
    "api-key": "Make a key for a caller of a coordinator.",
    "import-gguf": "Turn a llama-family GGUF file into a Hugging Face folder.",
}
"""Name and purpose; each lives in `coordinator.commands` under its own name."""


class Commands(click.Group):
    """Imports a command when it is run: torch takes seconds, and most commands need none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help page."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(importlib.import_module(f"coordinator.commands.{name}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List names and purposes without importing anything."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="shardmesh")
def coordctl() -> None:
    """Serve Mixture-of-Experts models on a mesh of ordinary machines."""


def main() -> None:
    """Run the command line."""
    run_program("coordctl", coordctl)


if __name__ == "__main__":
    main()
