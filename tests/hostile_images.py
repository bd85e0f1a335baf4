"""Images that are hard to decode, as data: sound ones of every kind, and those that somebody made to do harm.

All sound ones show :data:`QUADRANTS`. ``python tests/hostile_images.py FOLDER`` writes the whole collection as files.
"""

from __future__ import annotations

import functools
import io
import pathlib
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

WIDTH, HEIGHT = 96, 64
QUADRANTS = ((220, 30, 40), (30, 200, 60), (40, 60, 210), (255, 255, 255))  # left to right, top to bottom
GREYS = (0, 0x55, 0xAA, 0xFF)
EXIF = b"Exif\0\0"


def quadrants(colours: Any = QUADRANTS, dtype: Any = np.uint8) -> np.ndarray:
    """``[64, 96, ...]``, one colour in each quarter."""
    a, b, c, d = (np.array(colour, dtype) for colour in colours)
    return np.array([[a, b], [c, d]]).repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(quadrants()).convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    if others := options.get("append_images"):  # copies, because Pillow leaves its encoders' settings in the image
        options["append_images"] = [other.copy() for other in others]
    image.copy().save(file, kind, **options)
    return file.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: what a JPEG of a photo costs to decode."""
    random = np.random.default_rng(seed)
    smooth = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((width, height), 3)
    noise = random.normal(0, 6, (height, width, 1))
    return Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8))


# --- Files from their parts


def png(width: int, height: int, bits: int, colour: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """``pixels`` are deflated rows, each after its filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def rows(array: np.ndarray) -> bytes:
    """What a PNG keeps of an array of big-endian samples."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))


def tiff(tags: list[tuple[int, int, bytes | list[int]]], payload: bytes = b"", order: str = "<") -> bytes:
    """``payload`` starts at byte 8. A tag is its number, its type (1 byte, 3 short, 4 long) and its values."""
    letter = {1: "B", 3: "H", 4: "I"}
    payload += b"\0" * (len(payload) % 2)
    at = 8 + len(payload)
    entries, elsewhere = b"", b""
    for tag, kind, values in tags:
        data = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{letter[kind]}", *values)
        count = len(data) // struct.calcsize(letter[kind])
        if len(data) > 4:
            where = at + 2 + 12 * len(tags) + 4 + len(elsewhere)
            elsewhere += data + b"\0" * (len(data) % 2)
            data = struct.pack(order + "I", where)
        entries += struct.pack(order + "HHI", tag, kind, count) + data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    return head + payload + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0" + elsewhere


def plain_tiff(array: np.ndarray, *tags: tuple[int, int, Any], compression: int = 1, order: str = "<") -> bytes:
    """One strip (unless ``tags`` say otherwise) of grey or RGB samples."""
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data, 1) if compression == 8 else data
    samples = array.shape[2] if array.ndim == 3 else 1
    given = {
        256: (4, [array.shape[1]]),
        257: (4, [array.shape[0]]),
        258: (3, [array.itemsize * 8] * samples),
        259: (3, [compression]),
        262: (3, [2 if samples > 1 else 1]),
        273: (4, [8]),
        277: (3, [samples]),
        278: (4, [array.shape[0]]),
        279: (4, [len(data)]),
    }
    given |= {tag: (kind, values) for tag, kind, values in tags}
    return tiff([(tag, *given[tag]) for tag in sorted(given)], data, order)


def tiled_tiff(width: int, height: int, across: int, down: int, tiles: list[bytes], compression: int = 1) -> bytes:
    """RGB samples in tiles of ``across`` x ``down`` pixels."""
    starts = [8 + sum(map(len, tiles[:n])) for n in range(len(tiles))]
    sizes: list[tuple[int, int, Any]] = [(256, 4, [width]), (257, 4, [height]), (258, 3, [8, 8, 8])]
    kinds: list[tuple[int, int, Any]] = [(259, 3, [compression]), (262, 3, [2]), (277, 3, [3])]
    places = [(322, 4, [across]), (323, 4, [down]), (324, 4, starts), (325, 4, [len(tile) for tile in tiles])]
    return tiff([*sizes, *kinds, *places], b"".join(tiles))


def jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """The same JPEG, claiming another size."""
    at = next(at for marker in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(marker)) > 0)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def jpeg_segment(data: bytes, marker: int, payload: bytes) -> bytes:
    """The same JPEG with one more segment, the first."""
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload + data[2:]


def exif(orientation: int, order: str = "<") -> bytes:
    """An EXIF block with a maker's name and an orientation."""
    return tiff([(0x010F, 1, b"cvworker\0"), (0x0112, 3, [orientation])], order=order)


@functools.cache
def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged: what it should do cannot be overlooked."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"rgb?").replace(b"bXYZ", b"rXYZ").replace(b"rgb?", b"bXYZ")


@functools.cache
def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


# --- The collection


@functools.cache
def coloured() -> dict[str, bytes]:
    """Shows QUADRANTS, within a few levels where the format loses some."""
    rgb, clear = picture(), picture("RGBA")
    clear.putalpha(Image.fromarray(quadrants((255, 255, 255, 0))))
    clear.paste((0, 0, 0, 0), (WIDTH // 2, HEIGHT // 2, WIDTH, HEIGHT))  # white only by what is under it
    palette = rgb.quantize(8)
    others = [rgb.rotate(180), Image.new("RGB", rgb.size)]
    cmyk = 255 - np.asarray(picture("CMYK"))
    wide = quadrants(QUADRANTS, np.uint16) * 257
    alpha = np.dstack([wide, quadrants((65535, 65535, 65535, 0), np.uint16)])
    palette_alpha = Image.fromarray(quadrants((0, 1, 2, 3)))
    palette_alpha.putpalette(bytes((*QUADRANTS[0], *QUADRANTS[1], *QUADRANTS[2], 0, 0, 0)))
    tiles = np.zeros((HEIGHT, 128, 3), np.uint8)
    tiles[:, :WIDTH] = quadrants()
    animated: dict[str, Any] = {"save_all": True, "append_images": others, "duration": 40}
    return {
        "jpeg-420": encode(rgb, "JPEG"),
        "jpeg-444": encode(rgb, "JPEG", subsampling=0),
        "jpeg-422": encode(rgb, "JPEG", subsampling=1),
        "jpeg-440": simplejpeg.encode_jpeg(quadrants(), colorsubsampling="440"),
        "jpeg-411": simplejpeg.encode_jpeg(quadrants(), colorsubsampling="411"),
        "jpeg-rgb": encode(rgb, "JPEG", keep_rgb=True),
        "jpeg-progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg-restart": encode(rgb, "JPEG", restart_marker_blocks=1),
        "jpeg-cmyk": encode(picture("CMYK"), "JPEG"),
        "jpeg-ycck": simplejpeg.encode_jpeg(np.ascontiguousarray(cmyk), colorspace="CMYK"),
        "jpeg-several": encode(rgb, "MPO", save_all=True, append_images=others),
        "jpeg-comment": jpeg_segment(encode(rgb, "JPEG"), 0xFE, b"\xff\xd8\xff\xda" * 9),
        "png-rgb": encode(rgb, "PNG"),
        "png-rgba": encode(clear, "PNG"),
        "png-palette": encode(palette, "PNG"),
        "png-palette-alpha": encode(palette_alpha, "PNG", transparency=3),
        "png-clear-colour": encode(rgb, "PNG", transparency=(255, 255, 255)),
        "png-rgb-16": png(WIDTH, HEIGHT, 16, 2, rows(wide.astype(">u2"))),
        "png-rgba-16": png(WIDTH, HEIGHT, 16, 6, rows(alpha.astype(">u2"))),
        "png-animated": encode(rgb, "PNG", **animated),
        "gif": encode(palette, "GIF"),
        "gif-clear": encode(palette_alpha, "GIF", transparency=3),
        "gif-animated": encode(rgb, "GIF", **animated),
        "webp": encode(rgb, "WEBP", quality=95),
        "webp-lossless": encode(rgb, "WEBP", lossless=True),
        "webp-rgba": encode(clear, "WEBP", lossless=True),
        "webp-animated": encode(rgb, "WEBP", lossless=True, **animated),
        "bmp": encode(rgb, "BMP"),
        "bmp-palette": encode(palette, "BMP"),
        "bmp-rgba": encode(picture("RGBA"), "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff-big-endian": plain_tiff(quadrants(), order=">"),
        "tiff-rgba": encode(clear, "TIFF"),
        "tiff-palette": encode(palette, "TIFF"),
        "tiff-cmyk": encode(picture("CMYK"), "TIFF"),
        "tiff-lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff-deflate": encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-packbits": encode(rgb, "TIFF", compression="packbits"),
        "tiff-jpeg": encode(rgb, "TIFF", compression="jpeg", quality=95),
        "tiff-rgb-16": plain_tiff(wide),
        "tiff-rgb-16-big-endian": plain_tiff(wide, order=">"),
        "tiff-tiles": tiled_tiff(WIDTH, HEIGHT, 64, HEIGHT, [tiles[:, :64].tobytes(), tiles[:, 64:].tobytes()]),
        "tiff-pages": encode(rgb, "TIFF", save_all=True, append_images=others),
        "avif": encode(rgb, "AVIF", quality=95),
        "avif-rgba": encode(clear, "AVIF", quality=95),
        "avif-animated": encode(rgb, "AVIF", quality=95, **animated),
    }


@functools.cache
def grey() -> dict[str, bytes]:
    """Shows GREYS; those of 16 bits are 257 times as much."""
    levels, wide = quadrants(GREYS), quadrants(GREYS, np.uint16) * 257
    image = Image.fromarray(levels)
    clear = Image.fromarray(quadrants((0, 0x55, 0xAA, 7)))
    clear.putalpha(Image.fromarray(quadrants((255, 255, 255, 0))))
    two_bits = np.packbits(np.unpackbits(levels[..., None], axis=2)[:, :, :2].reshape(HEIGHT, -1), axis=1)
    return {
        "jpeg": encode(image, "JPEG"),
        "jpeg-progressive": encode(image, "JPEG", progressive=True),
        "png": encode(image, "PNG"),
        "png-alpha": encode(clear, "PNG"),
        "png-2": png(WIDTH, HEIGHT, 2, 0, rows(two_bits)),
        "png-2-clear": png(WIDTH, HEIGHT, 2, 0, rows(two_bits), (b"tRNS", b"\0\3")),
        "png-16": png(WIDTH, HEIGHT, 16, 0, rows(wide.astype(">u2"))),
        "png-16-clear": png(WIDTH, HEIGHT, 16, 0, rows(wide.astype(">u2")), (b"tRNS", b"\xff\xff")),
        "gif": encode(image, "GIF"),
        "webp": encode(image, "WEBP", lossless=True),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
        "tiff-16": plain_tiff(wide),
        "tiff-16-big-endian": plain_tiff(wide, order=">"),
        "tiff-16-deflate": plain_tiff(wide, compression=8),
        "avif": encode(image, "AVIF", quality=95),
    }


@functools.cache
def bilevel() -> dict[str, bytes]:
    """Black in the first quarter, white in the others."""
    image = Image.fromarray(quadrants((0, 255, 255, 255))).convert("1")
    return {
        "png": encode(image, "PNG"),
        "bmp": encode(image, "BMP"),
        "gif": encode(image, "GIF"),
        "tiff": encode(image, "TIFF"),
        "tiff-group4": encode(image, "TIFF", compression="group4"),
    }


def sound() -> dict[str, bytes]:
    return {
        f"{name}-{kind}": data
        for kind, files in (("coloured", coloured()), ("grey", grey()), ("bilevel", bilevel()))
        for name, data in files.items()
    }


def cuts(data: bytes) -> Iterator[bytes]:
    """Cut at every tenth, and by the last bytes."""
    for tenth in range(1, 10):
        yield data[: len(data) * tenth // 10]
    yield data[:-16]


@functools.cache
def too_large() -> dict[str, bytes]:
    """A few bytes that claim, and mostly would deliver, a few hundred million pixels or much more."""
    zeros = zlib.compress(bytes(20_001 * 2_500), 9)
    gif = encode(picture("P"), "GIF")
    frame = gif.index(b",\0\0\0\0")
    lossless = bytearray(encode(Image.new("RGB", (64, 64), "red"), "WEBP", lossless=True))
    others = int.from_bytes(lossless[21:25], "little") >> 28 << 28
    lossless[21:25] = (others | 16382 << 14 | 16382).to_bytes(4, "little")
    animated = bytearray(coloured()["webp-animated"])
    animated[24:30] = b"\xfe\xff\x00\xfe\xff\x00"
    avif = bytearray(coloured()["avif"])
    ispe = avif.index(b"ispe")
    avif[ispe + 8 : ispe + 16] = struct.pack(">II", 16384, 16384)
    canvas = zlib.compress(bytes(30_000 * 30_000 // 8), 9)
    bits: list[tuple[int, int, Any]] = [(258, 3, [1]), (259, 3, [8]), (262, 3, [1]), (277, 3, [1])]
    return {
        "png": png(20_000, 20_000, 1, 0, zeros),
        "png-claim": png(2**31 - 1, 2**31 - 1, 8, 6, b""),
        "png-animated": png(20_000, 20_000, 1, 0, zeros, (b"acTL", struct.pack(">II", 1000, 0))),
        "gif-canvas": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "gif-frame": gif[: frame + 5] + b"\xff\xff\xff\xff" + gif[frame + 9 :],
        "gif-place": gif[: frame + 1] + b"\xff\xff\xff\xff" + gif[frame + 5 :],
        "webp": bytes(lossless),
        "webp-animated": bytes(animated),
        "tiff": tiff([(256, 4, [30_000]), (257, 4, [30_000]), (273, 4, [8]), *bits, (279, 4, [len(canvas)])], canvas),
        "tiff-claim": plain_tiff(np.zeros((8, 8), np.uint8), (256, 4, [2**32 - 1]), (257, 4, [2**32 - 1])),
        "tiff-tile": tiled_tiff(64, 64, 8_192, 8_192, [zlib.compress(bytes(8_192 * 8_192 * 3), 1)], compression=8),
        "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, 0, 0, 0, 0, 0, 0),
        "bmp-runs": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 54, 0, 1078, 40, 30_000, 30_000, 1, 8, 1, 0, 0, 0, 0, 0)
        + bytes(1024)
        + b"\xff\0" * 9,
        "jpeg": jpeg_size(encode(picture(), "JPEG"), 65_500, 65_500),
        "jpeg-claim": b"\xff\xd8\xff\xc0\0\x0b\x08\xff\xdc\xff\xdc\1\1\x11\0" + bytes(20),
        "jpeg-progressive": jpeg_size(coloured()["jpeg-progressive"], 65_500, 65_500),
        "jpeg-cmyk": jpeg_size(encode(picture("CMYK"), "JPEG"), 65_500, 65_500),
        "avif": bytes(avif),
    }


@functools.cache
def many_scans() -> bytes:
    """A progressive JPEG of 96x64 pixels with 100,000 scans: each has to be decoded."""
    data = encode(picture("CMYK"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 100_000 + data[-2:]


@functools.cache
def damaged() -> dict[str, bytes]:
    """Of an accepted format, and no image."""
    jpeg, image = coloured()["jpeg-444"], coloured()["png-rgb"]
    noisy = encode(photo(WIDTH, HEIGHT), "JPEG")
    pixels = image.index(b"IDAT") + 12
    grey = np.zeros((64, 64), np.uint8)
    files = {
        "jpeg-magic-only": b"\xff\xd8\xff",
        "jpeg-and-then-png": b"\xff\xd8\xff" + image,
        "jpeg-no-end": jpeg[:-2],
        "jpeg-zeros-for-end": noisy[: len(noisy) // 2] + bytes(len(noisy) // 2),
        "jpeg-pixels-lost": noisy[: len(noisy) // 2] + noisy[len(noisy) * 3 // 4 :],
        "jpeg-no-pixels": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        "jpeg-size-0": jpeg_size(jpeg, 0, 0),
        "png-magic-only": b"\x89PNG\r\n\x1a\n",
        "png-bit-in-pixels": image[:pixels] + bytes([image[pixels] ^ 1]) + image[pixels + 1 :],
        "png-no-end": image[:-12],
        "png-size-0": png(0, 0, 8, 2, b""),
        "png-no-pixels": png(8, 8, 8, 2, b""),
        "png-odd-bits": png(8, 8, 3, 2, rows(np.zeros((8, 24), np.uint8))),
        "png-long-chunk": image[:33] + b"\xff\xff\xff\xffIDAT" + image[33:],
        "gif-magic-only": b"GIF89a",
        "gif-no-frame": encode(picture("P"), "GIF")[:13] + b"\0" * 768 + b";",
        "webp-magic-only": b"RIFF\4\0\0\0WEBP",
        "webp-no-frame": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(10),
        "bmp-magic-only": b"BM" + bytes(12) + b"\x28\0\0\0",
        "tiff-magic-only": b"II*\0",
        "tiff-directory-outside": b"II*\0\xff\xff\xff\x7f",
        "tiff-tags-twice": plain_tiff(grey)[:-4].replace(b"\0\1\4\0\1\0\0\0", b"\1\1\4\0\1\0\0\0") + bytes(4),
        "tiff-strips": plain_tiff(grey, (273, 4, struct.pack("<I", 8) * 200_000), (278, 4, [1])),
        "tiff-strips-as-bytes": plain_tiff(grey, (273, 1, b"\x08" * 200_000), (278, 4, [1])),
        "tiff-samples": plain_tiff(grey, (258, 3, b"\x08\0" * 200_000)),
        "tiff-tile-0": plain_tiff(grey, (322, 4, [0]), (323, 4, [0])),
        "tiff-tile-of-another-type": tiled_tiff(64, 64, 64, 64, [bytes(12288)]).replace(b"\x42\1\4\0", b"\x42\1\x10\0"),
        "avif-magic-only": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
    }
    for name, data in {"jpeg": jpeg, "png": image, "webp": coloured()["webp"], "avif": coloured()["avif"]}.items():
        files[f"{name}-middle-lost"] = data[: len(data) // 3] + data[len(data) * 2 // 3 :]
    return files


@functools.cache
def foreign() -> dict[str, bytes]:
    """Not of an accepted format, though Pillow would open most."""
    image = picture()
    kinds = ("DDS", "EPS", "ICNS", "ICO", "JPEG2000", "PCX", "PDF", "PPM", "QOI", "SGI", "TGA")
    files = {kind.lower(): encode(image, kind) for kind in kinds}
    return files | {
        "nothing": b"",
        "one-byte": b"\xff",
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 64, 64, 8, 3) + bytes(12) + bytes(64 * 64 * 3),
        "fits": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + bytes(2880),
        "xbm": encode(picture("1"), "XBM"),
        "wmf": b"\xd7\xcd\xc6\x9a\0\0" + bytes(60),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "html": b"<!doctype html><title>404</title>",
        "bm-text": b"BMW sells cars, and this text starts like a bitmap.",
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        "mp4": b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + bytes(100),
        "jxl": b"\xff\x0a" + bytes(100),
        "bigtiff": b"II+\0\x08\0\0\0" + bytes(100),
        "wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
        "spaces-before-png": b" " + encode(image, "PNG"),
    }


BROKEN_EXIF: dict[str, bytes] = {
    "empty": b"",
    "header-cut": b"II*\0",
    "order-unknown": b"XX*\0\x08\0\0\0" + bytes(20),
    "directory-outside": b"MM\0*\xff\xff\xff\xff",
    "directory-cut": b"II*\0\x08\0\0\0\xff\xff" + b"\x12\1" * 9,
    "orientation-0": exif(0),
    "orientation-9": exif(9),
    "orientation-65535": exif(0xFFFF, ">"),
    "orientation-text": tiff([(0x0112, 1, b"six, please\0")]),
    "noise": np.random.default_rng(0).bytes(200),
}


def main(folder: pathlib.Path) -> None:
    for kind in (coloured, grey, bilevel, too_large, damaged, foreign):
        for name, data in kind().items():
            path = folder / kind.__name__ / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
