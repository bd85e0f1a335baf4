"""Which JPEGs a device may decode: told from their bytes, strictly, before anything of them is there.

A decoder on a device is not isolated from what it decodes and checks less than libjpeg does. So it gets only what
every decoder reads alike: baseline JPEGs (8 bits, sequential Huffman coding, one scan) in grey or YCbCr, whole up to
their end. Whatever is unusual in any way is for :func:`cvworker.images.decode`, which is also who refuses files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cvworker.images import orientation_of, to_srgb

START = b"\xff\xd8"
NOT_CODED = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""Ends the coded pixels, in which 0xFF comes only before a zero or as a restart marker."""
END = 0xD9
FRAME, HUFFMAN, QUANTISATION, RESTARTS, SCAN = (0xC0, 0xC1), 0xC4, 0xDB, 0xDD, 0xDA
APP0, EXIF, ICC, ADOBE, APP15, COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
EXIF_HEAD, ICC_HEAD, ADOBE_HEAD = b"Exif\0\0", b"ICC_PROFILE\0", b"Adobe"
SAMPLINGS = {b"\x11", b"\x21", b"\x12", b"\x22", b"\x41"}
"""Of the luma, the chroma being 1x1: 4:4:4, 4:2:2, 4:4:0, 4:2:0 and 4:1:1."""
WHOLE_SPECTRUM = b"\x00\x3f\x00"


@dataclass(frozen=True, slots=True)
class Baseline:
    """A JPEG that a device may decode."""

    width: int
    height: int
    orientation: int
    """EXIF's, 1 (upright) to 8; the pixels still have it."""
    exif: int | None
    """Where its EXIF block begins."""
    length: int
    """Bytes up to its end; what comes after is no part of it."""


def baseline(data: memoryview, max_pixels: int) -> Baseline | None:
    """What a device needs to know of ``data``, or None where it should not decode it.

    That is where ``data`` is no JPEG, has more than ``max_pixels`` pixels or none, is progressive, arithmetic-coded,
    lossless, of 12 bits, CMYK or RGB, in several scans or frames, of a rare subsampling, damaged in its structure, cut,
    or of a colour profile other than sRGB.
    """
    try:
        return _read(data, max_pixels)
    except (IndexError, ValueError):
        return None


def _read(data: memoryview, max_pixels: int) -> Baseline | None:
    """The same; raises IndexError where the bytes are over, and ValueError for anything unusual."""
    frame, exif, orientation, adobe, profile, tables = b"", None, 1, None, list[bytes](), set[int]()
    for marker, start, after in _segments(data):
        body = bytes(data[start:after])
        if marker in FRAME:
            _check(not frame)
            frame = body
        elif marker == EXIF and body.startswith(EXIF_HEAD):
            _check(exif is None)
            exif, orientation = start, orientation_of(body)
        elif marker == ICC and body.startswith(ICC_HEAD):
            profile.append(body[len(ICC_HEAD) :])
        elif marker == ADOBE and body.startswith(ADOBE_HEAD):
            adobe = body[11]  # 0 is RGB or CMYK as it is
        elif marker == HUFFMAN:
            tables.update(_huffman(body))
        elif marker == QUANTISATION:
            tables.update(_quantisation(body))
        elif marker != SCAN:
            _check((marker == RESTARTS and len(body) == 2) or marker == COMMENT or APP0 <= marker <= APP15)
    width, height, components = _frame(frame)
    _check(0 < width * height <= max_pixels)
    _check(adobe in (None, 1) if len(components) == 3 else adobe in (None, 0))
    _check(tables >= {QUANTISATION << 8 | name for name in frame[8::3]})
    _check(tables >= _scan(body, components))
    _check(not profile or (len(components) == 3 and _is_srgb(profile)))
    end = NOT_CODED.search(data, after)
    _check(end is not None and data[end.start() + 1] == END)
    assert end is not None
    return Baseline(width, height, orientation, exif, end.end())


def _segments(data: memoryview) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment, with nothing between them, up to the first scan."""
    _check(data[:2] == START)
    at, marker = 2, 0
    while marker != SCAN:
        _check(data[at] == 0xFF)
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        _check(length >= 2 and at + 2 + length <= len(data))
        yield marker, at + 4, at + 2 + length
        at += 2 + length


def _frame(body: bytes) -> tuple[int, int, list[int]]:
    """Width, height, and the components' names."""
    _check(len(body) in (9, 15) and body[0] == 8 and body[5] == (len(body) - 6) // 3)
    names, samplings = list(body[6::3]), [body[at : at + 1] for at in range(7, len(body), 3)]
    if len(names) == 1:
        _check(samplings == [b"\x11"])
    else:
        _check(samplings[0] in SAMPLINGS and samplings[1:] == [b"\x11"] * 2)
        _check(len(set(names)) == 3 and bytes(names) != b"RGB")  # by these names libjpeg knows RGB
    return body[3] << 8 | body[4], body[1] << 8 | body[2], names


def _scan(body: bytes, components: list[int]) -> set[int]:
    """The tables that the one scan of all these components needs."""
    count = len(components)
    _check(len(body) == 4 + 2 * count and body[0] == count and body[-3:] == WHOLE_SPECTRUM)
    _check(list(body[1:-3:2]) == components)
    pairs = [(table >> 4, table & 15) for table in body[2:-3:2]]
    return {HUFFMAN << 8 | kind << 4 | name for pair in pairs for kind, name in enumerate(pair)}


def _huffman(body: bytes) -> Iterator[int]:
    """The tables that a segment defines: for each, how many codes have 1 to 16 bits, and then what they stand for."""
    at = 0
    while at < len(body):
        name, counts = body[at], body[at + 1 : at + 17]
        at += 17 + sum(counts)
        _check(name in (0x00, 0x01, 0x10, 0x11) and len(counts) == 16 and 0 < sum(counts) <= 256 and at <= len(body))
        _check(sum(count << 16 - bits for bits, count in enumerate(counts, 1)) <= 1 << 16)
        yield HUFFMAN << 8 | name


def _quantisation(body: bytes) -> Iterator[int]:
    """The tables that a segment defines: for each, its name and 64 bytes."""
    _check(len(body) % 65 == 0)
    for name in body[::65]:
        _check(name < 4)
        yield QUANTISATION << 8 | name


def _is_srgb(parts: list[bytes]) -> bool:
    """Whether the colours are sRGB's as far as anybody sees; a profile that is not whole is none."""
    if len(parts) != parts[0][1]:
        return True
    return to_srgb(b"".join(part[2:] for part in sorted(parts)), "RGB") is None


def _check(usual: bool) -> None:
    if not usual:
        raise ValueError
