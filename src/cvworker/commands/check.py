"""``cvworker check``."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from cvworker.errors import JobError, StartupError
from cvworker.settings import Settings, flag, how_to_set, unknown_variables

if TYPE_CHECKING:
    from cvworker.model.config import ModelConfig
    from cvworker.model.link import ModelLink

PIPE_WIDTH = 160
"""Columns of the table where stdout is no terminal."""
LONGEST = 500
WAY_OUT = {
    "example": "return uint8 [3, H, W], or a PIL image where image_type is 'pil', or try a picture with --image FILE",
    "decode": "the example must be an image; try another with --image FILE",
    "preprocess": "it gets {image} and returns one sample: a tensor, or a tree of tensors and numbers",
    "collate": "return samples of one shape and type from preprocess, or write collate(samples)",
    "process": "it gets the batch and returns a list with one JSON-able dict for each sample, in order",
}
"""What to do about each hook that fails."""
IMAGE = {"tensor": "uint8 [3, H, W]", "pil": "a PIL image of mode RGB"}


class CheckOptions(BaseModel):
    """The options that only ``check`` has; as a second base they come first in the help."""

    image: Path | None = Field(None, description="A picture of your own, in place of the module's example")


class Check(Settings, CheckOptions):
    """Try everything that 'run' would need, without touching a message: settings, queue, module, weights, and the
    module's example through decode, preprocess, collate and process in the real processes. Shows what each hook gets
    and gives, and how long it takes.

    examples: cvworker check --module threat --weights demo

              cvworker check --module my_model.py:MyModel --image photo.jpg --batch-size 16

              cvworker check --module my_model.py:MyModel --queue-url https://sqs.eu-west-1.amazonaws.com/1234/images
    """

    def main(self) -> int:
        from cvworker import weights
        from cvworker.arena import Arena
        from cvworker.model.link import ModelLink
        from cvworker.observe.logs import configure
        from cvworker.worker import guard_of, model_config, require, signer_of

        configure(self.log_format, "error" if self.log_level == "info" else self.log_level)
        require(self, "module")
        guard = guard_of(self)
        signer = signer_of(self, guard)
        picture = self._picture()
        for line in unknown_variables(set(type(self).model_fields)):
            _say("note", line)
        _say("settings", f"ok; answers are {'signed' if signer else 'not signed'}")
        self._check_queue()
        local_weights = weights.local(self.weights, guard)
        arena = Arena(int(self.max_inflight_bytes))
        config = model_config(self, local_weights, arena.size, with_example=True)
        link = ModelLink(replace(config, picture=str(self.image.resolve()) if self.image else None), arena.fd)
        try:
            ready = link.wait_ready()
            config = replace(config, batch_size=ready["batch_size"])
            _say("module", f"{_on(ready)}, weights {ready['weights']}")
            self._show_hooks(ready, config)
            result = _through(link, arena, picture or base64.b64decode(ready["hooks"]["picture"]))
        finally:
            link.stop(timeout=5)
        _say("image" if self.image else "example", json.dumps(result)[:LONGEST])
        print(f"cvworker check: {self.module} is ready to run")
        return 0

    def _picture(self) -> bytes | None:
        """The bytes of ``image``, found to be a picture that ``run`` would accept."""
        from cvworker import images

        if self.image is None:
            return None
        try:
            data = self.image.read_bytes()
            if len(data) > self.max_image_bytes:
                raise StartupError(f"image: {self.image} is larger than max_image_bytes ({self.max_image_bytes})")
            images.decode(data, image_type="pil", max_pixels=self.max_image_pixels)
        except OSError as error:
            raise StartupError(f"image: {self.image} cannot be read ({error.strerror}); give a picture") from None
        except JobError as error:
            raise StartupError(f"image: {self.image}: {error}; the answer to it would be {error.code}") from None
        return data

    def _show_hooks(self, ready: dict[str, Any], config: ModelConfig) -> None:
        """The table, or what is wrong with a hook. Raises StartupError."""
        hooks = ready["hooks"]
        which = f"on {self.image}" if self.image else "on the example"
        if broken := hooks.get("broken"):
            way_out = WAY_OUT[broken["hook"]].format(image=IMAGE[hooks["image_type"]])
            raise StartupError(f"module: {ready['name']}.{broken['hook']} failed {which}: {broken['error']}; {way_out}")
        if warning := ready.get("warning"):
            if self.image is None:
                raise StartupError(f"module: the example failed in {warning}")
            _say("note", f"the module's own example fails, so 'run' starts without a warm-up: {warning}")
        _print_table(hooks["steps"], config.batch_size)
        _say("pace", _pace(hooks["steps"], config))
        if note := hooks.get("note"):
            _say("note", f"{note}: give them one size in preprocess, or write collate(samples)")

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


def _on(ready: dict[str, Any]) -> str:
    return f"{ready['name']} on {ready['device_name']}, {ready['precision']}"


def _print_table(steps: list[dict[str, Any]], batch_size: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("hook", "gets", "gives"):
        table.add_column(name, overflow="fold", no_wrap=name == "hook")
    for name in ("one image", f"batch of {batch_size}"):
        table.add_column(name, justify="right", no_wrap=True)
    for step in steps:
        times = (f"{step[name]:.2f} ms" for name in ("image_ms", "batch_ms"))
        table.add_row(*(Text(cell) for cell in (step["hook"], step["takes"], step["gives"], *times)))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False).print(table)


def _pace(steps: list[dict[str, Any]], config: ModelConfig) -> str:
    """Which side of the worker is the slower one, and what that is a matter of."""
    batch_ms = {step["hook"]: step["batch_ms"] for step in steps}
    workers = max(1, config.preprocess_workers)
    prepared = 1000 * workers * config.batch_size / max(batch_ms["decode"] + batch_ms["preprocess"], 1e-3)
    processed = 1000 * config.batch_size / max(batch_ms["collate"] + batch_ms["process"], 1e-3)
    slower = "process" if processed < prepared else f"decode and preprocess ({flag('preprocess_workers')})"
    side = (
        f"{workers} DataLoader {'process prepares' if workers == 1 else 'processes prepare'} {prepared:,.0f} images/s"
    )
    return f"{side}, the model takes {processed:,.0f} images/s, each alone on the machine; slower: {slower}"


def _through(link: ModelLink, arena: Any, picture: bytes) -> Any:
    """One image through the arena, the DataLoader and the model, as the worker does it."""
    import asyncio

    slot = asyncio.run(arena.take(len(picture)))
    slot.write(picture)
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
