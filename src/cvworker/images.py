"""Untrusted bytes to an upright RGB image, within limits.

Runs in the DataLoader processes. What a file claims is compared with the limit before a pixel is decoded, and of an
animation or a multi-page file only the first frame ever is. Plain JPEGs (8 bits, grey or colour: nearly all there is)
go to libjpeg-turbo by simplejpeg, everything else to Pillow, told the one format to try: within 2 levels of each other.

Memory: at most 18 bytes for each pixel decoded (WebP; JPEG takes 3 to 10), and the file twice. One exception: an AVIF
that lies about its size is held only by libavif's own limit of 16384 x 16384, which cannot be set from here.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image, ImageCms, ImageOps, UnidentifiedImageError, WebPImagePlugin  # noqa: F401
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, STRIPOFFSETS, TILELENGTH, TILEOFFSETS, TILEWIDTH

from cvworker.errors import ImageInvalid, ImageTooLarge, ImageUnsupported, JobError

if TYPE_CHECKING:  # torch takes seconds to import, and a module that takes PIL images may do without
    import torch

MAX_PIXELS = 50_000_000
# A small file can ask for much without claiming many pixels. No honest one comes near these.
MAX_WORK = 100  # pixels over all scans of a JPEG or all tiles of a TIFF, in multiples of max_pixels
MAX_TIFF_VALUES = 1 << 16  # values of one tag, such as strip offsets: Pillow spends 20 µs and 250 bytes on each
MAX_ICC_BYTES = 2 << 20
SAME_COLOUR = 2  # levels by which a profile may differ from sRGB and still be taken for it

FORMATS = re.compile(  # by the first bytes; the groups have Pillow's names
    rb"(?s)(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<GIF>GIF8[79]a)|(?P<WEBP>RIFF.{4}WEBP)|"
    rb"(?P<BMP>BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0{3})|(?P<TIFF>II\*\0|MM\0\*)|"
    rb"(?P<AVIF>\0.{3}ftyp(?:.{4}){0,30}?avi[fs])"
)

# libjpeg-turbo tells errors apart by text only. At these Pillow has a try: the last is a layout that simplejpeg has no
# name for, the others are warnings after which no pixel need be missing. Pillow goes on after any, but not at a cut.
FOR_PILLOW = re.compile("extraneous bytes|JFIF revision|Adobe color transform|Invalid SOS param|determine subsampling")

ORIENTATION = 0x0112  # the EXIF tag: 1 is upright
FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}  # axes of [3, H, W]; from 5 on H and W change first

AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a DataLoader process has one core
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode(
    data: bytes | memoryview,
    *,
    image_type: Literal["tensor", "pil"] = "tensor",
    min_side: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor | Image.Image:
    """Decode a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF into upright RGB: EXIF applied, sRGB, alpha over white.

    Returns a ``uint8 [3, H, W]`` tensor, or with ``image_type="pil"`` an image of mode RGB. The tensor is a view of an
    ``[H, W, 3]`` array (``[W, H, 3]`` where EXIF turned it by 90°), so not contiguous: the copy would cost more than
    most preprocessing gains by it. It shares no memory with ``data``. With ``min_side``, a JPEG may come scaled down
    by 2, 4 or 8, its smaller side no less than ``min_side`` pixels.

    Raises, apart from a ``MemoryError``, only these, without a traceback (which would keep ``data`` alive):
    :class:`ImageUnsupported` for other formats (told by the first bytes), for no bytes at all, and for pixels without
    an agreed range or way to RGB (32-bit integers, floats, 12-bit JPEG, CIELAB); :class:`ImageTooLarge` for more than
    ``max_pixels`` pixels, before any scaling; :class:`ImageInvalid` for damaged or truncated files. No damage are bytes
    after the end, spare bytes between the segments of a JPEG (cameras write them), broken EXIF and broken profiles.
    """
    with memoryview(data).cast("B") as view:
        try:
            pixels, orientation = _decode(view, min_side or 0, max_pixels)
            return _upright(pixels, orientation, image_type)
        except JobError as error:
            failure: JobError = type(error)(str(error))
        except MemoryError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            failure = ImageTooLarge(f"more than {max_pixels} pixels")
        except (UnidentifiedImageError, struct.error, LookupError, ArithmeticError):
            failure = ImageInvalid("damaged or truncated: its header cannot be read")
        except Exception as error:  # on hostile bytes the decoders raise anything
            failure = ImageInvalid(f"damaged or truncated: {error or type(error).__name__}")
    raise failure


def _limit(width: int, height: int, max_pixels: int, what: str = "") -> None:
    if width * height > max_pixels:
        raise ImageTooLarge(f"{what}{width}x{height} is more than {max_pixels} pixels")


def _decode(view: memoryview, min_side: int, max_pixels: int) -> tuple[Any, int]:
    """The RGB pixels, an image or an array ``uint8 [H, W, 3]``, and the EXIF orientation that they still have."""
    found, scale = FORMATS.match(view), 1
    if not found or not (name := found.lastgroup):
        raise ImageUnsupported("not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF" if view else "no bytes at all")
    if name == "JPEG":
        width, height, components, scans, exif, icc = _read_jpeg_header(view)
        _limit(width, height, max_pixels)
        _limit(width, height * scans, MAX_WORK * max_pixels, f"{scans} scans: ")
        # Powers of two only, as Pillow does: the scales between cost more than they save.
        scale = next((n for n in (8, 4, 2) if 0 < min_side * n <= min(width, height)), 1)
        plain = components == 3 or (components == 1 and not icc)
        if plain and (pixels := _decode_plain_jpeg(view, width, height, scale, icc)) is not None:
            return pixels, orientation_of(exif)
    elif check := {"PNG": _check_png, "GIF": _check_gif, "TIFF": _check_tiff}.get(name):
        check(view, max_pixels)
    # Pillow's own limit must not be the narrower one; None is none.
    Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS and max(Image.MAX_IMAGE_PIXELS, max_pixels)
    with Image.open(io.BytesIO(view), formats=[name]) as image:
        _limit(*image.size, max_pixels)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        image.load()
    # Pillow itself turns TIFFs. The EXIF of a PNG may come after its pixels, so it is asked for only now.
    orientation = 1 if name == "TIFF" else orientation_of(image.info.get("exif"))
    return _to_rgb(image, view[24] if name == "PNG" else 8), orientation


def _read_jpeg_header(view: memoryview) -> tuple[int, int, int, int, bytes | None, bytes | None]:
    """Width, height, components, scans, EXIF and profile: read as libjpeg does, and four times as fast as Pillow."""
    bits, width, height, components, scans, exif, profile, progressive = 8, 0, 0, 0, 1, None, [], False
    at, end = 2, len(view) - 10
    while at < end:
        marker = view[at + 1]
        if view[at] != 0xFF or marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # not the start of a segment
            at += 1
            continue
        start, after = at + 4, at + 2 + (view[at + 2] << 8 | view[at + 3])
        if marker == 0xE1 and exif is None and bytes(view[start : start + 6]) == b"Exif\0\0":
            exif = bytes(view[start:after])
        elif marker == 0xE2 and bytes(view[start : start + 12]) == b"ICC_PROFILE\0":
            profile.append(bytes(view[start + 12 : after]))
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, components = struct.unpack_from(">BHHB", view, start)
            progressive = marker & 3 == 2
        elif marker == 0xDA:
            if progressive or view[start] < components:
                scans = bytes(view[at:]).count(b"\xff\xda")
            break
        at = after
    if bits in (12, 16):
        raise ImageUnsupported(f"a JPEG of {bits} bits")
    whole = profile and len(profile) == profile[0][1]
    return width, height, components, scans, exif, b"".join(part[2:] for part in sorted(profile)) if whole else None


def _decode_plain_jpeg(view: memoryview, width: int, height: int, scale: int, icc: bytes | None) -> Any:
    """The pixels (an image if the profile was applied), or None where simplejpeg cannot or should not decode them."""
    try:
        if simplejpeg.decode_jpeg_header(view)[:2] != (height, width):
            raise ImageInvalid("damaged: it has two sizes")  # and the limit has seen one of them
        pixels = simplejpeg.decode_jpeg(view, min_height=-(-height // scale), min_width=-(-width // scale))
    except ValueError as error:
        if FOR_PILLOW.search(str(error)):
            return None
        raise
    transform = to_srgb(icc, "RGB")
    return ImageCms.applyTransform(Image.fromarray(pixels), transform) if transform else pixels


def _check_png(view: memoryview, max_pixels: int) -> None:
    """Size, and that every critical chunk is there as it was written: Pillow takes pixels without their checksum."""
    _limit(int.from_bytes(view[16:20], "big"), int.from_bytes(view[20:24], "big"), max_pixels)
    at, kind = 8, b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", view, at)
        at += 12 + length
        (checksum,) = struct.unpack_from(">I", view, at - 4)
        if not kind[0] & 0x20 and zlib.crc32(view[at - 8 - length : at - 4]) != checksum:
            raise ImageInvalid("damaged: a checksum is wrong")


def _check_gif(view: memoryview, max_pixels: int) -> None:
    """Size, which a frame may exceed, and that no block is cut (a lost trailer alone is common)."""
    width, height, flags = struct.unpack_from("<HHB", view, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    while at < len(view) and (kind := view[at]) in (0x21, 0x2C):
        at += 2
        if kind == 0x2C:
            x, y, w, h, flags = struct.unpack_from("<HHHHB", view, at - 1)
            _limit(max(width, x + w), max(height, y + h), max_pixels)
            at += 9 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        while size := view[at]:
            at += 1 + size
        at += 1


def _check_tiff(view: memoryview, max_pixels: int) -> None:
    """Size, also of the tiles, which are decoded whole; and nothing that Pillow and libtiff would read differently."""
    entries = list(_directory(view))  # types 1, 3 and 4 are unsigned integers; 1, 2, 6 and 7 are bytes
    tags = {tag: value for tag, _, _, value in entries}
    sides, offsets = (IMAGEWIDTH, IMAGELENGTH, TILEWIDTH, TILELENGTH), (STRIPOFFSETS, TILEOFFSETS)
    if len(tags) < len(entries) or any(tag in sides and kind not in (1, 3, 4) for tag, kind, _, _ in entries):
        raise ImageInvalid("damaged: a tag is there twice or of a wrong type")
    if any(n > MAX_TIFF_VALUES and (tag in offsets or kind not in (1, 2, 6, 7)) for tag, kind, n, _ in entries):
        raise ImageInvalid("damaged: a tag has too many values")
    width, height = tags[IMAGEWIDTH], tags[IMAGELENGTH]
    _limit(width, height, max_pixels)
    across, down = tags.get(TILEWIDTH, width), tags.get(TILELENGTH, height)
    most = max(max_pixels, 1 << 20)  # a small image may well have one large tile
    _limit(across, down, most, "tiles: ")
    _limit(-(-width // across) * across, -(-height // down) * down, MAX_WORK * most, "tiles: ")


def _directory(tiff: bytes | memoryview) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, count and first value (of unsigned integers) in the first directory of a TIFF file or EXIF block."""
    order = ">" if tiff[0] == 0x4D else "<"
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        tag, kind, count, value = struct.unpack_from(order + "HHI4s", tiff, entry)
        yield tag, kind, count, struct.unpack_from(order + {1: "B", 3: "H"}.get(kind, "I"), value)[0]


def orientation_of(exif: Any) -> int:
    """What an EXIF block says: 1 (upright) to 8; 1 where ``exif`` is absent or broken."""
    try:
        value = next(value for tag, _, _, value in _directory(exif.removeprefix(b"Exif\0\0")) if tag == ORIENTATION)
    except Exception:
        return 1
    return value if 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image, png_bits: int) -> Image.Image:
    """Any mode to RGB: wide greys scaled, colours by the profile, alpha over white."""
    icc, clear = image.info.get("icc_profile"), image.info.get("transparency")
    if image.mode in ("I", "F", "LAB"):
        raise ImageUnsupported(f"pixels of mode {image.mode}")
    if image.mode == "L" and clear is not None:  # Pillow scales the pixels to 8 bits, but not which of them is clear
        image.info["transparency"] = clear * 255 // ((1 << png_bits) - 1)
    elif image.mode == "RGB" and clear is not None and png_bits == 16:
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    elif image.mode.startswith("I;16"):
        grey = np.asarray(image)
        image = Image.fromarray((grey >> 8).astype(np.uint8))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data and image.mode != "RGBA":
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    elif image.mode not in ("L", "RGB", "RGBA", "CMYK"):
        image = image.convert("RGB")
    if transform := to_srgb(icc, image.mode):
        image = ImageCms.applyTransform(image, transform, inPlace=image.mode in ("RGB", "RGBA")) or image
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=16)  # making one takes milliseconds, and most images come with one of a few profiles
def to_srgb(icc: Any, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns colours of this profile into sRGB, or None where nothing should: none, broken, as good as sRGB."""
    if not isinstance(icc, bytes) or len(icc) > MAX_ICC_BYTES:
        return None
    to = mode if mode == "RGBA" else "RGB"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, to)
        levels = np.linspace(0, 255, 9, dtype=np.uint8)
        probe = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)).convert(mode)
        before, after = np.asarray(probe.convert(to)), np.asarray(ImageCms.applyTransform(probe, transform))
    except Exception:
        return None
    return transform if np.abs(before.astype(int) - after).max() > SAME_COLOUR else None


def _upright(pixels: Any, orientation: int, image_type: str) -> torch.Tensor | Image.Image:
    """Turn the pixels as EXIF says, and give them the type that is wanted."""
    if image_type == "pil":
        image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels.copy()  # without its decoder
        image.info.clear()  # what it says of EXIF and colours is done
        image.getexif()[ORIENTATION] = orientation
        return ImageOps.exif_transpose(image) if orientation > 1 else image
    import torch

    if isinstance(pixels, Image.Image):  # in bands: at once it would be there three times
        image, rows = pixels, max(1, (1 << 20) // pixels.width)
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for y in range(0, image.height, rows):
            pixels[y : y + rows] = image.crop((0, y, image.width, min(y + rows, image.height)))
    return turned(torch.from_numpy(pixels).permute(2, 0, 1), orientation)


def turned(image: torch.Tensor, orientation: int) -> torch.Tensor:
    """An image ``[3, H, W]``, on any device, turned as the EXIF orientation (1 to 8) says."""
    image = image.transpose(1, 2) if orientation >= 5 else image
    return image.flip(FLIPS[orientation]) if orientation in FLIPS else image
