"""Structured logs: JSON in production, readable at a terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from structlog.tracebacks import ExceptionDictTransformer

_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]
# Never with local variables, which structlog shows unless told not to: they are images, results and signed URLs.
_TRACEBACKS = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))


_ENCODER = json.JSONEncoder(default=repr)


def _in_order(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What people look for first comes first."""
    return {name: line.pop(name) for name in ("timestamp", "level", "event") if name in line} | dict(line)


def _json(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> str:
    """As structlog's JSONRenderer, which makes an encoder for each line: there is a line for each message."""
    return _ENCODER.encode(line)


def configure(log_format: str, level: str, **marks: Any) -> None:
    """Set up structlog, and what libraries log through the standard library, for this process.

    ``marks`` are in every line, such as the number of the pipeline.
    """

    def marked(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        line.update(marks)
        return line

    shared = [*_SHARED, marked] if marks else _SHARED
    as_json = log_format == "json" or (log_format == "auto" and not sys.stdout.isatty())
    least = getattr(logging, level.upper())
    renderer: list[Any]
    if as_json:
        renderer = [_TRACEBACKS, _in_order, _json]
    else:
        renderer = [
            structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    structlog.configure(
        processors=[*shared, structlog.processors.StackInfoRenderer(), *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.WriteLoggerFactory(sys.stdout),
        cache_logger_on_first_use=False,  # cached loggers do not pickle
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(least, logging.WARNING), force=True)
