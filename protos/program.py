"""How a program of ours ends: one line for an error, one meaning for an exit code.

The two programs must agree on it: a coordinator that started workers of its own reads from their exit codes whether the person
at the keyboard can mend what is wrong.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from protos.errors import InvalidArgument, MeshError, ModelError, TopologyError

if TYPE_CHECKING:
    from signal import Signals

EXIT_FAILURE = 1
"""The work was not done."""
EXIT_MISTAKE = 2
"""Nor will it be, until the command line or the model is changed."""

MISTAKES = (InvalidArgument, ModelError, TopologyError)


def exit_after(number: Signals | int) -> int:
    """Exit code of a program that a signal ended."""
    return 128 + number


def run_program(name: str, command: click.Command) -> NoReturn:
    """Run a command line to its end; whatever goes wrong is one line on standard error.

    Args:
        name: of the program, before each error.
        command: click's, not run yet.

    """
    _open_standard_streams()
    # Until an event loop has handlers of its own, which may take seconds: the first process of a container, for which the system
    # has no default, would ignore it.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command(prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(exit_after(signal.SIGINT))
    except click.ClickException as error:
        _end(name, error.format_message(), EXIT_MISTAKE)
    except MeshError as error:
        _end(name, str(error), EXIT_MISTAKE if isinstance(error, MISTAKES) else EXIT_FAILURE)
    except OSError as error:
        # What is buffered would fail again when the interpreter flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _end(name, error.strerror or str(error), EXIT_FAILURE)
    sys.exit(0)


def _terminate(number: int, _: object) -> NoReturn:
    os._exit(exit_after(number))


def _end(name: str, text: str, code: int) -> NoReturn:
    click.echo(f"{name}: {' '.join(text.split())}", err=True)
    sys.exit(code)


def _open_standard_streams() -> None:
    """Put /dev/null where a standard stream was closed; otherwise the next socket would take its number."""
    for descriptor, stream in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, stream) is None:
            mode = "r" if descriptor == 0 else "w"
            setattr(sys, stream, os.fdopen(descriptor, mode, closefd=False))
