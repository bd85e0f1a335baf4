"""The world around a worker that is compared: that of ``cvworker bench``, with this comparison's pictures.

``python -m load.compare.world`` prints its port and serves until its standard input ends, so it cannot outlive the run
that started it. ``GET /counts`` tells what happened, with this process's own CPU time.
"""

from __future__ import annotations

import argparse
import asyncio

from load.compare.envelope import celery
from load.compare.pictures import pictures

from cvworker.bench.world import World, plain, run


def main() -> None:
    parser = argparse.ArgumentParser("python -m load.compare.world", description=__doc__)
    parser.add_argument("--image-ms", type=float, default=0.0, help="latency of the image host")
    parser.add_argument("--callback-ms", type=float, default=0.0, help="latency of the callback receiver")
    parser.add_argument("--backlog", type=int, help="so many messages and no more (default: endless)")
    parser.add_argument("--messages", choices=("plain", "celery"), default="plain")
    parser.add_argument("--every", type=float, default=0.0, help="seconds from one arrival to the next (default: none)")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    given = parser.parse_args()
    world = World(
        pictures(),
        given.image_ms / 1000,
        given.callback_ms / 1000,
        backlog=given.backlog,
        every=given.every,
        wrap=celery if given.messages == "celery" else plain,
    )
    asyncio.run(run(world, given.port))


if __name__ == "__main__":
    main()
