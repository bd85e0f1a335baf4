"""When messages are sent: a schedule that is made before the run, so that nothing in the run can hold a send back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cvworker.errors import StartupError

Floats = NDArray[np.float64]

EPOCH_S = 1e9
"""Seconds from here on are a clock's (2001 was then), and count from the first; smaller ones from the beginning."""
MOST = 10_000_000
"""Messages in a schedule; more is a slip of the keys."""
FORMS = """\
  poisson:RATE              by chance, RATE a second on average
  constant:RATE             one every 1/RATE seconds
  ramp:FROM-TO              by chance, the rate rising or falling evenly
  step:RATE@SECONDS,...     by chance, one rate after the other; 0 is a pause
  full:COUNT                all at the beginning: a full queue
  FILE                      replayed: a time a line, or JSON lines with "at"; seconds, or ISO 8601"""


def schedule(text: str, seconds: float, seed: int) -> Floats:
    """Seconds from the beginning at which messages are to be sent, ascending; the same for the same arguments.

    ``text`` is one of :data:`FORMS`. ``seconds`` is the length of those that do not have one of their own. Raises
    StartupError with one line for what is none.
    """
    kind, colon, rest = text.partition(":")
    if not colon or kind not in _MAKERS:
        return _some(replayed(Path(text)), text)
    return _some(_MAKERS[kind](rest, seconds, np.random.default_rng(seed)), text)


def length(text: str, seconds: float) -> float:
    """Seconds that a schedule lasts, its pause at the end included."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "step":
        return sum(lasts for _, lasts in _steps(rest))
    if colon and kind in _MAKERS:
        return 0.0 if kind == "full" else seconds
    return float(replayed(Path(text))[-1])


def poisson(rate: float, seconds: float, random: np.random.Generator) -> Floats:
    """A Poisson process: its count is Poisson's, and given that its times are uniform."""
    return stepped([(rate, seconds)], random)


def constant(rate: float, seconds: float) -> Floats:
    """Evenly spaced, the first at once."""
    return np.arange(math.ceil(rate * seconds - 1e-9)) / rate if rate else np.empty(0)


def ramp(first: float, last: float, seconds: float, random: np.random.Generator) -> Floats:
    """A Poisson process whose rate goes from ``first`` to ``last`` in a straight line.

    Drawn by turning its expected count ``first t + (last - first) t² / 2 seconds`` around.
    """
    expected = (first + last) / 2 * seconds
    drawn = np.sort(random.random(int(random.poisson(expected)))) * expected
    # The root that stays finite where both rates are the same.
    return np.asarray(2 * drawn / (first + np.sqrt(np.maximum(0.0, first**2 + 2 * (last - first) / seconds * drawn))))


def stepped(steps: Iterable[tuple[float, float]], random: np.random.Generator) -> Floats:
    """A Poisson process with one rate after the other, each for so many seconds."""
    rates, lasts = (np.asarray(column, dtype=np.float64) for column in zip(*steps, strict=True))
    edges, expected = (np.concatenate([[0.0], np.cumsum(values)]) for values in (lasts, rates * lasts))
    drawn = np.sort(random.random(int(random.poisson(expected[-1])))) * expected[-1]
    return np.asarray(np.interp(drawn, expected, edges))


def replayed(path: Path) -> Floats:
    """The times in a file. Raises StartupError, naming the row and the field."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise StartupError(
            f"arrivals: {str(path)!r} is no form that is known (poisson:20, step:5@30,50@3, ...) and no file that can "
            f"be read ({error.strerror})"
        ) from None
    except UnicodeDecodeError:
        raise StartupError(f"arrivals: {path}: not UTF-8 text") from None
    times = [_at(line.strip(), f"arrivals: {path}, row {row}") for row, line in enumerate(lines, 1) if line.strip()]
    found = np.sort(np.asarray(times, dtype=np.float64))
    return found - found[0] if len(found) and found[0] >= EPOCH_S else found


def _at(text: str, where: str) -> float:
    value: Any = text
    if text.startswith("{"):
        where += ", at"
        try:
            value = json.loads(text).get("at")
        except ValueError as error:
            raise StartupError(f"{where}: not JSON ({error})") from None
        if value is None:
            raise StartupError(f'{where}: is missing; a row is {{"at": 12.5}}')
    elif text.startswith(("[", '"')):
        _refuse(where, text)
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            _refuse(where, value)
        seconds = float(value)
    except ValueError:
        try:
            seconds = datetime.fromisoformat(str(value)).timestamp()
        except ValueError:
            _refuse(where, value)
    if not math.isfinite(seconds) or seconds < 0:
        _refuse(where, value)
    return seconds


def _refuse(where: str, value: object) -> NoReturn:
    raise StartupError(f"{where}: must be seconds, 0 or more, or a time such as 2026-11-22T18:30:00 (it is {value!r})")


def _some(times: Floats, text: str) -> Floats:
    if not len(times):
        raise StartupError(f"arrivals: {text}: there is no message in it; give a higher rate or more seconds")
    return times


def _rate(text: str, given: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < math.inf:
        raise StartupError(f"arrivals: {given}: {text!r} is no number of messages a second")
    return rate


def _expecting(count: float, given: str) -> None:
    if count > MOST:
        raise StartupError(f"arrivals: {given}: {count:,.0f} messages are more than the {MOST:,} that one run sends")


def _steps(text: str) -> list[tuple[float, float]]:
    found = []
    for number, each in enumerate(text.split(","), 1):
        rate, _, lasts = each.partition("@")
        where = f"step:{text}, step {number}"
        seconds = _rate(lasts, where)
        if not seconds:
            raise StartupError(f"arrivals: {where}: must be RATE@SECONDS, such as 50@10 (it is {each!r})")
        found.append((_rate(rate, where), seconds))
    _expecting(sum(rate * lasts for rate, lasts in found), f"step:{text}")
    return found


def _make_poisson(text: str, seconds: float, random: np.random.Generator) -> Floats:
    rate = _rate(text, f"poisson:{text}")
    _expecting(rate * seconds, f"poisson:{text}")
    return poisson(rate, seconds, random)


def _make_constant(text: str, seconds: float, random: np.random.Generator) -> Floats:
    rate = _rate(text, f"constant:{text}")
    _expecting(rate * seconds, f"constant:{text}")
    return constant(rate, seconds)


def _make_ramp(text: str, seconds: float, random: np.random.Generator) -> Floats:
    first, dash, last = text.partition("-")
    if not dash:
        raise StartupError(f"arrivals: ramp:{text}: must be FROM-TO, such as ramp:10-80")
    rates = _rate(first, f"ramp:{text}"), _rate(last, f"ramp:{text}")
    _expecting(sum(rates) / 2 * seconds, f"ramp:{text}")
    return ramp(*rates, seconds, random)


def _make_full(text: str, seconds: float, random: np.random.Generator) -> Floats:
    if not text.isdigit():
        raise StartupError(f"arrivals: full:{text}: must be a number of messages, such as full:500")
    _expecting(int(text), f"full:{text}")
    return np.zeros(int(text))


_MAKERS = {
    "poisson": _make_poisson,
    "constant": _make_constant,
    "ramp": _make_ramp,
    "step": lambda text, _, random: stepped(_steps(text), random),
    "full": _make_full,
}
