"""OpenTelemetry spans around the steps: receive, process, download, batch, callback, settle.

Names and attributes follow the semantic conventions for messaging and for SQS
(https://opentelemetry.io/docs/specs/semconv/messaging/): a span for each call that receives or settles messages, and
one for each message from its receive until it ends. The client's own context, from the message's attributes, is the
parent of that one and linked to it, so that client, worker and the receiver of the callback are one trace; calls and
batches that concern several messages are linked to each of them. Imported only where traces are wanted.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import get_global_textmap
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import (
    Link,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)

from cvworker import __version__
from cvworker.messages import sns_attributes
from cvworker.sqs.outcome import End, Outcome

if TYPE_CHECKING:
    from types_boto3_sqs.type_defs import MessageTypeDef

    from cvworker.errors import JobError
    from cvworker.job import Job
    from cvworker.sqs.leases import Lease
    from cvworker.sqs.queue import Queue

UNTOLD_LOG = "opentelemetry"
"""The SDK's own log: it has a line for each try while a collector is away. What matters is told here, once."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class JobTrace:
    """One job's span, and the context in which the spans of its steps begin."""

    span: Span
    context: Context


@dataclass(slots=True)
class Call:
    """One callback: the headers that carry its trace on, and the status that it was answered with."""

    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None


class Traces:
    """Begins and ends the spans, and sends them from a thread of its own; what cannot be sent is dropped.

    Where they go, how many of them and under which name is OpenTelemetry's own configuration: ``OTEL_*``.
    """

    def __init__(self, queue: Queue, exporter: SpanExporter | None = None) -> None:
        logging.getLogger(UNTOLD_LOG).setLevel(logging.CRITICAL)
        own = {"service.name": "cvworker", "service.version": __version__, "service.instance.id": str(uuid.uuid4())}
        resource = Resource.create({**own, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_Told(exporter or OTLPSpanExporter())))
        self._tracer = self._provider.get_tracer("cvworker", __version__)
        self._propagator = get_global_textmap()
        place = urlsplit(queue.url)
        self._queue = place.path.rpartition("/")[2] or queue.url
        self._messaging: dict[str, Any] = {
            "messaging.system": "aws_sqs",
            "messaging.destination.name": self._queue,
            "aws.sqs.queue.url": queue.url,
            "server.address": place.hostname or "",
            **({"server.port": place.port} if place.port else {}),
        }
        self._receives: dict[str, SpanContext] = {}
        queue.message_attributes = sorted(self._propagator.fields)
        queue.received = self.receive

    def receive(self, messages: Sequence[MessageTypeDef], began: float) -> None:
        """A call has brought messages; :meth:`begin` is called for each of them."""
        clients = [(message["MessageId"], _remote(self._client(message))) for message in messages]
        links = [Link(client, {"messaging.message.id": key}) for key, client in clients if client is not None]
        span = self._start("receive", SpanKind.CLIENT, links, began, {"messaging.batch.message_count": len(messages)})
        span.end()
        self._receives |= dict.fromkeys((key for key, _ in clients), span.get_span_context())

    def begin(self, message: MessageTypeDef, jobs: Sequence[Job]) -> None:
        """A message is held, and its jobs begin; none where it was held already."""
        context, key = self._client(message), message["MessageId"]
        received = self._receives.pop(key, None)
        links = [Link(each) for each in (_remote(context), received) if each is not None]
        for job in jobs:
            about = {
                "messaging.message.id": key,
                "cvworker.request.id": _text(job.request.id),
                "cvworker.attempt": job.lease.attempt,
            }
            span = self._start("process", SpanKind.CONSUMER, links, None, about, context)
            job.trace = JobTrace(span, set_span_in_context(span, context))
            job.lease.spans.append(span.get_span_context())

    def downloaded(self, job: Job, seconds: float, error: JobError | None) -> None:
        """A job's download, of ``seconds``, has just ended."""
        if (trace := _of(job)) is None:
            return
        now = time.time()
        place = _place(job.request.image_url or "")
        span = self._tracer.start_span("download", trace.context, attributes=place, start_time=_ns(now - seconds))
        if error is not None:
            _fail(span, error.code)
        span.end()

    def batch(self, jobs: Sequence[Job], seconds: float) -> None:
        """A batch has just been through ``process``, in ``seconds``."""
        links = [Link(trace.span.get_span_context()) for job in jobs if (trace := _of(job)) is not None]
        about = {"messaging.batch.message_count": len(jobs)}
        start = _ns(time.time() - seconds)
        self._tracer.start_span("batch", Context(), links=links, attributes=about, start_time=start).end()

    @contextmanager
    def callback(self, job: Job, url: str) -> Iterator[Call]:
        """Around a callback, with all its tries: the headers to send, and the span with the status given."""
        call, trace = Call(), _of(job)
        if trace is None:
            yield call
            return
        about = {"http.request.method": "POST", **_place(url)}
        span = self._tracer.start_span("callback", trace.context, kind=SpanKind.CLIENT, attributes=about)
        self._propagator.inject(call.headers, set_span_in_context(span, trace.context))
        try:
            yield call
        except Exception as error:
            _fail(span, type(error).__name__, str(error))
            raise
        finally:
            if call.status is not None:
                span.set_attribute("http.response.status_code", call.status)
            span.end()

    def end(self, job: Job, outcome: Outcome) -> dict[str, str]:
        """A job has ended; what its line in the log says of the trace."""
        if (trace := _of(job)) is None:
            return {}
        job.trace, span = None, trace.span
        span.set_attribute("cvworker.outcome", outcome.end.value)
        for name, value in job.timings_ms.items():
            span.set_attribute(f"cvworker.{name}_ms", round(value, 1))
        if job.error is not None:
            _fail(span, job.error.code)
        elif outcome.end not in (End.ANSWERED, End.RELEASED):
            _fail(span, outcome.end.value)
        span.end()
        return {"trace_id": format_trace_id(span.get_span_context().trace_id)}

    @contextmanager
    def settle(self, leases: Sequence[Lease]) -> Iterator[None]:
        """Around a call that tells SQS how messages ended."""
        links = [Link(each, {"messaging.message.id": lease.message_id}) for lease in leases for each in lease.spans]
        span = self._start("settle", SpanKind.CLIENT, links, None, {"messaging.batch.message_count": len(leases)})
        try:
            yield
        except Exception as error:
            _fail(span, type(error).__name__)
            raise
        finally:
            span.end()

    def close(self, timeout: float) -> None:
        """Send what is left, for at most ``timeout`` seconds; a collector that is away is not waited for."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces-close", daemon=True)
        closing.start()
        closing.join(timeout)

    def _start(
        self,
        operation: str,
        kind: SpanKind,
        links: Sequence[Link],
        start: float | None,
        about: Mapping[str, Any],
        context: Context | None = None,
    ) -> Span:
        name = {"messaging.operation.name": operation, "messaging.operation.type": operation}
        return self._tracer.start_span(
            f"{operation} {self._queue}",
            Context() if context is None else context,
            kind=kind,
            attributes={**self._messaging, **name, **about},
            links=links,
            start_time=None if start is None else _ns(start),
        )

    def _client(self, message: MessageTypeDef) -> Context:
        """The context that the client put into the message's attributes, or SNS's; empty where there is none."""
        own = message.get("MessageAttributes", {})
        given = {name: each.get("StringValue", "") for name, each in own.items()}
        return self._propagator.extract(given or sns_attributes(message["Body"]), Context())


class _Told(SpanExporter):
    """Tells once when spans cannot be delivered, and once when they can again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                log.warning("traces cannot be delivered; trying again quietly", spans=len(spans))
            self._lost += len(spans)
        elif self._lost:
            log.info("traces can be delivered again", spans_lost=self._lost)
            self._lost = 0
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _of(job: Job) -> JobTrace | None:
    return job.trace if isinstance(job.trace, JobTrace) else None


def _remote(context: Context) -> SpanContext | None:
    found = get_current_span(context).get_span_context()
    return found if found.is_valid else None


def _place(url: str) -> dict[str, Any]:
    """Where a URL leads, without what may be secret in it: userinfo, path, query."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return {}
    return {"server.address": _text(host or ""), **({"server.port": port} if port else {}), "url.scheme": parts.scheme}


def _fail(span: Span, kind: str, why: str | None = None) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, why)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _text(text: str) -> str:
    """As UTF-8 can carry it: clients' texts may hold lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()
