"""``cvworker demo``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field
from pydantic_settings import CliSuppress

from cvworker.settings import SecretList, Settings, TextList, unknown_variables


class DemoOptions(BaseModel):
    """The options that only the demo has; as a second base they come first in the help."""

    count: int = Field(200, ge=1, le=2000, description="Pictures")
    seed: int = Field(0, ge=0, le=99, description="Another seed draws other pictures")
    output: Path = Field(Path("cvworker-demo"), description="Folder for the contact sheet, requests, answers and log")
    keep_serving: bool = Field(False, description="Leave the worker and its status page up until Ctrl-C")
    patience: float = Field(120.0, gt=0, description="Give up when nothing moves for this long [seconds]")


class Demo(Settings, DemoOptions):
    """The whole job on this machine, with no AWS and no network: draw pictures of known content (and a few damaged
    ones), serve them, enqueue a request for each on an SQS queue of the demo's own, start the worker that 'run' starts,
    receive its signed callbacks, and compare what was answered with what was drawn.

    The module is 'threat' with its demo weights unless --module says otherwise; options that other commands have too
    are the worker's. Exit code 0: every picture was answered exactly once, every damaged one with the right error.

    examples: cvworker demo

              cvworker demo --keep-serving

              cvworker demo --module my_model.py:MyModel --batch-size 16 --count 1000
    """

    module: str | None = Field("threat", description=Settings.model_fields["module"].description)
    http_port: int = Field(0, ge=0, le=65535, description=Settings.model_fields["http_port"].description)
    # A stop waits for the poll under way, which takes up to 0.4 times as long.
    shutdown_grace: float = Field(5, gt=0, description=Settings.model_fields["shutdown_grace"].description)

    # The demo brings its own of these. They may be set for the other commands, and are overruled.
    queue_url: CliSuppress[str | None] = None
    callback_url: CliSuppress[str | None] = None
    callback_secret: CliSuppress[SecretList] = []
    allowed_hosts: CliSuppress[TextList] = []
    allow_private_networks: CliSuppress[bool] = False
    exit_when_idle: CliSuppress[float | None] = None

    def main(self) -> int:
        from cvworker.embedded.demo import run

        for line in unknown_variables(set(type(self).model_fields)):
            print(f"note: {line}")
        return run(self)
