"""Traces: one from the client over the worker to the callback, by OpenTelemetry's own variables and conventions."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cvworker.errors import StartupError
from cvworker.observe.traces import asking, open_traces
from world import World, poll, world

TRACE, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET_QUERY = "X-Amz-Signature=QUERYMARKER"
QUICK = {"OTEL_BSP_SCHEDULE_DELAY": "100"}


def value_of(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value") or "string_value")


class Got:
    """One span as the collector has it."""

    def __init__(self, span: Span) -> None:
        self.name, self.kind = span.name, Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_")
        self.trace, self.id, self.parent = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
        self.links = {(link.trace_id.hex(), link.span_id.hex()) for link in span.links}
        self.attributes = {each.key: value_of(each.value) for each in span.attributes}
        self.seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        self.failed = span.status.code == 2
        self.text = str(span)


class Collector:
    """An OTLP/HTTP collector: keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, ExportTraceServiceRequest]] = []
        self.status = 200
        self._lock = threading.Lock()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if collector.status == 200:
                    with collector._lock:
                        sent = ExportTraceServiceRequest.FromString(body)
                        collector.requests.append((self.path, self.headers.get("api-key", ""), sent))
                self.send_response(collector.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def spans(self, name: str = "") -> list[Got]:
        with self._lock:
            found = [
                Got(span)
                for _, _, request in self.requests
                for resource in request.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
        return [each for each in found if each.name.split(" ")[0].startswith(name)]

    def resource(self) -> dict[str, Any]:
        return {each.key: value_of(each.value) for each in self.requests[0][2].resource_spans[0].resource.attributes}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, ministack: Any) -> Iterator[SimpleNamespace]:
    """A traced worker that has answered 13 messages: one from a traced client, one missing picture, eleven others."""
    collector = Collector()
    with world(tmp_path_factory.mktemp("traces"), sqs=ministack, name="traced") as here:
        worker = here.worker(
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            OTEL_EXPORTER_OTLP_HEADERS="api-key=COLLECTORKEY",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test",
            OTEL_SERVICE_NAME="pictures",
            **QUICK,
        ).ready()
        request = here.request(1)
        request["image_url"] += "?" + SECRET_QUERY
        attributes = {
            "traceparent": {"DataType": "String", "StringValue": f"00-{TRACE}-{CLIENT_SPAN}-01"},
            "tracestate": {"DataType": "String", "StringValue": "vendor=value"},
        }
        body = json.dumps(request)
        here.client.send_message(QueueUrl=here.queue_url, MessageBody=body, MessageAttributes=attributes)
        missing = {**here.request(2), "id": "missing", "image_url": here.images.url + "/none?" + SECRET_QUERY}
        here.send(missing, *(here.request(n) for n in range(3, 14)))
        assert here.receiver.wait_for(13, 60)
        poll(lambda: worker.metric("cvworker_messages_total", outcome="answered") == 13, 20, "all have ended")
        worker.signal()
        assert worker.wait() == 0
        yield SimpleNamespace(here=here, worker=worker, collector=collector)
    collector.close()


def of_the_client(traced: SimpleNamespace) -> Got:
    (span,) = [each for each in traced.collector.spans("process") if each.trace == TRACE]
    return span


def test_client_worker_and_callback_are_one_trace(traced: SimpleNamespace) -> None:
    # given the span of the message from a traced client
    process = of_the_client(traced)
    # then it goes on from the client's, linked to it and to the call that received it
    assert process.parent == CLIENT_SPAN
    receives = {(each.trace, each.id) for each in traced.collector.spans("receive")}
    assert (TRACE, CLIENT_SPAN) in process.links
    assert len(process.links & receives) == 1
    # and the callback is part of it, and carries it on to the receiver
    (callback,) = [each for each in traced.collector.spans("callback") if each.trace == TRACE]
    assert callback.parent == process.id
    (received,) = [each for each in traced.here.receiver.accepted if each.id == "req-1"]
    assert received.headers["traceparent"] == f"00-{TRACE}-{callback.id}-01"
    assert received.headers["tracestate"] == "vendor=value"
    # as is the download
    (download,) = [each for each in traced.collector.spans("download") if each.trace == TRACE]
    assert download.parent == process.id
    assert download.seconds <= process.seconds


def test_messages_without_a_context_have_traces_of_their_own(traced: SimpleNamespace) -> None:
    others = [each for each in traced.collector.spans("process") if each.trace != TRACE]
    assert len({each.trace for each in others}) == len(others) == 12
    assert all(each.parent == "" for each in others)
    callbacks = {each.trace for each in traced.collector.spans("callback")}
    assert callbacks == {TRACE, *(each.trace for each in others)}
    carried = {each.headers["traceparent"].split("-")[1] for each in traced.here.receiver.accepted}
    assert carried == callbacks


def test_spans_follow_the_conventions_for_messaging(traced: SimpleNamespace) -> None:
    queue = traced.here.queue_url.rpartition("/")[2]
    for operation, kind in (("receive", "CLIENT"), ("process", "CONSUMER"), ("settle", "CLIENT")):
        spans = traced.collector.spans(operation)
        assert spans, operation
        for span in spans:
            assert (span.name, span.kind) == (f"{operation} {queue}", kind)
            assert {name: span.attributes[name] for name in span.attributes if name.startswith("messaging.op")} == {
                "messaging.operation.name": operation,
                "messaging.operation.type": operation,
            }
            assert span.attributes["messaging.system"] == "aws_sqs"
            assert span.attributes["messaging.destination.name"] == queue
            assert span.attributes["aws.sqs.queue.url"] == traced.here.queue_url
            assert span.attributes["server.address"] in ("127.0.0.1", "localhost")
    ids = [span.attributes["messaging.message.id"] for span in traced.collector.spans("process")]
    assert len(set(ids)) == 13
    assert set(ids) == {each.webhook_id for each in traced.here.receiver.accepted}


def test_calls_and_batches_are_linked_to_each_message_they_concern(traced: SimpleNamespace) -> None:
    processes = {(each.trace, each.id) for each in traced.collector.spans("process")}
    for name in ("receive", "settle"):
        spans = traced.collector.spans(name)
        assert sum(each.attributes["messaging.batch.message_count"] for each in spans) == 13, name
        assert all(each.parent == "" for each in spans)
    settled = [link for each in traced.collector.spans("settle") for link in each.links]
    assert sorted(settled) == sorted(processes)
    assert [each.links for each in traced.collector.spans("receive") if each.links] == [{(TRACE, CLIENT_SPAN)}]
    batches = traced.collector.spans("batch")
    ran = [link for each in batches for link in each.links]
    assert len(ran) == len(set(ran)) == 12, "all but the one without a picture"
    assert set(ran) < processes
    assert sum(each.attributes["messaging.batch.message_count"] for each in batches) == 12


def test_what_went_wrong_is_in_the_span(traced: SimpleNamespace) -> None:
    (failed,) = [each for each in traced.collector.spans("process") if each.failed]
    assert failed.attributes["cvworker.request.id"] == "missing"
    assert failed.attributes["error.type"] == "image_not_found"
    assert failed.attributes["cvworker.outcome"] == "answered"
    (download,) = [each for each in traced.collector.spans("download") if each.failed]
    assert (download.trace, download.attributes["error.type"]) == (failed.trace, "image_not_found")
    right = of_the_client(traced)
    assert "error.type" not in right.attributes
    assert right.attributes["cvworker.process_ms"] > 0


def test_the_log_names_the_trace(traced: SimpleNamespace) -> None:
    traces = {line["trace_id"] for line in traced.worker.lines("answered")}
    assert traces == {each.trace for each in traced.collector.spans("process")}


def test_no_query_string_and_no_secret_is_in_a_span(traced: SimpleNamespace) -> None:
    text = "".join(each.text for each in traced.collector.spans())
    assert "QUERYMARKER" not in text
    assert "COLLECTORKEY" not in text
    assert ".png" not in text, "nor the path, which may be a capability"
    assert "COLLECTORKEY" not in traced.worker.text()


def test_exporting_is_configured_by_opentelemetrys_own_variables(traced: SimpleNamespace) -> None:
    path, key, _ = traced.collector.requests[0]
    assert (path, key) == ("/v1/traces", "COLLECTORKEY")
    resource = traced.collector.resource()
    assert resource["service.name"] == "pictures"
    assert resource["deployment.environment"] == "test"
    assert re.fullmatch(r"[0-9a-f-]{36}", resource["service.instance.id"])


def test_a_context_inside_an_sns_notification_is_the_client_s(fast_world: World) -> None:
    # given a notification as SNS delivers it unless told to be raw: attributes and all inside the body
    here, collector = fast_world, Collector()
    worker = here.worker(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector.url + "/v1/traces", **QUICK).ready()
    context = {"Type": "String", "Value": f"00-{TRACE}-{CLIENT_SPAN}-01"}
    here.send(
        {
            "Type": "Notification",
            "Message": json.dumps(here.request(1)),
            "MessageAttributes": {"traceparent": context, "colour": {"Type": "Binary", "Value": 3}, "odd": None},
        }
    )
    # when it is answered
    assert here.receiver.wait_for(1, 60)
    worker.signal()
    assert worker.wait() == 0
    collector.close()
    # then the receiver is called within the client's trace
    (received,) = here.receiver.accepted
    assert received.headers["traceparent"].split("-")[1] == TRACE
    (process,) = collector.spans("process")
    assert process.parent == CLIENT_SPAN


def test_a_message_that_its_client_did_not_sample_is_not_traced_but_carried_on(fast_world: World) -> None:
    here, collector = fast_world, Collector()
    worker = here.worker(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=collector.url + "/v1/traces", **QUICK).ready()
    attributes = {"traceparent": {"DataType": "String", "StringValue": f"00-{TRACE}-{CLIENT_SPAN}-00"}}
    body = json.dumps(here.request(1))
    here.client.send_message(QueueUrl=here.queue_url, MessageBody=body, MessageAttributes=attributes)
    assert here.receiver.wait_for(1, 60)
    worker.signal()
    assert worker.wait() == 0
    collector.close()
    (received,) = here.receiver.accepted
    assert re.fullmatch(rf"00-{TRACE}-[0-9a-f]{{16}}-00", received.headers["traceparent"])
    assert collector.spans("process") == collector.spans("callback") == []


@pytest.mark.parametrize("how", ["refuses", "silent"])
def test_a_dead_collector_harms_nothing(fast_world: World, how: str) -> None:
    # given a collector that is not there, or that takes connections and never answers
    here = fast_world
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if how == "silent":
            listener.listen(64)
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        worker = here.worker("--shutdown-grace", "5", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, **QUICK).ready()
        # when there are messages, and then the signal to stop
        here.send(*(here.request(n) for n in range(30)))
        # then all are answered, and it ends within the grace
        assert here.receiver.wait_for(30, 60)
        assert all(here.right(answer) for answer in here.receiver.answers.values())
        poll(lambda: worker.metric("cvworker_messages_total", outcome="answered") == 30, 20, "all are deleted")
        began = time.monotonic()
        worker.signal()
        assert worker.wait() == 0
        assert time.monotonic() - began < 5 + 3
    # and is told of at most once
    assert len(worker.lines("traces cannot be delivered; trying again quietly")) <= 1
    assert "Traceback" not in worker.text()


# Whether there are traces at all


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        ({}, None),
        ({"OTEL_SERVICE_NAME": "pictures", "OTEL_RESOURCE_ATTRIBUTES": "a=b"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "OTEL_TRACES_EXPORTER"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, None),
    ],
)
def test_traces_are_off_unless_asked_for(environment: dict[str, str], variable: str | None) -> None:
    assert asking(environment) == variable


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: 'zipkin'"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc'",
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT must begin with http"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(environment: dict[str, str], names: str) -> None:
    queue: Any = SimpleNamespace(url="https://sqs.eu-west-1.amazonaws.com/1/images")
    with pytest.raises(StartupError, match=re.escape(names)) as told:
        open_traces(queue, environment)
    assert "\n" not in str(told.value)


def test_without_the_extra_a_worker_that_is_asked_for_traces_says_how_to_get_them(fast_world: World) -> None:
    # given an installation without OpenTelemetry
    block = fast_world.folder / "opentelemetry"
    block.mkdir()
    (block / "__init__.py").write_text("raise ImportError('not installed')\n")
    environment = {"PYTHONPATH": str(fast_world.folder)}
    # when traces are asked for
    worker = fast_world.worker(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:4318", **environment)
    # then it ends with one line that says what to do
    assert worker.wait() == 2
    (line,) = [line for line in worker.text().splitlines() if not line.startswith("{")]
    assert "pip install 'cvworker[otel]'" in line
    assert "OTEL_TRACES_EXPORTER=none" in line


def test_without_being_asked_for_nothing_of_opentelemetry_is_loaded() -> None:
    code = "import sys, cvworker.service; assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    subprocess.run([sys.executable, "-c", code], check=True)
