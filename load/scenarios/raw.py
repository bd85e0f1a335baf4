"""The raw data of a run: everything that was measured, in one JSON file, from which every table and picture is made.

Format 1, UTF-8 JSON. ``{"format": "cvworker load", "version": 1, "scenario": "online", "made", "command", "commit",
"seed", "module", "machine", "model", "workers", "versions", "queue", "ceiling", "pictures", "world", "pace_images_s",
"notes", "rows"}``. ``machine`` is that of a profile.json; ``pace_images_s`` is what all workers together did at most,
None where the scenario does not tell. A row has ``name``, ``traffic``, ``seconds``, ``seed`` and

==============  ======================================================================================================
``samples``     columns, one place for each request: ``intended``, ``sent`` and ``answered`` in seconds from the row's
                beginning (null: never), ``code`` (``ok``, the answer's error code, ``lost``, ``not sent``),
                ``attempt``, and the answer's ``timings_ms``; besides ``repeats``, ``waited`` until the row ended,
                and the generator's ``cpu_s``
``counters``    what workers counted meanwhile, and CPU seconds of the workers, the world and the queue
``looks``       columns: messages waiting between the steps and in hand, by the workers' /status.json
``sizes``       columns: memory, threads and descriptors of all processes of the workers
``gpu``         share of the time in which it ran something, and most bytes taken; null without one
==============  ======================================================================================================
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cvworker.errors import StartupError

FORMAT, VERSION = "cvworker load", 1
Raw = dict[str, Any]


def save(raw: Raw, path: Path) -> None:
    """Write it, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps({"format": FORMAT, "version": VERSION, **raw}) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Raw:
    """Read one. Raises StartupError with one line for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartupError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise StartupError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise StartupError(
            f"{path}: no raw data of 'python -m load.scenarios'; it writes offline.json, online.json, ..."
        )
    if found.get("version") != VERSION:
        raise StartupError(f"{path}: format {found.get('version')!r}, and this reads {VERSION}; measure again")
    return found
