"""Who asks from where: names a server may be called by, pages that may ask it from a browser."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import urlsplit

Header = tuple[bytes, bytes]

ANY = "*"
DEFAULT_PORTS = {"http": 80, "https": 443}
METHODS = b"GET, POST, OPTIONS"
EXPOSED = b"X-Request-Id, Retry-After, X-Puna-Note"  # headers of answers that a page may read
REMEMBERED = b"600"  # seconds for which a browser need not ask again


class Origins:
    """Which Host names and Origins are served."""

    def __init__(self, hosts: Sequence[str], pages: Sequence[str], local: bool) -> None:
        """`hosts` and `pages` as in ServeSettings; `local`: the server listens to its own machine alone."""
        self._hosts = [host.lower() for host in hosts]
        self._pages = frozenset(page.lower().rstrip("/") for page in pages)
        self._any_host = ANY in hosts or not (hosts or local)

    def knows_host(self, host: str | None) -> bool:
        """Whether a request's Host header names this server.

        A page whose owner lets its name point to 127.0.0.1 asks by that name. No browser leaves it out.
        """
        if self._any_host or host is None:
            return True
        name, _ = _split(host)
        return is_loopback(name) or any(_covers(known, name) for known in self._hosts)

    def own(self, origin: str, host: str | None) -> bool:
        """Whether an Origin is this server's own, as its client calls it."""
        try:
            url = urlsplit(origin)
            default = DEFAULT_PORTS.get(url.scheme)
            port = url.port or default
        except ValueError:
            return False
        if host is None or url.hostname is None or default is None:
            return False
        name, own_port = _split(host)
        # TLS may end before this server, so that its own scheme says nothing about the default port.
        return url.hostname == name and port == (own_port or default)

    def admits(self, origin: str) -> bool:
        """Whether a page from elsewhere may ask."""
        return ANY in self._pages or origin.lower() in self._pages

    def headers(self, origin: str) -> list[Header]:
        """What lets such a page read an answer."""
        allowed = ANY if ANY in self._pages else origin
        return [
            (b"access-control-allow-origin", allowed.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED),
            (b"vary", b"Origin"),
        ]


def preflight(headers: Mapping[bytes, bytes]) -> list[Header]:
    """What lets a page send the request that its browser asks about."""
    wanted = headers.get(b"access-control-request-headers", b"")
    return [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-allow-headers", wanted),
        (b"access-control-max-age", REMEMBERED),
    ]


def is_loopback(name: str) -> bool:
    """Whether a host name or address is this machine's own, in every network.

    >>> [is_loopback(name) for name in ("localhost", "127.8.0.1", "::1", "127.example.org", "10.0.0.1")]
    [True, True, True, False, False]
    """
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def all_loopback(addresses: Iterable[str]) -> bool:
    """Whether nobody outside this machine can reach a server at these addresses."""
    return all(is_loopback(address) for address in addresses)


def _split(host: str) -> tuple[str, int | None]:
    """A Host header's name, in lower case and without brackets, and its port; "" for no such thing."""
    try:
        url = urlsplit(f"//{host}")
        plain = url.username is None and not (url.path or url.query or url.fragment)
        return (url.hostname or "", url.port) if plain else ("", None)
    except ValueError:
        return "", None


def _covers(known: str, name: str) -> bool:
    """Whether an allowed name, perhaps *.example.org, is this one."""
    return name.endswith(known[1:]) if known.startswith("*.") else name == known
