"""``cvworker run``."""

from __future__ import annotations

import asyncio
import os
import sys

from cvworker.settings import Settings, unknown_variables


class Run(Settings):
    """Consume a queue until stopped: receive, download, preprocess, run the model, call back, delete.

    SIGTERM or Ctrl-C stops in order and loses nothing; a second one ends at once.

    example: cvworker run --module threat --weights demo --queue-url https://sqs.eu-west-1.amazonaws.com/1234/images
    """

    def main(self) -> int:
        import structlog

        from cvworker.observe.logs import configure

        configure(self.log_format, self.log_level)
        for line in unknown_variables(set(type(self).model_fields)):
            structlog.get_logger(__name__).warning(line)
        if self.processes > 1:
            from cvworker.supervisor import Supervisor

            code = asyncio.run(Supervisor(self).run())
        else:
            from cvworker.service import Service

            code = asyncio.run(Service(self).run())
        sys.stdout.flush()
        sys.stderr.flush()
        # Everything is settled; a thread that still waits for a slow S3 must not hold up the end.
        os._exit(code)
