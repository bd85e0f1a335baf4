"""Which IP addresses are of the public internet, and why the others are not."""

from __future__ import annotations

import functools
import ipaddress

# The IANA special-purpose registries, what `ipaddress` knows, and what neither has. No public checker is complete.
_REFUSED_V4 = {
    "0.0.0.0/8": "this host",
    "10.0.0.0/8": "private network",
    "100.64.0.0/10": "carrier-grade NAT",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "Azure platform",  # public by number, answers inside every virtual network
    "169.254.0.0/16": "link-local",  # and with it the metadata services
    "172.16.0.0/12": "private network",
    "192.0.0.0/24": "protocol assignments",
    "192.0.2.0/24": "documentation",
    "192.31.196.0/24": "AS112",
    "192.52.193.0/24": "AMT relay",
    "192.88.99.0/24": "6to4 relay",
    "192.168.0.0/16": "private network",
    "192.175.48.0/24": "AS112",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
# Within 2000::/3, outside of which no address is public: loopback, unique local, link-local, site-local, multicast,
# 100::/64, 5f00::/16, and the deprecated ways to write IPv4 (::a.b.c.d, ::ffff:0:a.b.c.d, 64:ff9b:1::/48).
_REFUSED_V6 = {
    "2001::/23": "protocol assignments",  # Teredo, benchmarking, ORCHID, AMT, AS112
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",  # the relays are gone: whatever answers is on our own network
    "2620:4f:8000::/48": "AS112",
    "3ffe::/16": "6bone",
    "3fff::/20": "documentation",
}
_V4 = [(ipaddress.IPv4Network(network), why) for network, why in _REFUSED_V4.items()]
_V6 = [(ipaddress.IPv6Network(network), why) for network, why in _REFUSED_V6.items()]
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


@functools.lru_cache(4096)
def refusal(address: str) -> str | None:
    """Why ``address`` is not one of the public internet, or None."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "not an IP address"
    if isinstance(ip, ipaddress.IPv4Address):
        known = next((why for network, why in _V4 if ip in network), None)
        return known or (None if ip.is_global else "special purpose")

    number = int(ip)
    embedded = str(ipaddress.IPv4Address(number & 0xFFFFFFFF))
    if number >> 32 in (0xFFFF, 0x64FF9B << 64):
        return refusal(embedded)  # ::ffff:0:0/96 and 64:ff9b::/96 (NAT64) are IPv4 and nothing else
    if ip not in _GLOBAL_UNICAST:
        return "not global unicast"
    known = next((why for network, why in _V6 if ip in network), None)
    if known is None and (number >> 32) & 0xFCFFFFFF == 0x5EFE:  # ISATAP, which any prefix can carry
        known = refusal(embedded)
    return known or (None if ip.is_global else "special purpose")
