"""images: every picture comes out upright, in RGB and within limits, or is refused with its code.

What is decoded was drawn by :mod:`hostile_images`: four quarters, each of one colour.
"""

from __future__ import annotations

import io
import json
import mmap
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

import hostile_images
from cvworker import images
from cvworker.errors import ImageInvalid, ImageTooLarge, ImageUnsupported, JobError
from hostile_images import GREYS, HEIGHT, QUADRANTS, WIDTH, encode, photo, picture, quadrants

# Pillow warns about what it finds odd in hostile files, and the tests are full of those.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

REFUSED = (ImageInvalid, ImageTooLarge, ImageUnsupported)
MAGIC_BYTES = 32  # from which on a format is known
EDGE = 8  # pixels beside the middle where lossy formats mix the colours of two quarters
SOUND = hostile_images.sound()
SECOND_PICTURES = {"jpeg-several-coloured", "tiff-pages-coloured"}  # whose first picture is followed by others
INVERSE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation: what Pillow does to an upright image to get it


def pixels(image: Any) -> np.ndarray:
    """``[H, W, 3]`` of integers that can be subtracted."""
    array = np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()
    assert array.dtype == np.uint8
    assert array.shape[2] == 3
    return array.astype(int)


def assert_shows(image: Any, colours: Any = QUADRANTS, within: int = 6) -> None:
    expected = quadrants(colours)
    seen = pixels(image)
    assert seen.shape[:2] == expected.shape[:2]
    wrong = np.abs(seen - (expected if expected.ndim == 3 else expected[..., None])).max(axis=2)
    wrong[HEIGHT // 2 - EDGE : HEIGHT // 2 + EDGE] = 0
    wrong[:, WIDTH // 2 - EDGE : WIDTH // 2 + EDGE] = 0
    assert wrong.max() <= within


def cases(files: dict[str, bytes]) -> Any:
    return pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in files.items()])


def each_type() -> Any:
    return pytest.mark.parametrize("image_type", ["tensor", "pil"])


# --- What comes out


@each_type()
@cases(hostile_images.coloured())
def test_every_colour_format_becomes_the_rgb_that_was_drawn(data: bytes, image_type: Any) -> None:
    assert_shows(images.decode(data, image_type=image_type))


@each_type()
@cases(hostile_images.grey())
def test_every_grey_format_becomes_rgb_and_16_bits_are_scaled_not_clipped(data: bytes, image_type: Any) -> None:
    assert_shows(images.decode(data, image_type=image_type), GREYS)


@cases(hostile_images.bilevel())
def test_one_bit_becomes_black_and_white(data: bytes) -> None:
    assert_shows(images.decode(data), (0, 255, 255, 255), within=0)


def test_a_tensor_is_uint8_with_three_channels_first() -> None:
    tensor = images.decode(SOUND["jpeg-420-coloured"])
    assert isinstance(tensor, torch.Tensor)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, HEIGHT, WIDTH)
    tensor += 1  # and it may be written to


def test_a_pil_image_is_plain_rgb_that_remembers_neither_exif_nor_profile() -> None:
    data = encode(picture(), "PNG", exif=hostile_images.exif(6), icc_profile=hostile_images.swapped_profile())
    image = images.decode(data, image_type="pil")
    assert isinstance(image, Image.Image)
    assert (type(image), image.mode, image.info) == (Image.Image, "RGB", {})
    assert image.getexif().get(0x0112, 1) == 1


def test_half_clear_pixels_are_mixed_with_white() -> None:
    data = encode(Image.new("RGBA", (8, 8), (200, 100, 0, 128)), "PNG")
    seen = pixels(images.decode(data))[4, 4]
    assert np.abs(seen - (227, 177, 127)).max() <= 1


def test_the_source_may_be_a_read_only_view_and_is_not_needed_afterwards(tmp_path: pathlib.Path) -> None:
    # given
    path = tmp_path / "image"
    path.write_bytes(SOUND["jpeg-420-coloured"])
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # when
    view = memoryview(memory)
    image = images.decode(view)
    view.release()
    # then
    memory.close()  # raises where anything still looks at it
    assert_shows(image)


@pytest.mark.parametrize("colour", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_the_first_frame_of_an_animation_is_the_image(colour: str) -> None:
    others = [picture().rotate(180).convert(colour), picture().rotate(90).convert(colour)]
    first = picture(colour)
    expected = pixels(images.decode(encode(first, "PNG")))
    data = encode(first, "PNG", save_all=True, append_images=others)
    assert (pixels(images.decode(data)) == expected).all()


def test_floats_and_wide_integers_are_unsupported() -> None:
    for mode in ("F", "I"):
        with pytest.raises(ImageUnsupported):
            images.decode(encode(Image.new(mode, (8, 8)), "TIFF"))
    with pytest.raises(ImageUnsupported):
        images.decode(encode(Image.new("LAB", (8, 8)), "TIFF"))


def test_a_12_bit_jpeg_is_unsupported() -> None:
    data = SOUND["jpeg-420-coloured"]
    at = data.index(b"\xff\xc0") + 4
    with pytest.raises(ImageUnsupported):
        images.decode(data[:at] + b"\x0c" + data[at + 1 :])
    with pytest.raises(ImageInvalid):
        images.decode(data[:at] + b"\x00" + data[at + 1 :])


# --- Upright


def turned(orientation: int, mode: str = "RGB") -> Image.Image:
    image = picture(mode)
    return image.transpose(Image.Transpose(INVERSE[orientation])) if orientation > 1 else image


def with_exif(kind: str, image: Image.Image, block: bytes) -> bytes:
    return encode(image, kind, exif=hostile_images.EXIF + block, **({"lossless": True} if kind == "WEBP" else {}))


UPRIGHT: dict[str, Callable[[int], bytes]] = {
    "jpeg": lambda n: with_exif("JPEG", turned(n), hostile_images.exif(n)),
    "jpeg-big-endian": lambda n: with_exif("JPEG", turned(n), hostile_images.exif(n, ">")),
    "jpeg-by-pillow": lambda n: with_exif("JPEG", turned(n, "CMYK"), hostile_images.exif(n)),
    "png": lambda n: with_exif("PNG", turned(n), hostile_images.exif(n)),
    "webp": lambda n: with_exif("WEBP", turned(n), hostile_images.exif(n)),
    "avif": lambda n: with_exif("AVIF", turned(n), hostile_images.exif(n)),
    "tiff": lambda n: hostile_images.plain_tiff(np.asarray(turned(n)), (274, 3, [n])),
    "tiff-big-endian": lambda n: hostile_images.plain_tiff(np.asarray(turned(n)), (274, 3, [n]), order=">"),
    "tiff-deflate": lambda n: hostile_images.plain_tiff(np.asarray(turned(n)), (274, 3, [n]), compression=8),
}


@each_type()
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", UPRIGHT)
def test_whatever_the_exif_orientation_the_image_comes_out_upright(
    kind: str, orientation: int, image_type: Any
) -> None:
    assert_shows(images.decode(UPRIGHT[kind](orientation), image_type=image_type))


def test_exif_after_the_pixels_of_a_png_counts_too() -> None:
    data = encode(turned(6), "PNG")
    later = hostile_images.png(1, 1, 8, 2, b"", (b"eXIf", hostile_images.exif(6)))
    chunk = later[later.index(b"eXIf") - 4 : later.index(b"IDAT") - 4]
    assert_shows(images.decode(data[:-12] + chunk + data[-12:]))


@pytest.mark.parametrize("kind", ["JPEG", "CMYK", "PNG", "WEBP"])
@cases(hostile_images.BROKEN_EXIF)
def test_broken_exif_is_ignored(data: bytes, kind: str) -> None:
    image, kind = (picture("CMYK"), "JPEG") if kind == "CMYK" else (picture(), kind)
    for prefix in (hostile_images.EXIF, b""):
        assert_shows(images.decode(encode(image, kind, exif=prefix + data)))


def test_a_broken_exif_directory_in_a_tiff_is_ignored() -> None:
    for where in (8, 9, 2**31):
        data = hostile_images.plain_tiff(quadrants(), (34665, 4, [where]), (34853, 4, [where]))
        assert_shows(images.decode(data))


# --- Colour profiles


@each_type()
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_colours_are_brought_to_srgb_by_the_embedded_profile(kind: str, image_type: Any) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(picture(), kind, icc_profile=hostile_images.swapped_profile(), **options)
    assert_shows(images.decode(data, image_type=image_type), [colour[::-1] for colour in QUADRANTS])


def test_a_profile_counts_under_alpha_and_a_palette_too() -> None:
    clear = picture("RGBA")
    clear.putalpha(Image.fromarray(quadrants((255, 255, 255, 0))))
    for image in (clear, picture().quantize(8)):
        data = encode(image, "PNG", icc_profile=hostile_images.swapped_profile())
        assert_shows(images.decode(data), [colour[::-1] for colour in QUADRANTS])


def test_an_srgb_profile_leaves_the_fast_path_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tagged = (encode(photo(200, 150), "JPEG", icc_profile=icc) for icc in (None, hostile_images.srgb_profile()))
    monkeypatch.setattr(ImageCms, "applyTransform", pytest.fail)
    images.to_srgb(hostile_images.srgb_profile(), "RGB")
    monkeypatch.setattr(Image, "open", pytest.fail)
    assert images.decode(tagged).equal(images.decode(plain))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("icc", [b"no profile", bytes(128), b"\xff" * 4000], ids=["text", "zeros", "ones"])
def test_a_broken_profile_is_ignored(icc: bytes, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_shows(images.decode(encode(picture(), kind, icc_profile=icc, **options)))


def test_a_profile_that_is_no_bytes_is_ignored() -> None:
    for kind, values in ((3, [1]), (4, [1, 2, 3]), (1, b"icc")):
        assert_shows(images.decode(hostile_images.plain_tiff(quadrants(), (34675, kind, values))))


def test_a_profile_for_other_channels_is_ignored() -> None:
    for mode in ("L", "CMYK"):
        data = encode(picture(mode), "JPEG", icc_profile=hostile_images.swapped_profile())
        expected = encode(picture(mode), "JPEG")
        assert images.decode(data).equal(images.decode(expected))


# --- JPEG: two ways, one result


def by_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("simplejpeg was asked"))
        patch.setattr(images, "_decode_plain_jpeg", lambda *_: None)
        return images.decode(data, **options)


@pytest.mark.parametrize("min_side", [None, 150, 100, 37, 1])
@pytest.mark.parametrize(
    "options", [*({"subsampling": n} for n in (0, 1, 2)), {"progressive": True}, {"keep_rgb": True}], ids=str
)
def test_the_fast_path_and_pillow_agree_within_2_levels(
    options: dict[str, Any], min_side: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in (photo(403, 301), photo(301, 403).convert("L")):
        data = encode(image, "JPEG", quality=88, **(options if image.mode == "RGB" else {}))
        fast = images.decode(data, min_side=min_side)
        slow = by_pillow(data, monkeypatch, min_side=min_side)
        assert fast.shape == slow.shape
        assert np.abs(pixels(fast) - pixels(slow)).max() <= 2


def test_a_plain_jpeg_never_reaches_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", pytest.fail)
    for name in ("jpeg-420", "jpeg-444", "jpeg-440", "jpeg-progressive", "jpeg-several"):
        assert_shows(images.decode(hostile_images.coloured()[name]))


def test_a_sampling_without_a_name_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def unnamed(*_: Any, **__: Any) -> Any:
        raise ValueError("tjDecompressHeader3(): Could not determine subsampling level of JPEG image")

    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", unnamed)
    assert_shows(images.decode(SOUND["jpeg-420-coloured"]))


def test_ycck_and_cmyk_are_what_the_tests_say_they_are() -> None:
    for name, space in (("jpeg-cmyk", "CMYK"), ("jpeg-ycck", "YCCK")):
        data = hostile_images.coloured()[name]
        assert simplejpeg.decode_jpeg_header(data)[2] == space
        assert b"Adobe" in data[:700]


@given(width=st.integers(1, 300), height=st.integers(1, 300), min_side=st.integers(1, 320), cmyk=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_jpeg_is_scaled_down_to_no_less_than_min_side(width: int, height: int, min_side: int, cmyk: bool) -> None:
    data = encode(Image.new("CMYK" if cmyk else "RGB", (width, height)), "JPEG", quality=30)
    side = min(images.decode(data, min_side=min_side).shape[1:])
    assert side >= min(min_side, width, height)
    assert side <= 2 * min_side or side == -(-min(width, height) // 8)


def test_a_scaled_jpeg_shows_the_same_upright() -> None:
    for kind in ("jpeg", "jpeg-by-pillow"):
        for orientation in range(1, 9):
            image = images.decode(UPRIGHT[kind](orientation), min_side=HEIGHT // 2)
            assert image.shape == (3, HEIGHT // 2, WIDTH // 2)
            corners = pixels(image)[[4, 4, -4, -4], [4, -4, 4, -4]]
            assert np.abs(corners - QUADRANTS).max() <= 6


def test_other_formats_and_smaller_images_ignore_min_side() -> None:
    for data in (SOUND["png-rgb-coloured"], SOUND["webp-coloured"]):
        assert images.decode(data, min_side=8).shape == (3, HEIGHT, WIDTH)
    assert images.decode(SOUND["jpeg-420-coloured"], min_side=1000).shape == (3, HEIGHT, WIDTH)


JPEG = encode(photo(WIDTH, HEIGHT), "JPEG")
HARMLESS = {
    "bytes-after-the-end": JPEG + b"from a camera" * 99,
    "another-jpeg-after-the-end": JPEG + JPEG[: len(JPEG) // 2],
    "zeros-before-the-end": JPEG[:-2] + bytes(64) + JPEG[-2:],
    "ones-before-the-end": JPEG[:-2] + b"\xff" * 64 + JPEG[-2:],
    "a-later-jfif": JPEG.replace(b"JFIF\0\1", b"JFIF\0\3"),
    "an-adobe-transform-without-a-name": hostile_images.jpeg_segment(JPEG, 0xEE, b"Adobe\0\x64\0\0\0\0\x07"),
    "fill-bytes-before-a-segment": JPEG[:2] + b"\xff" * 9 + JPEG[2:],
    "an-empty-segment": hostile_images.jpeg_segment(JPEG, 0xE5, b""),
}


@cases(HARMLESS)
def test_what_cameras_get_wrong_in_a_jpeg_does_no_harm(data: bytes) -> None:
    assert np.abs(pixels(images.decode(data)) - pixels(images.decode(JPEG))).max() <= 2


# --- What is refused


@cases({name: data for name, data in SOUND.items() if name not in SECOND_PICTURES})
def test_a_file_cut_at_any_tenth_is_refused_as_invalid(data: bytes) -> None:
    for cut in hostile_images.cuts(data):
        with pytest.raises(ImageInvalid if len(cut) >= MAGIC_BYTES else REFUSED):
            images.decode(cut)


def test_a_larger_jpeg_is_refused_wherever_it_is_cut_and_however_it_is_scaled() -> None:
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        data = encode(photo(403, 301), "JPEG", **options)
        for length in range(3, len(data), 97):
            for min_side in (None, 40):
                with pytest.raises(ImageInvalid):
                    images.decode(data[:length], min_side=min_side)
        for end in range(1, 30):
            with pytest.raises(ImageInvalid):
                images.decode(data[:-end])


def test_pictures_that_follow_the_first_may_be_cut() -> None:
    for name in SECOND_PICTURES:
        assert_shows(images.decode(SOUND[name][: len(SOUND[name]) * 9 // 10]))


@cases(hostile_images.damaged())
def test_damage_is_invalid(data: bytes) -> None:
    with pytest.raises(ImageInvalid) as refused:
        images.decode(data)
    assert "damaged" in refused.value.message
    assert " at 0x" not in refused.value.message


@cases(hostile_images.foreign())
def test_other_formats_and_no_bytes_at_all_are_unsupported(data: bytes) -> None:
    with pytest.raises(ImageUnsupported):
        images.decode(data)


@cases(hostile_images.too_large())
def test_more_pixels_than_allowed_are_too_large(data: bytes) -> None:
    with pytest.raises(ImageTooLarge):
        images.decode(data)


def test_a_jpeg_of_endless_scans_is_too_large() -> None:
    with pytest.raises(ImageTooLarge, match="100018 scans"):
        images.decode(hostile_images.many_scans(), max_pixels=WIDTH * HEIGHT)


@cases(SOUND)
def test_the_limit_is_the_last_size_allowed(data: bytes) -> None:
    images.decode(data, max_pixels=WIDTH * HEIGHT)
    with pytest.raises(ImageTooLarge):
        images.decode(data, max_pixels=WIDTH * HEIGHT - 1)
    if data.startswith(b"\xff\xd8"):  # what a file claims counts, not what is left of it after scaling
        with pytest.raises(ImageTooLarge):
            images.decode(data, min_side=1, max_pixels=WIDTH * HEIGHT - 1)


def test_a_limit_above_pillows_own_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_shows(images.decode(SOUND["bmp-coloured"], max_pixels=WIDTH * HEIGHT))


def test_a_refusal_keeps_nothing_alive(tmp_path: pathlib.Path) -> None:
    # given a damaged file in shared memory
    for data in (*hostile_images.damaged().values(), *hostile_images.too_large().values(), b"GIF"):
        path = tmp_path / "image"
        path.write_bytes(data)
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(memory)
        # when it was refused, and the refusal is kept
        with pytest.raises(JobError) as refused:
            images.decode(view)
        # then the memory can go
        assert refused.value.__context__ is None
        assert refused.value.__cause__ is None
        view.release()
        memory.close()


# --- Whatever it is given


@given(st.binary(max_size=200))
@example(b"")
@settings(max_examples=200, deadline=None)
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    with pytest.raises(REFUSED):
        images.decode(data)


MAGIC = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a", b"RIFF\xff\0\0\0WEBPVP8X\x0a\0\0\0"]
MAGIC += [b"BM" + bytes(12) + b"\x28\0\0\0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"\0\0\0\x14ftypavif\0\0\0\0avif"]


@given(st.sampled_from(MAGIC), st.binary(max_size=400))
@settings(max_examples=400, deadline=None)
def test_random_bytes_that_start_like_an_image_raise_nothing_else(magic: bytes, data: bytes) -> None:
    try:
        images.decode(magic + data, max_pixels=100_000)
    except REFUSED:
        pass


@given(st.data())
@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_images_with_bits_flipped_raise_nothing_else(data: st.DataObject) -> None:
    # given
    file = bytearray(SOUND[data.draw(st.sampled_from(sorted(SOUND)))])
    header = data.draw(st.booleans())  # flips are felt most where sizes and offsets are
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(len(file), 200 if header else len(file)) - 1))
        file[at] ^= data.draw(st.integers(1, 255))
    # when
    try:
        image = images.decode(
            bytes(file),
            image_type=data.draw(st.sampled_from(["tensor", "pil"])),
            min_side=data.draw(st.sampled_from([None, 10])),
            max_pixels=100_000,
        )
    except REFUSED:
        return
    # then
    assert pixels(image).size <= 300_000


# --- Memory and imports, in processes of their own


def run(code: str) -> Any:
    source = f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MEASURE = """
    import ctypes, json, os
    import hostile_images
    from cvworker import images
    from cvworker.errors import JobError

    def memory(key):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    def peak(data, **options):
        "What a decode adds to the memory of a process, in bytes, in a child so that each starts from nothing."
        reader, writer = os.pipe()
        if not (child := os.fork()):
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = memory("VmRSS")
            try:
                images.decode(data, **options)
                outcome = "decoded"
            except JobError as error:
                outcome = error.code
            os.write(writer, json.dumps([outcome, memory("VmHWM") - before]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with os.fdopen(reader) as file:
            return json.loads(file.read())
"""
CONSTANT = 24 << 20  # what libraries load and keep when they are first used


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_bombs_take_no_more_memory_than_the_limit_allows() -> None:
    # given a limit of a megapixel
    peaks = run(
        MEASURE
        + """
    print(json.dumps({
        name: [len(data), *peak(data, image_type="pil", max_pixels=1_000_000)]
        for kind in (hostile_images.too_large, hostile_images.damaged)
        for name, data in {**kind(), "scans": hostile_images.many_scans()}.items()
    }))
    """
    )
    # then
    for name, (size, outcome, added) in peaks.items():
        assert outcome != "decoded", name
        assert added <= 12 * 1_000_000 + size + CONSTANT, name


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_an_image_at_the_limit_takes_18_bytes_a_pixel_at_most() -> None:
    # given images of two megapixels
    peaks = run(
        MEASURE
        + """
    import torch
    encode, width, height = hostile_images.encode, 1600, 1250
    rgb = hostile_images.photo(width, height)
    rgba, palette, icc = rgb.copy(), rgb.quantize(16), hostile_images.swapped_profile()
    rgba.putalpha(200)
    files = {
        "jpeg": encode(rgb, "JPEG"),
        "jpeg-progressive": encode(rgb, "JPEG", subsampling=0, progressive=True),
        "jpeg-profile": encode(rgb, "JPEG", icc_profile=icc),
        "jpeg-cmyk": encode(rgb.convert("CMYK"), "JPEG", subsampling=0, progressive=True),
        "png": encode(rgb, "PNG", compress_level=1),
        "png-alpha": encode(rgba, "PNG", compress_level=1, icc_profile=icc),
        "png-palette": encode(palette, "PNG", compress_level=1),
        "gif": encode(palette, "GIF"),
        "webp": encode(rgb, "WEBP", method=0),
        "webp-alpha": encode(rgba, "WEBP", method=0, icc_profile=icc),
        "bmp": encode(rgb, "BMP"),
        "tiff-strip": encode(rgba, "TIFF", compression="tiff_lzw", tiffinfo={278: height}),
        "avif-alpha": encode(rgba, "AVIF", speed=10, subsampling="4:4:4"),
    }
    print(json.dumps({
        name: [len(data), *peak(data, image_type=image_type, max_pixels=width * height)]
        for (name, data), image_type in zip(files.items(), ["tensor", "pil"] * len(files))
    }))
    """
    )
    # then
    for name, (size, outcome, added) in peaks.items():
        assert outcome == "decoded", name
        assert added <= 18 * 2_000_000 + 2 * size + CONSTANT, name


def test_importing_the_module_imports_no_torch() -> None:
    assert run('import json, cvworker.images; print(json.dumps("torch" in sys.modules))') is False


def test_a_pil_image_is_decoded_without_torch() -> None:
    code = """
        import json, hostile_images
        from cvworker import images
        for data in hostile_images.sound().values():
            images.decode(data, image_type="pil")
        print(json.dumps("torch" in sys.modules))
    """
    assert run(code) is False


def test_the_collection_can_be_written_as_files(tmp_path: pathlib.Path) -> None:
    hostile_images.main(tmp_path)
    for path in tmp_path.rglob("*.*"):
        assert Image.open(io.BytesIO(path.read_bytes()))
    assert {path.name for path in tmp_path.iterdir()} == {
        "coloured",
        "grey",
        "bilevel",
        "too_large",
        "damaged",
        "foreign",
    }
