"""Where a server listens: sockets bound before a model is loaded, TLS, the URL that people are told."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puna.errors import InputError, SettingsError
from puna.serve.settings import ServeSettings


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of a host, and not listening yet; port 0 is any free one.

    Raises:
        InputError: the host is unknown or not this machine's, or the port is taken or not for this user.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"host {host!r} is not known here: {error}; 127.0.0.1 is this machine alone"
        ) from None
    bound: list[socket.socket] = []
    fault: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            bound.append(_bound(family, (address[0], port, *address[2:]), alone=len(found) == 1))
            port = bound[0].getsockname()[1]
        except OSError as error:
            fault = error
            if error.errno == errno.EADDRINUSE:
                break
    if fault is not None and (not bound or fault.errno == errno.EADDRINUSE):
        for listening in bound:
            listening.close()
        raise cannot_listen(host, port, fault)
    return bound


def cannot_listen(host: str, port: int, fault: OSError) -> InputError:
    """Why nothing can listen at an address."""
    if fault.errno == errno.EADDRINUSE:
        return InputError(f"port {port} of {host} is taken; give another port, or port=0 for any free one")
    if fault.errno == errno.EACCES:
        return InputError(f"port {port} of {host} is not for this user; take one from 1024 up")
    return InputError(f"cannot listen on {host}, port {port}: {fault.strerror}")


def _bound(family: int, address: tuple[Any, ...], alone: bool) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of a server that has just ended keep its port for a minute otherwise.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # alone, "::" means every network of either kind
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if alone else 1)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening


def tls_context(settings: ServeSettings) -> ssl.SSLContext | None:
    """What TLS needs, read now rather than when somebody connects; None where settings ask for none.

    Raises:
        SettingsError: a file is missing, is no PEM file, or the two do not belong together.
    """
    certificate, key = settings.tls_certificate, settings.tls_key
    if certificate is None or key is None:
        return None
    for name, file in (("tls_certificate", certificate), ("tls_key", key)):
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise SettingsError(f"{name}: {file} cannot be read: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except (ssl.SSLError, ValueError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else error
        raise SettingsError(
            f"tls_certificate {certificate} and tls_key {key} cannot be used: {reason}; expected two PEM "
            "files that belong together, the key without a passphrase"
        ) from None
    return context


def _no_passphrase() -> str:
    """In place of OpenSSL's own question on the terminal."""
    raise ValueError("the key has a passphrase")


def url(sockets: Sequence[socket.socket], tls: bool) -> str:
    """Where somebody on this machine reaches a server."""
    host, port = sockets[0].getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
