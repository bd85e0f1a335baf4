"""``cvworker check``."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from cvworker.settings import Settings, how_to_set, unknown_variables

if TYPE_CHECKING:
    from cvworker.model.link import ModelLink


class Check(Settings):
    """Try everything that 'run' would need, without touching a message: settings, queue, module, weights, and the
    module's example through decode, preprocess, collate and process in the real processes.

    examples: cvworker check --module threat --weights demo

              cvworker check --module my_model.py:MyModel --queue-url https://sqs.eu-west-1.amazonaws.com/1234/images
    """

    def main(self) -> int:
        from cvworker import weights
        from cvworker.arena import Arena
        from cvworker.errors import StartupError
        from cvworker.model.link import ModelLink
        from cvworker.observe.logs import configure
        from cvworker.worker import guard_of, model_config, require, signer_of

        configure(self.log_format, "error" if self.log_level == "info" else self.log_level)
        require(self, "module")
        guard = guard_of(self)
        signer = signer_of(self, guard)
        for line in unknown_variables(set(type(self).model_fields)):
            _say("note", line)
        _say("settings", f"ok; answers are {'signed' if signer else 'not signed'}")
        self._check_queue()
        local_weights = weights.local(self.weights, guard)
        arena = Arena(int(self.max_inflight_bytes))
        link = ModelLink(model_config(self, local_weights, arena.size, with_example=True), arena.fd)
        try:
            ready = link.wait_ready()
            where = f"{ready['device_name']}, {ready['precision']}"
            _say("module", f"{ready['name']} on {where}, weights {ready['weights']}")
            if "warning" in ready:
                raise StartupError(f"module: the example failed in {ready['warning']}")
            sample = f"preprocess {ready['preprocess_ms']} ms → {ready['shapes']}"
            _say("hooks", f"{sample}; process {ready['process_ms']} ms")
            result = _through(link, arena, base64.b64decode(ready["example_png"]))
        finally:
            link.stop(timeout=5)
        _say("example", json.dumps(result)[:500])
        print(f"cvworker check: {self.module} is ready to run")
        return 0

    def _check_queue(self) -> None:
        from cvworker.sqs.queue import Queue

        if self.queue_url is None:
            _say("queue", f"not set, not checked; 'run' needs {how_to_set('queue_url')}")
            return
        queue = Queue.open(self.queue_url)
        attributes = queue.read_attributes()
        dead_letters = (
            f"dead-letter queue after {queue.max_receives} receives"
            if queue.max_receives
            else (f"no redrive policy: give it a dead-letter queue (max_attempts {self.max_attempts} applies)")
        )
        waiting = attributes.get("ApproximateNumberOfMessages", "?")
        _say("queue", f"reachable; {waiting} messages waiting; visibility {queue.visibility_timeout} s; {dead_letters}")
        queue.close()


def _through(link: ModelLink, arena: Any, png: bytes) -> Any:
    """One image through the arena, the DataLoader and the model, as the worker does it."""
    import asyncio

    from cvworker.errors import StartupError

    slot = asyncio.run(arena.take(len(png)))
    slot.write(png)
    link.submit([(1, slot.offset, slot.length, False)])
    for frame in link.frames():
        if "failed" in frame:
            raise StartupError(f"module: {frame['failed'][2]}")
        if "done" in frame:
            _, _, _, result, error = frame["done"][0]
            if error is not None:
                raise StartupError(f"module: {error[1]}")
            return result
    raise StartupError(f"module: its process ended on the example ({link.how_it_ended()})")


def _say(what: str, text: str) -> None:
    print(f"  {what:<9} {text}", flush=True)
