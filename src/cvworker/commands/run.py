"""``cvworker run``."""

from __future__ import annotations

import asyncio

from cvworker.settings import Settings, unknown_variables


class Run(Settings):
    """Consume a queue until stopped: receive, download, preprocess, run the model, call back, delete.

    SIGTERM or Ctrl-C stops in order and loses nothing; a second one ends at once.

    example: cvworker run --module threat --weights demo --queue-url https://sqs.eu-west-1.amazonaws.com/1234/images
    """

    def main(self) -> int:
        import structlog

        from cvworker.observe.logs import configure
        from cvworker.service import Service

        configure(self.log_format, self.log_level)
        for line in unknown_variables(set(type(self).model_fields)):
            structlog.get_logger(__name__).warning(line)
        return asyncio.run(Service(self).run())
