"""One way to AWS: boto3's own chain for credentials, endpoint and region."""

from __future__ import annotations

import os

import boto3


def session() -> boto3.Session:
    """A session of its own for each caller: making clients from one is not safe in threads.

    ``AWS_REGION`` is what ECS and Lambda set and what the other SDKs read; boto3 knows only ``AWS_DEFAULT_REGION``.
    """
    return boto3.Session(region_name=os.environ.get("AWS_REGION") or None)
