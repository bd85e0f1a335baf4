"""The same as a Celery task on SQS: sixteen threads, or two processes, each message by itself.

Celery understands only messages that Celery wrote, so the world writes them so for this one (``--messages celery``).
Needs ``pip install "celery[sqs]"``, which is in no requirement of this repository.
"""

from __future__ import annotations

import argparse
import threading
from typing import Any

import requests
import torch
from celery import Celery
from celery.signals import worker_process_init
from load.compare.envelope import TASK
from load.compare.task import LOADS, Model, decode, make_model, preprocess
from load.compare.workers import answer

POOLS = {"threads": 16, "prefork": 2}
VISIBILITY_S = 30

_local = threading.local()
_model: list[Model] = []


def main() -> None:
    """Work until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-url", required=True)
    parser.add_argument("--load", choices=LOADS, required=True)
    parser.add_argument("--pool", choices=POOLS, default="threads")
    given = parser.parse_args()

    def load_model(**_: Any) -> None:
        _model.append(make_model(given.load))

    if given.pool == "prefork":  # after the fork, because torch's threads do not survive one
        worker_process_init.connect(load_model, weak=False)
    else:
        load_model()
    app = Celery("compare", broker="sqs://")
    app.conf.update(
        broker_transport_options={
            "region": "us-east-1",
            "predefined_queues": {"images": {"url": given.queue_url}},
            "visibility_timeout": VISIBILITY_S,
            "wait_time_seconds": 10,
            "polling_interval": 0,
        },
        task_default_queue="images",
        task_acks_late=True,  # otherwise whatever a crash interrupts is lost
        task_ignore_result=True,
        worker_prefetch_multiplier=4,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
    )
    app.task(name=TASK)(work)
    app.worker_main(
        ["worker", f"--pool={given.pool}", f"--concurrency={POOLS[given.pool]}", "--queues=images", "--loglevel=ERROR"]
    )


def work(request: dict[str, Any]) -> None:
    """One message."""
    if not hasattr(_local, "http"):
        _local.http = requests.Session()
        torch.set_num_threads(1)  # the cores are shared out already, between messages
    image = _local.http.get(request["image_url"], timeout=20)
    image.raise_for_status()
    sample = preprocess(decode(image.content))
    (result,) = _model[0](torch.unsqueeze(sample, 0))
    _local.http.post(request["callback_url"], json=answer(request, result), timeout=15).raise_for_status()


if __name__ == "__main__":
    main()
