"""``python -m load.faults [SCENARIO]``: play it, print seed, counts and verdict; 1 where something was violated."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from load.faults.plans import PLANS
from load.faults.run import Run, summary

SHOWN = 5
"""Violations of a kind that are printed."""


def main() -> int:
    """The exit code: 0 held, 1 violated, 2 bad usage."""
    lines = "\n".join(f"  {name:8} {plan.summary}" for name, plan in PLANS.items())
    parser = argparse.ArgumentParser(
        "python -m load.faults", description=__doc__, epilog=lines, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=[*PLANS], nargs="?", default="mixed")
    parser.add_argument("--seed", type=int, help="what fails and when; drawn and printed where not given")
    parser.add_argument("--logs", type=Path, help="folder for the workers' logs (default: a temporary one)")
    for name, kind in (("messages", int), ("seconds", float), ("workers", int), ("kills", int), ("stops", int)):
        parser.add_argument(f"--{name}", type=kind)
    for name, kind in (("rate", float), ("kill-every", float), ("visibility", int), ("within", float)):
        parser.add_argument(f"--{name}", type=kind)
    given = vars(parser.parse_args())
    scenario, seed, logs = given.pop("scenario"), given.pop("seed"), given.pop("logs")
    seed = random.randrange(1_000_000) if seed is None else seed  # noqa: S311 - not a secret
    plan = replace(PLANS[scenario], **{name: value for name, value in given.items() if value is not None})
    folder = logs or Path(tempfile.mkdtemp(prefix="cvworker-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{scenario} (seed {seed}): {plan.summary}; logs in {folder}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers, as ctrl-C does
    report = asyncio.run(Run(plan, seed, folder).play())
    print("\n".join(summary(report)))
    shown: Counter[str] = Counter()
    for violation in report.verdict.violations:
        shown[violation.what] += 1
        if shown[violation.what] <= SHOWN:
            print(f"VIOLATION {violation.what}: {violation.message} {violation.detail}")
    verdict = "holds" if report.verdict.good else "; ".join(f"{what}: {n}" for what, n in shown.items())
    print(f"verdict (seed {seed}): {verdict}")
    return 0 if report.verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
