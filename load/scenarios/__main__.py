"""Load tests of whole workers on this machine: queue, image host, receiver, workers and open-loop traffic.

Requests are sent when the schedule says, whatever becomes of the others, and latency counts from then. Each scenario
prints its tables, and writes its raw data (every request), a CSV and one HTML page to --out. Any setting of the worker
is its variable, as with 'cvworker run': CVWORKER_BATCH_SIZE=16 python -m load.scenarios offline
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

from load.scenarios import arrivals, raw, report
from load.scenarios.broker import KINDS
from load.scenarios.here import Wishes
from load.scenarios.plans import MAKERS, SHARES, Offered, Sizes
from load.scenarios.run import Order, Run, passed
from load.scenarios.world import add_options
from rich.console import Console

from cvworker.errors import StartupError, WorkerFailed

PIPE_WIDTH = 190
OUT = Path("build/load")
HELP = {
    "offline": "a full queue, drained: the highest throughput",
    "online": "rates from a tenth to 1.2 times of it, in turn: the latency curve and its knee",
    "burst": "idle, then ten times the mean",
    "soak": "a steady rate for a long time: does memory grow?",
    "offer": "one row of traffic of your own",
    "all": "offline, online, burst and soak, one after the other, with one page for all",
    "report": "tables, CSV and page once more, from raw data",
}
EXAMPLES = """\
examples:
  python -m load.scenarios offline
  python -m load.scenarios online --module my_model.py:MyModel --images my_pictures/ --seconds 30
  python -m load.scenarios online --pace 120 --shares 0.5 0.8 1.0 --queue fast --workers 2
  python -m load.scenarios burst --image-latency lognormal:80,400 --image-errors 0.01
  python -m load.scenarios soak --minutes 60 --share 0.7
  python -m load.scenarios offer --arrivals ramp:5-80 --seconds 120
  python -m load.scenarios offer --arrivals yesterday.txt --queue-url URL --workers 0 --bind 0.0.0.0 --port 9000 \\
      --shown http://10.0.3.17:9000
  python -m load.scenarios report build/load/offline.json build/load/online.json --out build/again
"""


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0; 1 where requests were lost, no row counts or something ended; 2 for what cannot be run."""
    given = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started, as Ctrl-C does
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    try:
        if given.scenario == "report":
            raws = [raw.load(path) for path in given.raw]
            given.out.mkdir(parents=True, exist_ok=True)
        else:
            raws = _run(given, console, sys.argv[1:] if argv is None else argv)
        report.show(raws, console)
        console.print(f"\nwritten to {report.write(raws, given.out)}, with the CSV beside it", soft_wrap=True)
    except StartupError as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"load: {error}", file=sys.stderr)
        return 1
    except WorkerFailed as error:
        print(f"load: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("load: interrupted; scenarios that had ended are in --out", file=sys.stderr)
        return 1
    return 0 if given.scenario == "report" or passed(raws) else 1


def _run(given: argparse.Namespace, console: Console, arguments: list[str]) -> list[raw.Raw]:
    own = None
    if given.scenario == "offer":
        arrivals.schedule(given.arrivals, given.seconds, given.seed)  # what is wrong with it is told before the start
        own = Offered(given.arrivals, given.arrivals, given.seconds)
    wishes = Wishes(
        module=given.module,
        workers=given.workers,
        images=given.images,
        queue=given.queue,
        queue_url=given.queue_url,
        image_latency=given.image_latency,
        image_errors=given.image_errors,
        callback_latency=given.callback_latency,
        callback_errors=given.callback_errors,
        bind=given.bind,
        port=given.port,
        shown=given.shown,
        seed=given.seed,
        give_up=given.give_up,
    )
    order = Order(
        scenarios=tuple(MAKERS) if given.scenario == "all" else (given.scenario,),
        wishes=wishes,
        sizes=_sizes(given),
        out=given.out,
        command=shlex.join(["python", "-m", "load.scenarios", *arguments]),
        pace=given.pace,
        machine_type=given.machine_type,
        own=own,
    )
    wishes.check()
    return Run(order, console).run()


def _sizes(given: argparse.Namespace) -> Sizes:
    named = {
        "shares": tuple(given.shares) if "shares" in given else None,
        "bursts": getattr(given, "bursts", None),
        "soak": 60 * given.minutes if "minutes" in given else None,
        "soak_share": getattr(given, "share", None),
        "offline": getattr(given, "seconds", None),
        "online": getattr(given, "seconds", None),
    }
    return Sizes(**{name: value for name, value in named.items() if value is not None})  # type: ignore[arg-type]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m load.scenarios",
        description=__doc__,
        epilog=EXAMPLES + "\narrivals:\n" + arrivals.FORMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="scenario", required=True, metavar="SCENARIO")
    found = {name: commands.add_parser(name, help=text, description=text) for name, text in HELP.items()}
    for name, each in found.items():
        each.add_argument("--out", type=Path, default=OUT, help="folder for the results (default: %(default)s)")
        if name == "report":
            each.add_argument("raw", type=Path, nargs="+", help="offline.json, online.json, ...")
        else:
            _common(each)
    for name in ("offline", "online", "all", "offer"):
        seconds = 60.0 if name == "offer" else 20.0
        found[name].add_argument("--seconds", type=_positive, default=seconds, help="of a row (default: %(default)g)")
    for name in ("online", "all"):
        found[name].add_argument("--shares", type=_positive, nargs="+", default=SHARES, help="default: 0.1 to 1.2")
    for name in ("burst", "all"):
        found[name].add_argument("--bursts", type=int, default=3, help="default: %(default)s, one each half a minute")
    for name in ("soak", "all"):
        found[name].add_argument("--minutes", type=_positive, default=10.0, help="of soak (default: %(default)g)")
        found[name].add_argument("--share", type=_positive, default=0.7, help="of soak (default: %(default)g)")
    found["offer"].add_argument("--arrivals", required=True, help="see 'arrivals' in --help of load.scenarios")
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--module", default="threat", help="as 'cvworker run' takes it (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="'cvworker run' processes; 0: they run elsewhere")
    parser.add_argument("--images", metavar="PLACE", help="a folder, or a file with a URL a line; default: drawn ones")
    parser.add_argument("--queue", choices=KINDS, default=KINDS[0], help="started here (default: %(default)s)")
    parser.add_argument("--queue-url", metavar="URL", help="a queue of your own in its place, by boto3's chain")
    parser.add_argument("--pace", type=_positive, help="images/s that shares are of; default: measured first")
    add_options(parser)
    parser.add_argument("--bind", default="127.0.0.1", help="where image host and receiver listen")
    parser.add_argument("--port", type=int, default=0, help="theirs; default: a free one")
    parser.add_argument("--shown", default="", metavar="URL", help="their address for workers elsewhere")
    parser.add_argument("--give-up", type=_positive, default=60.0, help="seconds without an answer; then it is lost")
    parser.add_argument("--machine-type", help="what the catalogue calls this machine; default: as EC2 says")
    parser.add_argument("--seed", type=int, default=0, help="of everything that comes by chance")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
