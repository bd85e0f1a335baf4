"""URLs that nobody may make the worker speak to, as data: each is one (why, url) pair.

``{port}`` stands for the canary's port. :data:`NAMES` are host names with the addresses a hostile zone gives them.
"""

from __future__ import annotations

import ipaddress

# One or more from every range that is refused, its edges where these are easily got wrong.
REFUSED_V4 = [
    *("0.0.0.0", "0.0.0.1", "0.255.255.255"),
    *("10.0.0.0", "10.255.255.255"),
    *("100.64.0.1", "100.100.100.200", "100.127.255.255"),
    *("127.0.0.1", "127.0.0.2", "127.255.255.254"),
    *("168.63.129.16", "169.254.169.254", "169.254.170.2"),
    *("172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255"),
    *("192.0.0.1", "192.0.0.8", "192.0.0.170", "192.0.0.192", "192.0.2.1"),
    *("192.31.196.1", "192.52.193.1", "192.88.99.1", "192.175.48.1"),
    *("198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
]
PUBLIC_V4 = [
    *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "52.218.1.1", "93.184.216.34", "100.63.255.255"),
    *("100.128.0.0", "126.255.255.255", "128.0.0.1", "168.63.129.15", "168.63.129.17", "169.253.255.255"),
    *("169.255.0.0", "172.15.255.255", "172.32.0.0", "192.0.1.1", "192.167.255.255", "192.169.0.0"),
    *("198.17.255.255", "198.20.0.0", "203.0.112.1", "223.255.255.255"),
]
REFUSED_V6 = [
    *(
        "::8.8.8.8",
        "::ffff:0:8.8.8.8",
        "2002:808:808::1",
        "2001:0:808:808::f7f7:f7f7",
    ),  # public, but no longer a way there
    *("::", "::1", "::2", "100::1", "64:ff9b:1::1", "64:ff9b:1:ffff::8.8.8.8"),
    *("2001::1", "2001:1::1", "2001:2::1", "2001:3::1", "2001:4:112::1", "2001:10::1", "2001:20::1", "2001:1ff::1"),
    *("2001:db8::1", "2002::1", "2620:4f:8000::1", "3ffe::1", "3fff::1", "3fff:fff::1", "5f00::1"),
    *("fc00::1", "fd00:ec2::254", "fd20:ce::254", "fe80::1", "febf::1", "fec0::1", "ff02::1", "ff0e::1", "4000::1"),
]
PUBLIC_V6 = [
    *("2001:200::1", "2001:4860:4860::8888", "2400:cb00::1", "2600:1f18::1", "2606:4700:4700::1111", "2a00:1450::1"),
    *("2003::1", "2620:4f:8001::1", "3ffd::1"),
]


def embeddings(v4: str) -> dict[str, str]:
    """Every way to write ``v4`` inside an IPv6 address."""
    n = int(ipaddress.IPv4Address(v4))
    inverted = n ^ 0xFFFFFFFF
    nat64_48 = (n >> 16) << 64 | (n & 0xFFFF) << 40  # RFC 6052, a /48 prefix: bits 64 to 71 stay zero
    public = 0x2606_4700 << 96
    numbers = {
        "mapped": 0xFFFF << 32 | n,
        "compatible": n,
        "translated": 0xFFFF << 48 | n,
        "6to4": 0x2002 << 112 | n << 80,
        "6to4 with a subnet": 0x2002 << 112 | n << 80 | 1 << 64 | 1,
        "NAT64": 0x64FF9B << 96 | n,
        "local NAT64, /96": 0x64FF9B0001 << 80 | n,
        "local NAT64, /48": 0x64FF9B0001 << 80 | nat64_48,
        "Teredo server": 0x20010000 << 96 | n << 64,
        "Teredo client": 0x20010000 << 96 | inverted,
        "ISATAP": public | 0x5EFE << 32 | n,
        "ISATAP, universal": public | 0x02005EFE << 32 | n,
        "ISATAP, group": public | 0x03005EFE << 32 | n,
        "ISATAP, link-local": 0xFE80 << 112 | 0x5EFE << 32 | n,
    }
    return {name: str(ipaddress.IPv6Address(number)) for name, number in numbers.items()}


_LOOPBACK_SPELLINGS = [
    *("127.0.0.1", "127.0.0.1.", "127.1", "127.0.1", "127.000.000.001", "127.0.0.01"),
    *("2130706433", "017700000001", "0x7f000001", "0X7F000001", "0x7F.1", "0x7f.0x0.0x0.0x1", "127.0.0.0x1"),
    *("0177.0.0.1", "0177.0.0.01", "00000177.0.0.1", "0177.1", "127.0x1", "127.0.0.1.."),
    *("0", "0.0", "0x0", "00", "0.0.0.0", "127.255.255.254", "127.127.127.127"),
    *("①②⑦.⓪.⓪.①", "１２７.０.０.１", "127。0。0。1", "127．0．0．1", "127｡0｡0｡1", "𝟏𝟐𝟕.𝟎.𝟎.𝟏", "²130706433", "⓪ⅹ7f.1"),
    *("%31%32%37.0.0.1", "127%2e0%2e0%2e1", "127.0.0.1%00", "127.0.0.1%00.example", "127.0.0.1%2f.example"),
    *("[::1]", "[::1%25lo]", "[::1%lo]", "[0:0:0:0:0:0:0:1]", "[::]", "[0000::1]", "[::0001]", "[::127.0.0.1]"),
    *("[::ffff:127.0.0.1]", "[::FFFF:7F00:1]", "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[2002:7f00:1::]"),
    *("[127.0.0.1]", "[::ffff:127.1]", "[v1.127.0.0.1]", "[v1.::1]", "[fe80::1%25eth0]", "[2606:4700::1%25lo]"),
    *("localhost", "LOCALHOST", "localhost.", "ⓛocalhost", "ｌｏｃａｌｈｏｓｔ", "LocalHost。", "loc%61lhost"),
    *("a.localhost", "a.b.LocalHost.", "canary.localhost", "127.0.0.1.localhost"),
]

NAMES: dict[str, list[str]] = {
    "mixed-v4.example": ["93.184.216.34", "127.0.0.1"],
    "mixed-last.example": ["93.184.216.34", "1.1.1.1", "8.8.8.8", "10.0.0.1"],
    "mixed-v6.example": ["93.184.216.34", "::1"],
    "mixed-mapped.example": ["2606:4700:4700::1111", "::ffff:127.0.0.1"],
    "zone.example": ["fe80::1%eth0"],
    "nonsense.example": ["not an address"],
    "metadata.google.internal": ["169.254.169.254"],
    "localhost6": ["::1"],
    "localtest.example": ["127.0.0.1"],
    "wildcard_name.127.0.0.1.nip.example": ["127.0.0.1"],
    "xn--bcher-kva.example": ["127.0.0.1"],
    **{f"v4-{n}.example": [address] for n, address in enumerate(REFUSED_V4)},
    **{f"v6-{n}.example": [address] for n, address in enumerate(REFUSED_V6)},
    **{f"in-v6-{n}.example": [address] for n, address in enumerate(embeddings("127.0.0.1").values())},
}

ABSOLUTE: list[tuple[str, str]] = [
    *(("a way to write loopback", f"http://{host}:{{port}}/") for host in _LOOPBACK_SPELLINGS),
    *(("a way to write loopback, default port", f"https://{host}/") for host in _LOOPBACK_SPELLINGS),
    *(("special range", f"http://{address}:{{port}}/") for address in REFUSED_V4),
    *(("special range", f"http://[{address}]:{{port}}/") for address in REFUSED_V6),
    *(
        (f"{v4} as {how}", f"http://[{v6}]:{{port}}/")
        for v4 in ("127.0.0.1", "10.0.0.1", "169.254.169.254", "100.64.0.1", "168.63.129.16")
        for how, v6 in embeddings(v4).items()
    ),
    *((f"resolves to {addresses}", f"http://{name}:{{port}}/") for name, addresses in NAMES.items()),
    ("resolves, after IDNA", "http://bücher.example:{port}/"),
    ("resolves, after IDNA and a trailing dot", "http://BÜCHER.example.:{port}/"),
    *(
        ("other scheme", f"{scheme}://127.0.0.1:{{port}}/")
        for scheme in ("ftp", "file", "gopher", "dict", "ws", "wss", "ldap", "s3", "unix", "http+unix", "tcp")
    ),
    ("other scheme", "file:///etc/passwd"),
    ("other scheme", "javascript:alert(1)"),
    ("other scheme", "data:image/png;base64,AAAA"),
    ("other scheme", "about:blank"),
    ("other scheme", "view-source:http://127.0.0.1:{port}/"),
    ("other scheme", "jar:http://127.0.0.1:{port}/!/"),
    ("userinfo", "http://user:password@example.com/"),
    ("userinfo", "http://user@example.com/"),
    ("userinfo", "http://:@example.com/"),
    ("userinfo", "http://@example.com/"),
    ("userinfo", "http://example.com@127.0.0.1:{port}/"),
    ("userinfo", "http://example.com:80@127.0.0.1:{port}/"),
    ("userinfo", "http://example.com%40@127.0.0.1:{port}/"),
    ("userinfo", "http://a@b@127.0.0.1:{port}/"),
    ("userinfo", "http://[::1]@example.com/"),
    ("userinfo", "http://127.0.0.1:{port}\\@example.com/"),
    ("userinfo", "http://example.com\\@127.0.0.1:{port}/"),
    *(
        ("odd port", f"http://example.com:{port}/")
        for port in ("0", "1", "21", "22", "25", "53", "79", "81", "110", "442", "444", "445", "1023", "1024")
    ),
    *(
        ("malformed port", f"http://example.com:{port}/")
        for port in ("65536", "99999", "100000", "-1", "+80", "8_0", "８０", "٨٠", "80a", "0x50", " 80", "80 ", "80:80")
    ),
    ("fragment or query where a host should end", "http://127.0.0.1:{port}#@example.com/"),
    ("fragment or query where a host should end", "http://127.0.0.1:{port}?@example.com/"),
    ("empty host", "http://:{port}/"),
    ("empty host", "http://./"),
    ("empty host", "http://../"),
    ("empty host", "http://[]/"),
    *(
        ("malformed host", f"http://{host}/")
        for host in (
            *("a..example", ".example.com", "example.com..", "exa mple.com", "exa%20mple.com", "example.com%2e"),
            *("example.com\\", "\\example.com", "exam\\ple.com", "ex*mple.com", "ex,mple.com", "ex;mple.com"),
            *("ex!mple.com", "ex'mple.com", 'ex"mple.com', "ex(mple).com", "ex+mple.com", "ex=mple.com", "ex&mple.com"),
            *("ex|mple.com", "ex^mple.com", "ex`mple.com", "ex<mple>.com", "{example}.com", "$HOME", "~example.com"),
            *("a" * 64 + ".example", "a." * 127 + "example", "é" * 64 + ".example", "é" * 300, "ex\u200bample.com"),
            *("ex\u00adample.com", "ex\ufeffample.com", "example.com\u3000", "℀.example", "a\u202eb.example", "。"),
            *("[::1", "::1]", "::1", "[::1]a", "a[::1]", "[[::1]]", "[::g]", "[1:2:3]", "[:::1]", "[::1/64]"),
            *("fe80::1", "1.2.3", "1.2.3.4.5", "256.1.1.1", "8.8.8.08", "0x08080808", "134744072"),
            *("example.0x", "example.1", "1.2.3.256", "08.8.8.8", "99999999999"),
        )
    ),
]

# Not absolute, or impossible in a header: as a redirect these would mean something else, or could not be sent.
DIRECT: list[tuple[str, str]] = [
    *(
        ("not an absolute URL", url)
        for url in (
            *(
                "",
                " ",
                "/",
                "//",
                "///",
                "://",
                "http",
                "http:",
                "http:/",
                "http://",
                "http:///",
                "https://",
                "://x",
                "http://?a",
                "http://#a",
            ),
            *("example.com", "example.com/a", "//example.com/", "//127.0.0.1:{port}/", "127.0.0.1:{port}", "?", "#"),
            *("http:127.0.0.1:{port}/", "http:/127.0.0.1:{port}/", "http:///127.0.0.1:{port}/", "http:\\\\127.0.0.1/"),
            *("http:/\\127.0.0.1:{port}/", "http//127.0.0.1:{port}/", "httpp://example.com/", "h ttp://example.com/"),
            *(
                "ｈttp://example.com/",
                "httpſ://example.com/",
                "http：//example.com/",
                "http:／／example.com/",
                "\u200bhttp://example.com/",
            ),
        )
    ),
    *(
        ("control characters", url)
        for url in (
            *(
                "http://127.0.0.1\t:{port}/",
                "http://127.0.0.1\n:{port}/",
                "ht\ntp://example.com/",
                "\thttp://a.example/",
            ),
            *("http://example.com/\r\nHost: 127.0.0.1", "http://example.com/a\x00b", "http://exam\x00ple.com/"),
            *(
                "http://example.com\x7f/",
                "http://example.com/\x85",
                "http://example.com/?a=\x1b[2J",
                "http:\n//a.example/",
            ),
        )
    ),
    ("lone surrogate", "http://\ud800.example/"),
    ("lone surrogate", "http://example.com/\udfff"),
    ("lone surrogate", "http://example.com/?a=\ud800"),
]
