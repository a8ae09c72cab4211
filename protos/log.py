"""structlog for every process of a mesh: events are constant phrases, facts are keys, standard error is the place.

Keys on which lines of different processes are joined: `request_id`, `trace_id`, `worker` (address), `shard`, `epoch`, `step`.
No line holds a prompt, a token or a secret: an error that may quote what a caller sent is logged by its kind and frames alone.
"""

from __future__ import annotations

import logging
import sys
import traceback

import structlog

CONSOLE, JSON = FORMATS = ("console", "json")


def configure_logging(level: str = "info", form: str | None = None) -> None:
    """Send log lines to standard error.

    Args:
        level: the least that is shown.
        form: one of `FORMATS`; None: console at a terminal, JSON otherwise.

    """
    terminal = sys.stderr.isatty()
    console = terminal if form is None else form == CONSOLE
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if console else [structlog.processors.format_exc_info]),
            # The plain one: rich's would print local variables, and with them prompts.
            structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)
            if console
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def frames(error: BaseException) -> str:
    """Say where an error came from, without what it says: that may quote what a caller sent."""
    return "".join(traceback.format_tb(error.__traceback__))
