"""``cvworker send``."""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg

from cvworker.errors import StartupError
from cvworker.settings import CommandLine, Settings, how_to_set


class Send(CommandLine):
    """Enqueue requests: from a JSON-lines or CSV file, from stdin (requests or plain URLs, one a line), or one for
    each image under an s3:// prefix. What a request lacks is filled in from the options.

    examples: cvworker send requests.jsonl --queue-url https://sqs.eu-west-1.amazonaws.com/1234/images

              cat urls.txt | cvworker send - --callback-url https://api.example.com/answers

              cvworker send s3://bucket/2026/11/ --callback-url https://api.example.com/answers --task threat
    """

    source: CliPositionalArg[str] = Field("-", description="A file, s3://bucket/prefix, or - for stdin")
    queue_url: str | None = Field(None, description=Settings.model_fields["queue_url"].description)
    callback_url: str | None = Field(None, description="Where the answers go, for requests that do not say")
    task: str | None = Field(None, description="The module's name, for requests that do not say")
    metadata: str | None = Field(None, description="A JSON object, for requests that bring none")
    every_key: bool = Field(False, description="With s3://: every key, not only those that end like an image")

    @field_validator("metadata")
    @classmethod
    def _is_object(cls, value: str | None) -> str | None:
        if value is not None and not isinstance(json.loads(value), dict):
            raise ValueError("must be a JSON object")
        return value

    def main(self) -> int:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from cvworker.send import read_requests, send
        from cvworker.sqs.queue import open_client

        if self.queue_url is None:
            raise StartupError(f"queue_url is not set: give {how_to_set('queue_url')}")
        template: dict[str, Any] = {"callback_url": self.callback_url, "task": self.task}
        template["metadata"] = json.loads(self.metadata) if self.metadata else None
        requests = read_requests(
            self.source,
            template={name: value for name, value in template.items() if value is not None},
            every_key=self.every_key,
        )
        client = open_client(self.queue_url)
        columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} sent"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("send", total=None)
            sent = send(client, self.queue_url, requests, progress=lambda n: progress.advance(bar, n))
        for failure in sent.failures:
            print(f"not sent: {failure.where}: {failure.message} [{failure.code}]", file=sys.stderr)
        print(f"{sent.sent:,} sent to {self.queue_url}")
        return 1 if sent.failures else 0
