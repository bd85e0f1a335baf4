"""The demo's pictures, some of them damaged on purpose, and what its answers are worth."""

from __future__ import annotations

import hmac
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from cvworker.embedded.pictures import Object
from cvworker.embedded.receiver import Received
from cvworker.embedded.sheet import Tile
from cvworker.embedded.subjects import THREATS, Subject
from cvworker.errors import ImageInvalid, ImageNotFound, ImageUnsupported
from cvworker.signing import Signer

SEEDS_APART = 10_000
"""First seeds of two demos: the pictures of one are not among those of another."""
EACH_FLAW = 60
"""One in so many pictures is damaged in each way."""
FLAWS = {"truncated": ImageInvalid.code, "not a picture": ImageUnsupported.code, "missing": ImageNotFound.code}
"""What may be wrong with a picture on purpose, and the error code that must come back for it."""
TURNED = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""How a camera stores an upright picture, by the EXIF orientation that it then notes."""
ORIENTATION = 0x0112
FORMATS = {
    "jpg": ("JPEG", "image/jpeg", {"quality": 88}),
    "png": ("PNG", "image/png", {"compress_level": 1}),
    "webp": ("WEBP", "image/webp", {"method": 0, "quality": 85}),
}
SIZES = ((320, 240), (400, 400), (480, 360), (360, 480), (640, 426), (640, 480))
"""Width and height; drawing takes as long as there are pixels, and the first demo should not wait for large ones."""
OFTEN_JPEG = ("jpg", "jpg", "jpg", "png", "webp")
NAMED = 5
"""Pictures that a problem names; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One picture as the image host serves it, and what is known of it.

    ``body`` is None where the host has no such picture; ``flaw``, a key of ``FLAWS``, is None where nothing is wrong.
    ``labels`` are its subject's; ``objects`` are in pixels of the upright picture.
    """

    name: str
    body: bytes | None
    content_type: str
    labels: tuple[str, ...]
    flaw: str | None
    objects: tuple[Object, ...] = ()


def flaws(seed: int, count: int) -> dict[int, str]:
    """Which of ``count`` pictures are damaged, and how: a few of each kind, and none where there are only a few."""
    each = max(1, count // EACH_FLAW)
    kinds = [kind for kind in FLAWS for _ in range(each)]
    if count < 2 * len(kinds):
        return {}
    numbers = np.random.default_rng(seed).permutation(count)[: len(kinds)]
    return dict(zip(numbers.tolist(), kinds, strict=True))


def exhibit(seed: int, number: int, flaw: str | None, subject: Subject = THREATS) -> Exhibit:
    """Draw picture ``number`` of the demo ``seed``, and encode it as one of several formats, some turned."""
    if flaw == "missing":
        return Exhibit(f"{number:04}.jpg", None, "", (), flaw)
    if flaw == "not a picture":
        return Exhibit(f"{number:04}.jpg", b"Text, whatever its name says.\n" * 40, "image/jpeg", (), flaw)
    rng = np.random.default_rng([seed, number])
    drawn = subject.draw(seed * SEEDS_APART + number, SIZES[rng.integers(len(SIZES))])
    suffix = "jpg" if flaw else str(rng.choice(OFTEN_JPEG))
    kind, content_type, options = FORMATS[suffix]
    image, exif, file = drawn.image, Image.Exif(), io.BytesIO()
    if suffix == "jpg" and rng.random() < 0.3:
        exif[ORIENTATION] = turn = int(rng.choice(list(TURNED)))
        image = image.transpose(TURNED[turn])
    image.save(file, kind, exif=exif, **options)
    body = file.getvalue()
    if flaw == "truncated":
        body = body[: len(body) * 6 // 10]
    return Exhibit(f"{number:04}.{suffix}", body, content_type, subject.expected(drawn), flaw, drawn.objects)


def genuine(received: Received, signer: Signer) -> bool:
    """Whether the answer carries the signature that ``signer`` makes, as a receiver must find out."""
    stamp, signature = (received.headers.get(f"webhook-{name}", "") for name in ("timestamp", "signature"))
    if not (stamp.isdecimal() and received.webhook_id):
        return False
    expected = signer.headers(received.webhook_id, int(stamp), received.body)["webhook-signature"]
    return hmac.compare_digest(expected.encode(), signature.encode())


def found_in(answer: Mapping[str, Any] | None, subject: Subject = THREATS) -> frozenset[str] | None:
    """The labels in an answer; None where there is none, or an error."""
    if answer is None or answer["status"] != "ok":
        return None
    return subject.found(answer["result"])


def error_in(answer: Mapping[str, Any]) -> str | None:
    return None if answer["status"] == "ok" else str(answer["error"]["code"])


def tile(shown: Exhibit, thumbnail: bytes | None, answer: Mapping[str, Any] | None, subject: Subject | None) -> Tile:
    """The picture as the contact sheet shows it; without a subject nothing is right or wrong."""
    if shown.flaw:
        right = None if answer is None else error_in(answer) == FLAWS[shown.flaw]
        return Tile(shown.name, thumbnail, [f"{shown.flaw} on purpose"], answer, right if subject else None)
    found = found_in(answer, subject) if subject else None
    if answer is None or subject is None or found is None:
        return Tile(shown.name, thumbnail, shown.labels, answer, None)
    right = found == set(shown.labels) and subject.fits(shown.objects, answer["result"])
    return Tile(shown.name, thumbnail, shown.labels, answer, right)


@dataclass(frozen=True, slots=True)
class LabelRow:
    """How often a label was answered, rightly and wrongly, and how often it should have been and was not."""

    label: str
    answers: int
    right: int
    wrong: int
    missed: int


def label_rows(
    exhibits: Sequence[Exhibit], answers: Mapping[str, Mapping[str, Any]], subject: Subject = THREATS
) -> Iterator[LabelRow]:
    """One row for each label, and one for pictures without any; what was answered with an error is left out."""
    pairs = [(set(each.labels), found_in(answers.get(each.name), subject)) for each in exhibits if not each.flaw]
    none = {subject.nothing}
    sets = [(known or none, found or none) for known, found in pairs if found is not None]
    never = none if not any(none & (known | found) for known, found in sets) else set()
    for label in [each for each in (*subject.labels, subject.nothing) if each not in never]:
        right = sum(label in known and label in found for known, found in sets)
        wrong = sum(label not in known and label in found for known, found in sets)
        missed = sum(label in known and label not in found for known, found in sets)
        yield LabelRow(label, right + wrong, right, wrong, missed)


def problems(exhibits: Sequence[Exhibit], received: Iterable[Received], signer: Signer) -> Iterator[str]:
    """What is missing until every picture is answered exactly once, signed, and as it deserves: a line each."""
    accepted = list(received)
    times = Counter(each.id for each in accepted)
    answers = {each.id: each.json for each in accepted}
    yield from _about("not answered", [each.name for each in exhibits if each.name not in times])
    yield from _about("answered more than once", [each.name for each in exhibits if times[each.name] > 1])
    yield from _about("not asked for", [str(name) for name in times.keys() - {each.name for each in exhibits}])
    yield from _about("not signed as it should be", [str(each.id) for each in accepted if not genuine(each, signer)])
    unexpected: dict[str, list[str]] = {}
    for each in exhibits:
        expected = FLAWS[each.flaw] if each.flaw else None
        if each.name in answers and (code := error_in(answers[each.name])) != expected:
            text = f"answered with {code or 'a result'} instead of {expected or 'a result'}"
            unexpected.setdefault(text, []).append(each.name)
    for text, names in unexpected.items():
        why = answers[names[0]].get("error", {}).get("message")
        yield from (f"{line} ({why})" if why else line for line in _about(text, names))


def _about(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"{len(names)} {what}: {', '.join(names[:NAMED])}{rest}"
