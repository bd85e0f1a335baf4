"""Whether traces are wanted: by OpenTelemetry's own variables, and nothing is loaded or done where they are not set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cvworker.errors import StartupError

if TYPE_CHECKING:
    from cvworker.observe.spans import Traces
    from cvworker.sqs.queue import Queue

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
EXPORTER = "OTEL_TRACES_EXPORTER"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
OFF = f"or set {EXPORTER}=none"


def asking(environment: Mapping[str, str]) -> str | None:
    """The variable that asks for traces; None where they are off, as they are by default."""
    exporter = environment.get(EXPORTER, "").strip().lower()
    if exporter == "none" or environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    return EXPORTER if exporter else next((name for name in ENDPOINTS if environment.get(name)), None)


def open_traces(queue: Queue, environment: Mapping[str, str]) -> Traces | None:
    """Traces of the messages of ``queue``, where they are asked for; messages are then received with their context.

    Raises:
        StartupError: they are asked for, and cannot be had.
    """
    variable = asking(environment)
    if variable is None:
        return None
    exporter = environment.get(EXPORTER, "").strip().lower() or "otlp"
    if exporter != "otlp":
        raise StartupError(f"{EXPORTER}: {exporter!r} is not supported: set it to otlp, or to none")
    for name in PROTOCOLS:
        if (protocol := environment.get(name) or "http/protobuf") != "http/protobuf":
            raise StartupError(
                f"{name}: {protocol!r} is not supported: set it to http/protobuf, which collectors take on port 4318"
            )
    for name in ENDPOINTS:
        if (url := environment.get(name)) and not url.lower().startswith(("http://", "https://")):
            raise StartupError(f"{name} must begin with http:// or https://")
    try:
        from cvworker.observe.spans import Traces
    except ImportError:
        raise StartupError(
            f"{variable} asks for traces, which need more packages: pip install 'cvworker[otel]', {OFF}"
        ) from None
    except Exception as error:  # OTEL_PROPAGATORS is read at import
        raise StartupError(
            f"traces, which {variable} asks for, cannot be set up ({error}); correct it, {OFF}"
        ) from None
    try:
        return Traces(queue)
    except Exception as error:  # the SDK's own reading of its variables
        raise StartupError(
            f"traces, which {variable} asks for, cannot be set up ({error}); correct it, {OFF}"
        ) from None
