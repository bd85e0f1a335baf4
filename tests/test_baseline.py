"""baseline: what a device is given to decode is plain, whole and within limits; everything else is the CPU's."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hostile_images
from cvworker import images
from cvworker.baseline import baseline
from cvworker.errors import JobError
from hostile_images import EXIF, HEIGHT, WIDTH, encode, exif, jpeg_segment, jpeg_size, photo, picture

SOUND = hostile_images.sound()
PLAIN = {f"jpeg-{kind}-coloured" for kind in ("420", "444", "422", "440", "411", "restart", "several", "comment")} | {
    "jpeg-grey"
}
JPEG = SOUND["jpeg-420-coloured"]
LIMIT = 100_000


def seen(data: bytes, max_pixels: int = LIMIT) -> object:
    return baseline(memoryview(data), max_pixels)


@pytest.mark.parametrize("name", sorted(SOUND))
def test_of_all_kinds_of_pictures_only_plain_jpegs_are_for_the_device(name: str) -> None:
    assert (seen(SOUND[name]) is not None) == (name in PLAIN)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_the_part_that_the_device_gets_is_the_whole_picture(name: str) -> None:
    # given a plain JPEG, perhaps with something after it
    found = baseline(memoryview(SOUND[name]), LIMIT)
    assert found is not None
    assert (found.width, found.height, found.orientation, found.exif) == (WIDTH, HEIGHT, 1, None)
    # then what is said to be the picture is decoded to the same
    pixels = simplejpeg.decode_jpeg(SOUND[name][: found.length])
    assert np.array_equal(pixels, images.decode(SOUND[name]).permute(1, 2, 0).numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_read_and_where_it_stands(orientation: int) -> None:
    data = encode(photo(60, 40), "JPEG", exif=EXIF + exif(orientation))
    found = baseline(memoryview(data), LIMIT)
    assert found is not None
    assert found.orientation == orientation
    assert found.exif is not None
    assert data[found.exif :].startswith(EXIF)
    assert (found.width, found.height) == (60, 40)


def test_a_profile_other_than_srgb_is_for_the_cpu() -> None:
    assert seen(encode(picture(), "JPEG", icc_profile=hostile_images.srgb_profile())) is not None
    assert seen(encode(picture(), "JPEG", icc_profile=hostile_images.swapped_profile())) is None
    assert seen(encode(picture("L"), "JPEG", icc_profile=hostile_images.srgb_profile())) is None


def test_more_pixels_than_allowed_are_not_for_the_device() -> None:
    assert seen(JPEG, WIDTH * HEIGHT) is not None
    assert seen(JPEG, WIDTH * HEIGHT - 1) is None
    assert seen(jpeg_size(JPEG, 65_500, 65_500), 50_000_000) is None
    assert seen(jpeg_size(JPEG, 0, HEIGHT)) is None


@pytest.mark.parametrize("kind", ["too_large", "damaged", "foreign"])
def test_nothing_hostile_is_for_the_device(kind: str) -> None:
    given = {name for name, data in getattr(hostile_images, kind)().items() if seen(data) is not None}
    # one is sound in all that can be told without decoding it
    assert given == ({"jpeg-pixels-lost"} if kind == "damaged" else set())


def test_what_is_cut_is_not_for_the_device() -> None:
    for cut in range(0, len(JPEG) - 1, 7):
        assert seen(JPEG[:cut]) is None


def test_a_second_frame_or_size_or_exif_is_not_for_the_device() -> None:
    frame = JPEG.index(b"\xff\xc0")
    segment = JPEG[frame : frame + 19]
    assert seen(JPEG[:frame] + segment + JPEG[frame:]) is None
    lines = struct.pack(">BBHH", 0xFF, 0xDC, 4, HEIGHT)
    assert seen(JPEG[:-2] + lines + JPEG[-2:]) is None
    once = jpeg_segment(JPEG, 0xE1, EXIF + exif(3))
    assert seen(once) is not None
    assert seen(jpeg_segment(once, 0xE1, EXIF + exif(6))) is None


@given(st.data())
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_with_bits_flipped_libjpeg_sees_the_same_size_or_the_device_does_not_get_it(data: st.DataObject) -> None:
    # given
    file = bytearray(SOUND[data.draw(st.sampled_from(sorted(PLAIN)))])
    head = data.draw(st.booleans())  # flips are felt most where sizes and lengths are
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, (min(len(file), 250) if head else len(file)) - 1))
        file[at] ^= data.draw(st.integers(1, 255))
    # when
    found = baseline(memoryview(bytes(file)), LIMIT)
    # then
    if found is None:
        return
    assert found.width * found.height <= LIMIT
    assert found.length <= len(file)
    height, width = simplejpeg.decode_jpeg_header(bytes(file[: found.length]), strict=False)[:2]
    assert (width, height) == (found.width, found.height)
    try:
        image = images.decode(bytes(file), max_pixels=LIMIT)
    except JobError:
        return
    assert sorted(image.shape[1:]) == sorted((found.height, found.width))  # type: ignore[union-attr]


@given(st.binary(max_size=300))
@settings(max_examples=400, deadline=None)
def test_bytes_that_start_like_a_jpeg_are_no_reason_to_raise(data: bytes) -> None:
    assert baseline(memoryview(b"\xff\xd8\xff" + data), LIMIT) is None
