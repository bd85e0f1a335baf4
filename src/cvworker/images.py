"""Untrusted bytes to an upright RGB image, within limits.

Runs in the DataLoader processes. What a file claims is compared with the limit before a pixel is decoded, and of an
animation or a multi-page file only the first frame ever is.

Plain JPEGs (8 bits, grey or colour: nearly all there is) go to libjpeg-turbo through simplejpeg, everything else to
Pillow, which is told the one format it may try. At every scale the two agree within 2 levels on the same JPEG.

Memory: at most 16 bytes for each pixel decoded, plus the file twice. That is WebP, whose decoder keeps two canvases
of four channels; JPEG takes 3 (progressive 9). One exception: an AVIF that lies about its size is only held by
libavif's own limit of 16384 x 16384, which cannot be set from here.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import simplejpeg

# Pillow finds the plugins of AVIF, TIFF and WebP on its own only by importing every plugin it has.
from PIL import AvifImagePlugin, Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from cvworker.errors import ImageInvalid, ImageTooLarge, ImageUnsupported, JobError

if TYPE_CHECKING:  # torch takes seconds to import, and a module that takes PIL images may do without
    import torch

MAX_PIXELS = 50_000_000

# A small file can ask for much without claiming many pixels. No honest one comes near these.
MAX_WORK = 100  # pixels over all scans of a JPEG or all tiles of a TIFF, in multiples of max_pixels
MAX_TIFF_VALUES = 1 << 18  # values of one tag, such as strip offsets: Pillow spends hundreds of bytes on each
MAX_ICC_BYTES = 2 << 20

SAME_COLOUR = 2  # levels by which a profile may differ from sRGB and still be taken for it

# libjpeg-turbo tells its warnings apart by their text only. After these every pixel is there; others mean damage.
HARMLESS = re.compile("extraneous bytes before marker|JFIF revision number|Adobe color transform|Invalid SOS parameters")

ORIENTATION = 0x0112  # the EXIF tag: 1 is upright
FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}  # axes of [3, H, W]; from 5 on H and W change first

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a DataLoader process has one core
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may ask of the worker, apart from its bytes, which the download limits."""

    max_pixels: int = MAX_PIXELS
    """Width times height, as the file claims them."""


def decode(
    data: bytes | memoryview,
    *,
    image_type: Literal["tensor", "pil"] = "tensor",
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor | Image.Image:
    """Decode a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF into upright RGB: EXIF applied, sRGB, alpha over white.

    Returns a ``uint8 [3, H, W]`` tensor, or with ``image_type="pil"`` an image of mode RGB. The tensor is a view of an
    ``[H, W, 3]`` array (``[W, H, 3]`` where EXIF turned it by 90°), so it is not contiguous: the copy would cost more
    than most preprocessing gains by it. It shares no memory with ``data``. With ``min_side``, a JPEG may come scaled
    down by 2, 4 or 8, its smaller side no less than ``min_side`` pixels.

    The format is found by its first bytes, never by a name. Raises, apart from a ``MemoryError``, only

    - :class:`ImageUnsupported` for anything else, no bytes at all included, and for pixels that have no agreed range
      (integers of 32 bits, floats) or no plain way to RGB (12-bit JPEG, CIELAB);
    - :class:`ImageTooLarge` for more than ``max_pixels`` pixels, before any scaling;
    - :class:`ImageInvalid` for damaged and truncated files. Bytes after the end of the image are no damage, nor are
      spare ones between the segments of a JPEG, which cameras write. Later frames are not decoded, so not vouched for.

    Broken EXIF and colour profiles are ignored. The errors hold no traceback, which would keep ``data`` and half an
    image alive for as long as they are.
    """
    failure: JobError
    with memoryview(data).cast("B") as view:
        try:
            pixels, orientation = _decode(view, _format(view), min_side or 0, max_pixels)
            return _tensor(pixels, orientation) if image_type == "tensor" else _pil(pixels, orientation)
        except JobError as error:
            failure = type(error)(str(error))
        except MemoryError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            failure = ImageTooLarge(str(error))
        except (UnidentifiedImageError, struct.error, IndexError, KeyError):
            failure = ImageInvalid("damaged or truncated: its header cannot be read")
        except Exception as error:  # on hostile bytes the decoders raise anything
            failure = ImageInvalid(f"damaged or truncated: {error or type(error).__name__}")
    raise failure


def _format(view: memoryview) -> str:
    """Pillow's name of the accepted format that the first bytes belong to."""
    head = bytes(view[:32])
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in (12, 16, 40, 52, 56, 64, 108, 124):
        return "BMP"
    if head[4:8] == b"ftyp":
        brands = bytes(view[8 : min(int.from_bytes(head[:4], "big"), 1024)])
        if not {b"avif", b"avis"}.isdisjoint(brands[i : i + 4] for i in range(0, len(brands), 4)):
            return "AVIF"
    raise ImageUnsupported("not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF" if head else "no bytes at all")


def _limit(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLarge(f"{width}x{height} is more than {max_pixels} pixels")


def _decode(view: memoryview, name: str, min_side: int, max_pixels: int) -> tuple[Any, int]:
    """The RGB pixels, an image or an array ``uint8 [H, W, 3]``, and the EXIF orientation that they still have."""
    scale = 1
    if name == "JPEG":
        header = _read_jpeg_header(view)
        if header.bits != 8:
            raise ImageUnsupported(f"a JPEG of {header.bits} bits")
        _limit(header.width, header.height, max_pixels)
        _limit(header.width * header.height, header.scans, MAX_WORK * max_pixels)
        # Powers of two only, as Pillow does: the scales between cost more than they save.
        scale = next((n for n in (8, 4, 2) if 0 < min_side * n <= min(header.width, header.height)), 1)
        if (array := _decode_plain_jpeg(view, header, scale)) is not None:
            return array, _orientation(header.exif)
    elif check := {"PNG": _check_png, "GIF": _check_gif, "TIFF": _check_tiff}.get(name):
        check(view, max_pixels)

    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit must not be the narrower one
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    with Image.open(io.BytesIO(view), formats=[name]) as image:
        _limit(*image.size, max_pixels)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        image.load()
    # Pillow itself turns TIFFs. The EXIF of a PNG may come after its pixels, so it is asked for only now.
    return _to_rgb(image), 1 if name == "TIFF" else _orientation(image.info.get("exif"))


@dataclass(slots=True)
class _JpegHeader:
    width: int = 0
    height: int = 0
    bits: int = 8
    components: int = 0
    scans: int = 1
    exif: bytes | None = None
    icc: bytes | None = None


def _read_jpeg_header(view: memoryview) -> _JpegHeader:
    """Read the segments up to the pixels, as libjpeg will; Pillow's own reading would take four times as long."""
    header, profile, progressive = _JpegHeader(), [], False
    at, end = 2, len(view) - 10
    while at < end:
        marker = view[at + 1]
        if view[at] != 0xFF or marker == 0xFF:  # spare bytes
            at += 1
            continue
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # nothing belongs to it
            at += 2
            continue
        start, after = at + 4, at + 2 + (view[at + 2] << 8 | view[at + 3])
        if marker == 0xE1 and header.exif is None and view[start : start + 6] == b"Exif\0\0":
            header.exif = bytes(view[start:after])
        elif marker == 0xE2 and view[start : start + 12] == b"ICC_PROFILE\0":
            profile.append(bytes(view[start + 12 : after]))
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            header.bits, header.height, header.width, header.components = struct.unpack_from(">BHHB", view, start)
            progressive = marker & 3 == 2
        elif marker == 0xDA:
            if progressive or view[start] < header.components:
                header.scans = bytes(view[at:]).count(b"\xff\xda")
            break
        at = after
    if profile and len(profile) == profile[0][1]:
        header.icc = b"".join(part[2:] for part in sorted(profile))
    return header


def _decode_plain_jpeg(view: memoryview, header: _JpegHeader, scale: int) -> Any:
    """The pixels as ``uint8 [H, W, 3]``, or None where simplejpeg cannot or should not decode them."""
    if header.components != 3 and (header.components != 1 or header.icc):
        return None
    try:
        if simplejpeg.decode_jpeg_header(view)[:2] != (header.height, header.width):
            return None
    except ValueError:  # damage, or a sampling of the colours that it has no name for
        return None
    try:
        sides = {"min_height": -(-header.height // scale), "min_width": -(-header.width // scale)}
        array = simplejpeg.decode_jpeg(view, **sides)
    except ValueError as error:
        if HARMLESS.search(str(error)):
            return None  # Pillow goes on after a warning, yet notices a cut
        raise
    transform = _to_srgb(header.icc, "RGB")
    return ImageCms.applyTransform(Image.fromarray(array), transform) if transform else array


def _check_png(view: memoryview, max_pixels: int) -> None:
    """Size, and that every critical chunk is there as it was written: Pillow takes pixels without their checksum."""
    _limit(*struct.unpack_from(">II", view, 16), max_pixels)
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", view, at)
        (checksum,) = struct.unpack_from(">I", view, at + 8 + length)
        if not kind[0] & 0x20 and zlib.crc32(view[at + 4 : at + 8 + length]) != checksum:
            raise ImageInvalid("damaged: a checksum is wrong")
        at += 12 + length


def _check_gif(view: memoryview, max_pixels: int) -> None:
    """Size with the first frame, which may exceed it, and that no block is cut (a lost trailer alone is common)."""
    width, height, flags = struct.unpack_from("<HHB", view, 6)
    at, first = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), True
    while at < len(view) and (kind := view[at]) != 0x3B:
        at += 1
        if kind == 0x2C:
            x, y, w, h, flags = struct.unpack_from("<HHHHB", view, at)
            if first:
                _limit(max(width, x + w), max(height, y + h), max_pixels)
            first = False
            at += 10 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif kind == 0x21:
            at += 1
        else:
            continue
        while size := view[at]:
            at += 1 + size
        at += 1


def _check_tiff(view: memoryview, max_pixels: int) -> None:
    """Size, also of the tiles, which are decoded whole; and nothing that Pillow and libtiff would read differently."""
    entries = _directory(view)
    tags = {tag: (kind, value) for tag, kind, _, value in entries}
    if len(tags) < len(entries) or any(tags.get(tag, (3,))[0] not in (1, 3, 4) for tag in (256, 257, 322, 323)):
        raise ImageInvalid("damaged: a tag is there twice or of a wrong type")
    if any(count > MAX_TIFF_VALUES for tag, kind, count, _ in entries if tag in (273, 324) or kind not in (1, 2, 6, 7)):
        raise ImageInvalid("a tag has too many values")
    width, height = tags[256][1], tags[257][1]
    _limit(width, height, max_pixels)
    if 322 in tags or 323 in tags:
        across, down = tags[322][1], tags[323][1]
        _limit(across, down, max_pixels)
        _limit(-(-width // across) * across, -(-height // down) * down, MAX_WORK * max_pixels)


def _directory(tiff: bytes | memoryview) -> list[tuple[int, int, int, int]]:
    """Tag, type, count and first value (of unsigned integers) in the first directory of a TIFF file or EXIF block."""
    big = {b"II": False, b"MM": True}[bytes(tiff[:2])]
    prefix = ">" if big else "<"
    (at,) = struct.unpack_from(prefix + "I", tiff, 4)
    (entries,) = struct.unpack_from(prefix + "H", tiff, at)
    return [
        (tag, kind, count, int.from_bytes(value[: {1: 1, 3: 2}.get(kind, 4)], "big" if big else "little"))
        for tag, kind, count, value in struct.iter_unpack(prefix + "HHI4s", tiff[at + 2 : at + 2 + 12 * entries])
    ]


def _orientation(exif: Any) -> int:
    """1 (upright) to 8; 1 where ``exif`` is absent or broken."""
    try:
        values = [value for tag, _, _, value in _directory(exif.removeprefix(b"Exif\0\0")) if tag == ORIENTATION]
    except Exception:
        return 1
    return values[0] if values and 1 <= values[0] <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to a new image of mode RGB: wide greys scaled, colours by the profile, alpha over white."""
    icc = image.info.get("icc_profile")
    if image.mode in ("I", "F", "LAB"):
        raise ImageUnsupported(f"pixels of mode {image.mode}")
    if image.mode.startswith("I;16"):
        wide = np.asarray(image)
        clear = image.info.get("transparency")
        shift = 4 if getattr(image, "tag_v2", {}).get(258) == (12,) else 8
        image = Image.fromarray((wide >> shift).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray((wide != clear).astype(np.uint8) * np.uint8(255)))
    if image.has_transparency_data and image.mode != "RGBA":
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    elif image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        image = image.convert("RGB")
    if transform := _to_srgb(icc, image.mode):
        in_place = image.mode in ("RGB", "RGBA")
        image = ImageCms.applyTransform(image, transform, inPlace=in_place) or image
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image.convert("RGB")


@functools.lru_cache(maxsize=16)
def _to_srgb(icc: Any, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns ``mode`` with this profile into sRGB; None where nothing should: no profile, broken, or as sRGB.

    Kept, because making one takes milliseconds and most images come with one of a few profiles.
    """
    if not icc or len(icc) > MAX_ICC_BYTES:
        return None
    to = mode if mode == "RGBA" else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, to)
        if mode == "CMYK":
            return transform
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        probe = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)).convert(mode)
        before, after = np.asarray(probe.convert(to)), np.asarray(ImageCms.applyTransform(probe, transform))
        return None if np.abs(before.astype(int) - after).max() <= SAME_COLOUR else transform
    except Exception:
        return None


def _tensor(pixels: Any, orientation: int) -> torch.Tensor:
    import torch

    if isinstance(pixels, Image.Image):  # in bands: at once it would be there three times
        image, rows = pixels, max(1, (1 << 20) // pixels.width)
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for y in range(0, image.height, rows):
            pixels[y : y + rows] = image.crop((0, y, image.width, min(y + rows, image.height)))
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    if orientation >= 5:
        tensor = tensor.transpose(1, 2)
    return tensor.flip(FLIPS[orientation]) if orientation in FLIPS else tensor


def _pil(pixels: Any, orientation: int) -> Image.Image:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.info.clear()  # what it says of EXIF and profile is done
    if orientation > 1:
        image.getexif()[ORIENTATION] = orientation
        image = ImageOps.exif_transpose(image)
    return image
