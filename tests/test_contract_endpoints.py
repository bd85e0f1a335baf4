"""What an orchestrator, a Prometheus and a curious person see of a worker, and what they must not see."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modules.contract_peers import OddHost, SqsProxy, closed_port
from world import BIN, MODULES, fetch, picture, poll, status_of, world

GATED = f"{MODULES / 'contract.py'}:Gated"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
HIDDEN = ["Q-SIGNATURE", "CB-TOKEN", "hunter2", SECRET, SECRET.removeprefix("whsec_"), "aws-secret-key"]
METRICS = {  # name: its labels
    "cvworker_messages_total": {"outcome"},
    "cvworker_errors_total": {"code"},
    "cvworker_inflight_messages": set(),
    "cvworker_queue_depth": {"queue"},
    "cvworker_queue_limit": {"queue"},
    "cvworker_stage_duration_seconds": {"stage"},
    "cvworker_stage_busy_ratio": {"stage"},
    "cvworker_queue_wait_seconds": set(),
    "cvworker_end_to_end_seconds": set(),
    "cvworker_batch_size": set(),
    "cvworker_callbacks_total": {"code_class"},
    "cvworker_sqs_requests_total": {"operation", "outcome"},
    "cvworker_visibility_extensions_total": set(),
    "cvworker_leases_lost_total": set(),
}
STAGES = {"receive", "download", "preprocess", "process", "callback"}
ENDPOINTS = ["livez", "readyz", "metrics", "", "status.json"]


class Samples:
    """One reading of /metrics."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        return sum(each.value for each in self.samples if each.name == name and labels.items() <= each.labels.items())


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, ministack: Any) -> Iterator[SimpleNamespace]:
    """A worker behind a proxy whose module is not ready before a file exists; nothing is sent yet."""
    folder = tmp_path_factory.mktemp("endpoints")
    with ExitStack() as stack:
        proxy, odd = stack.enter_context(SqsProxy(ministack)), stack.enter_context(OddHost())
        here = stack.enter_context(world(folder, sqs=proxy, name="endpoints", visibility=4))
        worker = here.worker(
            module=GATED,
            CONTRACT_GATE=str(folder / "gate"),
            CVWORKER_CALLBACK_SECRET=SECRET,
            CVWORKER_HTTP_PORT="1",  # the flag says 0 and must win
            CVWORKER_LOG_LEVEL="debug",
            AWS_SECRET_ACCESS_KEY="aws-secret-key",
        )
        url = worker.url()
        yield SimpleNamespace(here=here, proxy=proxy, odd=odd, worker=worker, url=url, gate=folder / "gate")


def healthcheck(url: str, *flags: str) -> int:
    port = url.rstrip("/").rpartition(":")[2]
    command = [BIN / "cvworker", "healthcheck", "--http-port", port, *flags]
    return subprocess.run(command, capture_output=True, timeout=30).returncode


@pytest.fixture(scope="module")
def worked(case: SimpleNamespace) -> SimpleNamespace:
    """The same worker, ready, after 30 messages: 22 right, 5 missing pictures, 2 that process fails for, 1 invalid."""
    here = case.here
    case.gate.touch()
    case.worker.ready()
    callback = here.receiver.url + "/answers?token=CB-TOKEN"
    numbers = [*range(22), 250, 250]
    bodies = [
        {"id": f"m{n}", "image_url": case.odd.picture(f"/{number}.png", picture(number)), "callback_url": callback}
        for n, number in enumerate(numbers)
    ]
    bodies += [{"id": f"x{n}", "image_url": case.odd.url + "/missing.png", "callback_url": callback} for n in range(5)]
    bodies = [{**body, "image_url": body["image_url"] + "?X-Amz-Signature=Q-SIGNATURE"} for body in bodies]
    bodies.append({"id": "invalid", "image_url": 5, "callback_url": callback})
    here.send(*bodies)
    poll(lambda: len(here.receiver.answers) == 30, 60, "30 answers")
    poll(lambda: case.worker.metric("cvworker_inflight_messages") == 0, 20, "nothing is held")
    case.samples = Samples(fetch(case.url + "metrics"))
    return case


def test_a_worker_is_alive_but_not_ready_before_its_model_is(case: SimpleNamespace) -> None:
    assert status_of(case.url + "livez") == 200
    assert status_of(case.url + "readyz") == 503
    assert [status_of(case.url + name) for name in ("", "status.json", "metrics")] == [200, 200, 200]
    assert (healthcheck(case.url), healthcheck(case.url, "--probe", "ready")) == (0, 1)


def test_a_worker_is_ready_once_its_model_is(worked: SimpleNamespace) -> None:
    assert [status_of(worked.url + name) for name in ENDPOINTS] == [200] * 5
    assert (healthcheck(worked.url), healthcheck(worked.url, "--probe", "ready")) == (0, 0)
    assert status_of(worked.url + "nothing") == 404


def test_every_metric_of_the_contract_is_there_with_its_labels_and_no_other(worked: SimpleNamespace) -> None:
    for name, labels in METRICS.items():
        family = worked.samples.families.get(name.removesuffix("_total"))
        assert family is not None, name
        assert family.documentation
        found = [set(each.labels) - {"le"} for each in family.samples if not each.name.endswith("_created")]
        assert all(each == labels for each in found), (name, found)
        if name not in ("cvworker_visibility_extensions_total", "cvworker_leases_lost_total"):
            assert found, f"{name} has no value"
    assert set(worked.samples.families["cvworker_batch_size"].type) == set("histogram")
    assert worked.samples.families["cvworker_stage_duration_seconds"].type == "histogram"


def test_the_stages_are_those_of_the_contract(worked: SimpleNamespace) -> None:
    for name in ("cvworker_stage_duration_seconds", "cvworker_stage_busy_ratio"):
        found = {each.labels["stage"] for each in worked.samples.families[name].samples}
        assert found == STAGES, name
    ratios = worked.samples.families["cvworker_stage_busy_ratio"].samples
    assert all(0 <= each.value <= 1 for each in ratios)


def test_the_totals_of_30_messages_add_up(worked: SimpleNamespace) -> None:
    value = worked.samples.value
    assert value("cvworker_messages_total") == value("cvworker_messages_total", outcome="answered") == 30
    assert value("cvworker_errors_total", code="image_not_found") == 5
    assert value("cvworker_errors_total", code="process_failed") == 2
    assert value("cvworker_errors_total", code="invalid_message") == 1
    assert value("cvworker_errors_total") == 8
    assert value("cvworker_inflight_messages") == 0
    assert value("cvworker_callbacks_total") == value("cvworker_callbacks_total", code_class="2xx") == 30
    assert value("cvworker_queue_wait_seconds_count") == 30
    assert value("cvworker_end_to_end_seconds_count") == 30
    assert value("cvworker_stage_duration_seconds_count", stage="callback") == 30
    assert value("cvworker_stage_duration_seconds_count", stage="download") in (24, 29)
    assert value("cvworker_stage_duration_seconds_count", stage="preprocess") == 24
    assert value("cvworker_batch_size_sum") >= 24
    assert value("cvworker_end_to_end_seconds_sum") >= value("cvworker_queue_wait_seconds_sum") > 0
    assert value("cvworker_leases_lost_total") == 0


def test_extensions_of_visibility_are_counted(worked: SimpleNamespace) -> None:
    # given a callback that takes longer than the visibility timeout of four seconds
    worked.here.receiver.delay = 6
    url = worked.odd.picture("/7.png", picture(7))
    worked.here.send({"id": "slow", "image_url": url, "callback_url": worked.here.receiver.url + "/slow"})
    poll(lambda: worked.worker.metric("cvworker_inflight_messages") == 1, 20, "one message is held")
    poll(lambda: worked.worker.metric("cvworker_visibility_extensions_total") >= 1, 20, "an extension is counted")
    worked.here.receiver.delay = 0
    poll(lambda: worked.worker.metric("cvworker_inflight_messages") == 0, 20, "nothing is held")


def test_each_call_to_sqs_is_counted(worked: SimpleNamespace) -> None:
    samples = Samples(fetch(worked.url + "metrics")).families["cvworker_sqs_requests"].samples
    counted = sum(each.value for each in samples if each.name.endswith("_total"))
    assert 0 < counted <= len(worked.proxy.calls)
    operations = {each.labels["operation"].lower().replace("_", "") for each in samples}
    for wanted in ("receive", "delete", "visibility"):
        assert any(wanted in each for each in operations), operations


def test_status_json_says_how_full_each_queue_is(worked: SimpleNamespace) -> None:
    status = worked.worker.status()
    queues = status["queues"]
    assert queues
    rows = queues.values() if isinstance(queues, dict) else queues
    assert all(isinstance(row["depth"], int) and row["limit"] >= 1 for row in rows)
    labels = {each.labels["queue"] for each in worked.samples.families["cvworker_queue_limit"].samples}
    assert labels == {each.labels["queue"] for each in worked.samples.families["cvworker_queue_depth"].samples}
    assert labels == (set(queues) if isinstance(queues, dict) else {row["name"] for row in queues})


def test_neither_endpoints_nor_the_log_show_secrets_or_signed_queries(worked: SimpleNamespace) -> None:
    # given failures of every kind that speak of an address
    here, odd = worked.here, worked.odd
    callback = here.receiver.url + "/answers?token=CB-TOKEN"
    odd.on("/reset", lambda exchange: exchange.reset())
    odd.on("/moved", lambda exchange: exchange.reply(302, Location="http://[bad/?X-Amz-Signature=Q-SIGNATURE"))
    odd.on("/away", lambda exchange: exchange.reply(302, Location="file:///x?X-Amz-Signature=Q-SIGNATURE"))
    query = "?X-Amz-Signature=Q-SIGNATURE"
    urls = {
        "user": f"http://user:hunter2@127.0.0.1:{odd.port}/0.png{query}",
        "port": f"http://127.0.0.1:99999/0.png{query}",
        "refused": f"http://127.0.0.1:{closed_port()}/0.png{query}",
        "name": f"http://no-such-host.invalid/0.png{query}",
        "reset": f"{odd.url}/reset{query}",
        "moved": f"{odd.url}/moved{query}",
        "away": f"{odd.url}/away{query}",
        "s3": f"s3://secrets/0.png{query}",
        "scheme": f"ftp://user:hunter2@host/0.png{query}",
        "bracket": f"http://[::1/0.png{query}",
    }
    before = len(worked.worker.text())
    here.send(*({"id": f"leak-{name}", "image_url": url, "callback_url": callback} for name, url in urls.items()))
    good = odd.picture("/0.png", picture(0)) + query
    bad_callbacks = [
        f"http://127.0.0.1:{closed_port()}/?token=CB-TOKEN",
        "http://no-such-host.invalid/?token=CB-TOKEN",
        f"{odd.url}/moved?token=CB-TOKEN",
        "http://user:hunter2@host/?token=CB-TOKEN",
        "http://[bad/?token=CB-TOKEN",
        "ftp://host/?token=CB-TOKEN",
    ]
    here.send(*({"id": f"leak-cb-{n}", "image_url": good, "callback_url": url} for n, url in enumerate(bad_callbacks)))

    def told() -> bool:
        rows = [json.loads(line) for line in worked.worker.text()[before:].splitlines() if line.startswith("{")]
        ids = {str(row.get("id")) for row in rows if row.get("event") in ("answered", "later", "left")}
        return all(any(f"leak-{name}" == each for each in ids) for name in urls) and all(
            f"leak-cb-{n}" in ids for n in range(len(bad_callbacks))
        )

    poll(told, 60, "each of them was answered, put off or left")
    # then none of these is to be seen anywhere
    seen = {name: fetch(worked.url + name) for name in ENDPOINTS} | {"log": worked.worker.text()}
    for place, text in seen.items():
        for secret in HIDDEN:
            assert secret not in text, f"{secret} in {place}: {text[max(0, text.index(secret) - 300) :][:600]}"


def test_a_worker_that_cannot_reach_its_queue_is_not_ready_until_it_can(worked: SimpleNamespace) -> None:
    worked.proxy.down = True
    poll(lambda: status_of(worked.url + "readyz") == 503, 60, "not ready")
    assert status_of(worked.url + "livez") == 200
    worked.proxy.down = False
    poll(lambda: status_of(worked.url + "readyz") == 200, 60, "ready again")
    worked.here.receiver.clear()
    url = worked.odd.picture("/9.png", picture(9))
    worked.here.send({"id": "after", "image_url": url, "callback_url": worked.here.receiver.url + "/after"})
    poll(lambda: worked.here.receiver.answers.get("after"), 40, "the worker works again")


def test_a_healthcheck_fails_where_nobody_answers() -> None:
    assert healthcheck(f"http://127.0.0.1:{closed_port()}/") == 1


def test_the_secrets_of_the_io_process_are_not_in_the_environment_of_the_others(worked: SimpleNamespace) -> None:
    model = worked.worker.status()["model"]["pid"]
    environment = Path(f"/proc/{model}/environ").read_bytes().decode(errors="replace")
    assert SECRET not in environment
    assert not re.search(r"AWS_(SECRET|ACCESS|SESSION)\w*=.", environment)
