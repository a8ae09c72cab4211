"""`coordctl import-gguf`: a llama-family GGUF file becomes a folder that `--model` takes."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from coordinator import gguf_import


@click.command("import-gguf")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["f32", "bf16", "f16"]),
    default="f32",
    show_default=True,
    help="Of the weights; f32 is exactly what the file's quantized weights stand for.",
)
def import_gguf(file: Path, directory: Path, dtype: str) -> None:
    """Turn the llama-family GGUF FILE into the Hugging Face folder DIR, with its tokenizer and chat template.

    DIR appears only when it is complete. If it is a complete import of the same file already, nothing is done.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("weights", total=None)
        made = gguf_import.import_gguf(
            file,
            directory,
            dtype=dtype,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    state = "imported" if made.fresh else "was imported already"
    size = f"{made.num_bytes / 1e9:.2f} GB of {dtype} weights"
    click.echo(f"{directory}: {state}: {made.architecture}, {made.layers} layers, {made.num_tensors} tensors, {size}")
