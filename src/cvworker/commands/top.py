"""``cvworker top``."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cvworker.settings import CommandLine


class Top(CommandLine):
    """Watch one worker or several in the terminal, as their status pages tell: rates, queues, what holds each back.

    Ctrl-C ends it. Exit code 0; with --once, 1 where one of them does not answer.

    examples: cvworker top

              cvworker top 10.0.3.17:8080 10.0.3.18:8080

              cvworker top --once
    """

    addresses: CliPositionalArg[list[str]] = Field(
        ["127.0.0.1:8080"], description="host:port of each worker's endpoints, or their http(s):// address"
    )
    every: float = Field(1.0, ge=0.2, description="Seconds between two looks")
    once: bool = Field(False, description="Look once, print it and end")

    def main(self) -> int:
        from cvworker.top import watch

        return watch(self.addresses, every=self.every, once=self.once)
