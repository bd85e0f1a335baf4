"""Reference workers: the same work done in other ways, each a program and each readable by itself.

None of them extends leases, isolates decoders, checks addresses or signs answers. That is not held against them: it is
what the numbers of the worker that does are compared with.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import boto3
from load.compare.task import LOADS


@dataclass(frozen=True, slots=True)
class Options:
    """What every reference worker is told."""

    queue_url: str
    load: str


def options(description: str | None) -> Options:
    """From the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--queue-url", required=True)
    parser.add_argument("--load", choices=LOADS, required=True)
    return Options(**vars(parser.parse_args()))


def client() -> Any:
    """An SQS client; sessions are not thread-safe, so each has one of its own."""
    return boto3.session.Session().client("sqs")


def answer(request: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """What is posted to the client."""
    return {"id": request["id"], "status": "ok", "result": result, "image_url": request["image_url"]}
