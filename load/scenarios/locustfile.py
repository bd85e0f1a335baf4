"""The locust user for a queue. The scenarios start it; by itself it is a load test of any queue, with locust's page:

    python -m locust -f load/scenarios/locustfile.py --queue-url URL --images FOLDER --arrivals poisson:20

Without --receiver, an image host and a receiver of its own are started, which the workers must be able to reach.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from load.scenarios import images
from load.scenarios.arrivals import FORMS, schedule
from load.scenarios.here import worker_settings
from load.scenarios.user import GIVE_UP_S, Offer, write
from load.scenarios.world import world
from locust import User, events, task
from locust.exception import StopUser

from cvworker.errors import StartupError


@events.init_command_line_parser.add_listener
def options(parser: Any) -> None:
    """What locust does not know of."""
    group = parser.add_argument_group("queue")
    group.add_argument("--queue-url", help="region, credentials and endpoint: boto3's chain")
    group.add_argument("--arrivals", default="poisson:5", help="\n" + FORMS)
    group.add_argument("--seconds", type=float, default=60.0, help="length of the schedule")
    group.add_argument("--seed", type=int, default=0, help="of everything that comes by chance")
    group.add_argument("--images", help="folder with pictures, or a file with a URL a line")
    group.add_argument("--receiver", default="", help="a world that runs already: http://127.0.0.1:PORT")
    group.add_argument("--shown", default="", help="its address for the workers, where that is another")
    group.add_argument("--give-up", type=float, default=GIVE_UP_S, help="seconds without an answer to wait")
    group.add_argument("--samples", default="", help="file for every sample, as JSON")


class Sender(User):
    """There is one of it: more users do not send more. The rate is the schedule's, whatever the workers do."""

    fixed_count = 1

    @task
    def offer(self) -> None:
        """Everything: locust would begin again with what ends, and once is enough."""
        given, runner = self.environment.parsed_options, self.environment.runner
        try:
            with ExitStack() as stack:
                found = _run(given, self._fire, stack)
            if given.samples:
                write(Path(given.samples), found)
            self.environment.process_exit_code = 0  # failed requests are results, and no failure of this
        except StartupError as error:
            print(f"load: {error}", file=sys.stderr)
            self.environment.process_exit_code = 2
        except Exception:
            traceback.print_exc()
            self.environment.process_exit_code = 1
        if given.headless and runner is not None:
            runner.quit()
        raise StopUser

    def _fire(self, kind: str, name: str, ms: float, size: int, exception: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=ms,
            response_length=size,
            exception=exception,
            context={},
            start_time=time.time() - ms / 1000,
        )


def _run(given: Any, fire: Any, stack: ExitStack) -> dict[str, Any]:
    if not given.queue_url:
        raise StartupError("queue-url: give the queue, by --queue-url URL")
    if not given.images:
        raise StartupError("images: give a folder with pictures, or a file with a URL a line, by --images PLACE")
    times = schedule(given.arrivals, given.seconds, given.seed)
    pictures = stack.enter_context(images.served(given.images, worker_settings(None)))
    receiver, shown = given.receiver, given.shown
    if not receiver:
        peer = stack.enter_context(world(pictures.folder, shown=shown))
        receiver, shown = peer.base, peer.shown
    offer = Offer(given.queue_url, receiver, shown or receiver, pictures.urls(shown or receiver), times, fire)
    return offer.run(lambda told: print(json.dumps(told), flush=True), given.give_up)
