"""Pictures good and bad, and hosts that serve them as they should and should not."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modules.contract_peers import OddHost, closed_port
from world import World, picture

MAX_BYTES = 100_000
MAX_PIXELS = 1_000_000


def jpeg(size: tuple[int, int] = (320, 240)) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(1).randbytes(3 * size[0] * size[1])).save(file, "JPEG", quality=50)
    return file.getvalue()


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 0, 77)).save(file, kind)
    return file.getvalue()


def png_of(length: int) -> bytes:
    """A picture of exactly so many bytes."""

    def padded(padding: int) -> bytes:
        file, info = io.BytesIO(), PngInfo()
        info.add_text("pad", "x" * padding)
        Image.new("RGB", (64, 48), (1, 0, 77)).save(file, "PNG", pnginfo=info)
        return file.getvalue()

    return padded(length - len(padded(0)))


def image_urls(here: World, odd: OddHost) -> dict[str, str]:
    """What each case asks for; the hosts answer from now on."""

    def on(*behaviours: Callable[[Any], None]) -> str:
        return odd.on(f"/{len(odd.behaviours)}", *behaviours)

    def status(number: int) -> str:
        return on(lambda exchange: exchange.reply(number, b"no"))

    def serve(body: bytes) -> Callable[[Any], None]:
        return lambda exchange: exchange.reply(200, body)

    def short(exchange: Any) -> None:
        exchange.reply(200, good[:50], Content_Length=str(len(good)))
        exchange.hang_up()

    def to(location: str) -> str:
        return on(lambda exchange: exchange.reply(302, Location=location))

    good = picture(7)
    plain = on(serve(good))
    authority = f"127.0.0.1:{odd.port}"
    return {
        "404": status(404),
        "410": status(410),
        "400": status(400),
        "401": status(401),
        "403": status(403),
        "too many bytes by content-length": on(lambda exchange: exchange.reply(200, good, Content_Length="5000000")),
        "too many bytes without a length": on(lambda exchange: exchange.chunked_without_end()),
        "one byte too many": on(serve(png_of(MAX_BYTES + 1))),
        "exactly as many bytes as allowed": on(serve(png_of(MAX_BYTES))),
        "too many pixels": on(serve(picture(7, (20_000, 2_000)))),
        "one row of pixels too many": on(serve(picture(7, (1000, 1001)))),
        "exactly as many pixels as allowed": on(serve(picture(7, (1000, 1000)))),
        "html": on(serve(b"<!DOCTYPE html><html><body>Not here</body></html>")),
        "svg": on(serve(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')),
        "eps": on(serve(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")),
        "psd": on(serve(b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x09\0\0\0\x09\0\x08\0\3" + bytes(600))),
        "truncated jpeg": on(serve(jpeg()[:-4000])),
        "truncated png": on(serve(encoded("PNG")[:-30])),
        "jpeg header and garbage": on(serve(jpeg()[:20] + b"garbage" * 50)),
        "s3 object": "s3://pictures/folder/7.png",
        "s3 object missing": "s3://pictures/folder/8.png",
        "s3 bucket not allowed": "s3://secrets/7.png",
        "s3 without a key": "s3://pictures",
        "s3 object too large": "s3://pictures/large.png",
        "file": "file:///etc/hostname",
        "ftp": "ftp://127.0.0.1/7.png",
        "data": "data:image/png;base64,AAAA",
        "userinfo": f"http://user:hunter2@{authority}/0",
        "user alone": f"http://user@{authority}/0",
        "port out of range": "http://127.0.0.1:99999/7.png",
        "port that is no number": "http://127.0.0.1:http/7.png",
        "no host": "http:///7.png",
        "space in the host": "http://127.0. 0.1/7.png",
        "escape in the host": f"http://127.0.0%2e1:{odd.port}/0",
        "open bracket": "http://[::1/7.png",
        "redirect to a file": to("file:///etc/hostname"),
        "redirect to 404": to(odd.url + "/nothing"),
        "redirect": to(plain),
        "preprocess raises": here.images.add("/green.png", picture(256), "image/png"),
        "process raises": here.images.add("/250.png", picture(250), "image/png"),
        "result is not JSON": here.images.add("/252.png", picture(252), "image/png"),
        "result is not finite": here.images.add("/253.png", picture(253), "image/png"),
        "500 for ever": odd.on("/500", lambda exchange: exchange.reply(500)),
        "429 for ever": status(429),
        "connection refused": f"http://127.0.0.1:{closed_port()}/7.png",
        "connection reset for ever": on(lambda exchange: exchange.reset()),
        "name that does not resolve": "http://no-such-host.invalid/7.png",
        "no answer in time": odd.on("/never", lambda exchange: exchange.never()),
        "a byte now and then": odd.on("/drip", lambda exchange: exchange.drip(good, 0.2)),
        "body shorter than promised": on(short),
        "png": plain,
        "jpeg": on(serve(encoded("JPEG"))),
        "webp": on(serve(encoded("WEBP"))),
        "upper case scheme": plain.replace("http", "HTTP"),
        "fragment": plain + "#top",
        "query": plain + "?size=a%20b&x=%C3%A9",
        "path beyond ascii": odd.picture("/%C3%BC%E2%82%AC.png", good).replace("%C3%BC%E2%82%AC", "ü€"),
        "500 once": on(lambda exchange: exchange.reply(500), serve(good)),
        "429 once": on(lambda exchange: exchange.reply(429), serve(good)),
        "connection reset once": on(lambda exchange: exchange.reset(), serve(good)),
        "body shorter than promised once": on(short, serve(good)),
    }
