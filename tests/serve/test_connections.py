"""Connections: each has its time, and none of them takes anybody else's."""

from __future__ import annotations

import gc
import random
import resource
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from puna.errors import InputError, SettingsError
from puna.serve.addresses import listening_sockets, tls_context, url
from puna.serve.connections import LONGEST_HEADERS, Connection, allow_files
from puna.serve.settings import ServeSettings
from puna.settings import parse
from tests.serve.guarding import read_all, read_one, request_of, standing


def status_of(raw: bytes) -> int:
    return int(raw.split(b" ", 2)[1])


def seconds_until_closed(link: socket.socket) -> float:
    began = time.monotonic()
    read_all(link)
    return time.monotonic() - began


def test_requests_follow_each_other_on_one_connection() -> None:
    with standing() as server, server.connect() as link:
        for _ in range(3):
            link.sendall(request_of("/health"))
            answer = read_one(link)
            assert status_of(answer) == 200 and answer.endswith(b"fine")
            assert b"server:" not in answer.lower() and b"date: " in answer


def test_headers_have_their_time_from_connecting_whatever_trickles_in() -> None:
    with standing(header_seconds=0.4) as server:
        with server.connect() as silent:
            assert 0.2 < seconds_until_closed(silent) < 2
        with server.connect() as trickling:
            began = time.monotonic()
            for char in request_of("/health", "X-Long: " + "y" * 60).decode():
                try:
                    trickling.send(char.encode())
                except OSError:
                    break
                time.sleep(0.03)
            read_all(trickling)
            assert 0.3 < time.monotonic() - began < 1.5


def test_a_later_request_has_its_time_from_its_first_byte() -> None:
    with standing(header_seconds=0.4, idle_seconds=30) as server, server.connect() as link:
        link.sendall(request_of("/health"))
        assert status_of(read_one(link)) == 200
        time.sleep(0.8)  # idling is something else
        link.sendall(request_of("/health")[:10])
        assert 0.2 < seconds_until_closed(link) < 2


def test_idling_has_its_time_too() -> None:
    with standing(header_seconds=30, idle_seconds=0.3) as server, server.connect() as link:
        link.sendall(request_of("/health"))
        assert status_of(read_one(link)) == 200
        assert 0.1 < seconds_until_closed(link) < 2
        assert not server.listener.idle


def test_an_answer_may_take_longer_than_headers_or_idling() -> None:
    with standing(header_seconds=0.2, idle_seconds=0.2) as server:
        raw = server.say(request_of("/slow?s=0.8", "Content-Length: 0", "Content-Type: application/json",
                                    "Connection: close", method="POST"))  # fmt: skip
        assert status_of(raw) == 200 and raw.endswith(b'{"slept":true}')


def test_pipelined_requests_are_answered_in_order() -> None:
    with standing() as server:
        paths = ["/numbers?n=3", "/health", "/nowhere", "/health"]
        raw = server.say(b"".join(map(request_of, paths)) + request_of("/health", "Connection: close"))
        parts = raw.split(b"HTTP/1.1 ")[1:]
        assert [int(part[:3]) for part in parts] == [200, 200, 404, 200, 200]
        assert b"0\n" in parts[0] and b"2\n" in parts[0]


def test_over_the_cap_the_longest_idle_one_goes() -> None:
    with standing(max_connections=3) as server:
        links = [server.connect() for _ in range(3)]
        for link in links:
            link.sendall(request_of("/health"))
            assert status_of(read_one(link)) == 200
        assert status_of(server.say(request_of("/health", "Connection: close"))) == 200
        assert links[0].recv(1) == b""
        links[1].sendall(request_of("/health"))
        assert status_of(read_one(links[1])) == 200
        for link in links:
            link.close()


def test_over_the_cap_the_new_one_is_closed_where_all_are_at_work() -> None:
    with standing(max_connections=2) as server:
        busy = [server.connect() for _ in range(2)]
        for link in busy:
            link.sendall(request_of("/numbers?n=40"))
            assert status_of(link.recv(4096)) == 200
        with server.connect() as late:
            with suppress(OSError):
                late.sendall(request_of("/health"))
            assert read_all(late) == b""
        for link in busy:
            while b"39\n" not in (piece := link.recv(4096)):
                assert piece
            link.close()
        time.sleep(0.1)
        assert status_of(server.say(request_of("/health", "Connection: close"))) == 200


def test_what_is_not_http_gets_an_answer_of_ours_and_is_counted() -> None:
    with standing() as server:
        for raw in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
            answer = server.say(raw)
            assert status_of(answer) == 400 and b'{"error": {"message": ' in answer
            assert b"x-request-id: req-" in answer
        assert [record.status for record in server.records] == [400] * 3


@pytest.mark.parametrize("flood", ["one", "many", "line"])
def test_headers_without_end_are_cut_off(flood: str) -> None:
    size = 4 * LONGEST_HEADERS
    heads = {
        "one": request_of("/", "X-Long: " + "y" * size),
        "many": request_of("/", *(f"X-{n}: y" for n in range(size // 8))),
        "line": request_of("/" + "y" * size),
    }
    with standing() as server, server.connect() as link:
        answer = b""
        try:
            for start in range(0, len(heads[flood]), 4096):
                link.sendall(heads[flood][start : start + 4096])
                time.sleep(0.001)
            answer = read_all(link)
        except OSError:  # closed while we still wrote
            answer = answer or read_all(link)
        assert answer == b"" or status_of(answer) == 431
        assert server.records[-1].status == 431


def test_a_body_at_fault_is_refused_and_harms_nobody() -> None:
    head = request_of("/v1/completions", "Transfer-Encoding: chunked", "Content-Type: application/json",
                      method="POST")  # fmt: skip
    with standing() as server:
        assert status_of(server.say(head + b"not a size\r\n")) == 400
        assert status_of(server.say(request_of("/health", "Connection: close"))) == 200


def test_a_body_too_large_is_answered_even_where_the_client_sends_it_all() -> None:
    body = bytes(20 << 20)
    head = request_of("/v1/completions", f"Content-Length: {len(body)}", "Content-Type: application/json",
                      method="POST")  # fmt: skip
    with standing() as server:
        answer = server.say(head + body)
        assert status_of(answer) == 413 and b"connection: close" in answer


def test_a_refused_body_that_is_small_keeps_the_connection() -> None:
    head = request_of("/v1/completions", "Content-Length: 5", "Content-Type: text/plain", method="POST")
    with standing() as server, server.connect() as link:
        for _ in range(2):
            link.sendall(head)
            assert status_of(read_one(link)) == 415
            time.sleep(0.05)
            link.sendall(b"12345")
            time.sleep(0.05)


def test_a_client_that_reads_nothing_is_cut_off() -> None:
    with standing(body_seconds=0.3) as server, server.connect() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.sendall(request_of("/bulk"))
        link.recv(100)
        began = time.monotonic()
        while server.listener.all:
            assert time.monotonic() - began < 5
            time.sleep(0.02)
        assert time.monotonic() - began > 0.2


def test_a_client_that_reads_slowly_is_waited_for() -> None:
    with standing(body_seconds=0.5) as server, server.connect() as link:
        link.sendall(request_of("/bulk", "Connection: close"))
        read, began = 0, time.monotonic()
        while piece := link.recv(1 << 20):
            read += len(piece)
            time.sleep(0.02)
        assert read > 64 << 20 and time.monotonic() - began > 0.6


@pytest.mark.parametrize("more", ["keep-alive", "close"])
def test_a_whole_answer_that_is_trickled_has_an_end(more: str) -> None:
    """The client takes a little all the time, and the app is long done."""
    body = bytes(7 << 20)
    head = request_of("/v1/completions", f"Content-Length: {len(body)}", "Content-Type: application/json",
                      f"Connection: {more}", method="POST")  # fmt: skip
    with standing(body_seconds=30, request_seconds=1, idle_seconds=30) as server:
        link = socket.socket()
        server.links.append(link)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(10)
        link.connect(("127.0.0.1", server.port))
        link.sendall(head + body)
        began = time.monotonic()
        while server.listener.all:
            assert time.monotonic() - began < 6
            with suppress(ConnectionResetError):
                link.recv(3000)
            time.sleep(0.01)
        assert time.monotonic() - began > 0.8
        assert server.records[-1].status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/0.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
    ],
)
def test_another_version_gets_one_answer_and_the_connection_is_closed(raw: bytes) -> None:
    with standing() as server:
        answer = server.say(raw)
        assert status_of(answer) == 505 and answer.count(b"HTTP/1.1 ") == 1
        assert b"ask again in HTTP/1.1" in answer
        with server.connect() as link:
            link.sendall(request_of("/health") + raw)
            assert [int(part[:3]) for part in read_all(link).split(b"HTTP/1.1 ")[1:]][:2] == [200, 505]
        assert sorted(record.status or 0 for record in server.records) == [200, 505, 505]
        assert server.say(b"GET /health HTTP/1.0\r\n\r\n").endswith(b"fine")


WHOLE = (
    request_of("/health", "Connection: close"),
    request_of("/health", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
    request_of("localhost:80", method="CONNECT"),
    request_of("*", method="OPTIONS"),
    request_of("http://evil.example/health"),
    request_of("/v1/completions", "Content-Type: application/json", "Content-Length: 2", method="POST")
    + b"{}",
    request_of(
        "/v1/completions", "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST"
    )
    + b"2\r\n{}\r\n0\r\n\r\n",
    request_of("/v1/completions", "Content-Length: 5", "Transfer-Encoding: chunked", method="POST")
    + b"0\r\n\r\nGET /forged HTTP/1.1\r\n\r\n",
    request_of("/v1/completions", "Content-Length: 1", "Content-Length: 2", method="POST") + b"{}",
    request_of("/v1/completions", "Content-Length: -1", method="POST"),
    request_of("/v1/completions", "Content-Length: " + "9" * 30, method="POST"),
    request_of("/v1/completions", "Expect: 100-continue", "Content-Length: 2", method="POST"),
    request_of("/numbers?n=2", "Range: bytes=0-1", method="HEAD"),
    b"GET /health HTTP/1.0\r\n\r\n",
    b"GET /health\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


def test_any_bytes_at_all_are_answered_or_closed_and_nothing_breaks() -> None:
    chance = random.Random(1)

    def spoilt(raw: bytes) -> bytes:
        data = bytearray(raw)
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(data))
            match chance.randrange(3):
                case 0:
                    data[at] = chance.randrange(256)
                case 1:
                    del data[at : at + chance.randrange(9)]
                case 2:
                    data[at:at] = chance.choice((b"\r\n", b"\0", b"\xff", b": ", b"GET ", b"0\r\n\r\n"))
            data = data or bytearray(b"x")
        return bytes(data)

    broken: list[object] = []
    with standing(header_seconds=0.3, body_seconds=0.3, idle_seconds=0.3) as server:
        server.loop.set_exception_handler(lambda loop, context: broken.append(context))
        cases = [*WHOLE, *(spoilt(chance.choice(WHOLE)) for _ in range(400))]
        links = []
        for raw in cases:
            links.append(server.connect())
            links[-1].sendall(raw)
        answers = [read_all(link) for link in links]
        assert status_of(server.say(request_of("/health", "Connection: close"))) == 200
        assert not [record for record in server.records if record.status == 500]
        end = time.monotonic() + 5
        while server.listener.requests:
            assert time.monotonic() < end, "a request is stuck"
            time.sleep(0.01)
    assert all(not answer or answer.startswith(b"HTTP/1.1 ") for answer in answers)
    assert sum(b"HTTP/1.1 200" in answer for answer in answers) > 50
    assert not broken, broken


def test_nothing_of_a_connection_is_kept_after_its_end() -> None:
    with standing() as server:
        for raw in (request_of("/health", "Connection: close"), b"not HTTP\r\n\r\n", request_of("/bulk")):
            links = [server.connect() for _ in range(20)]
            for link in links:
                link.sendall(raw)
                link.recv(10)
                link.close()
        end = time.monotonic() + 5
        while server.listener.all or server.listener.requests:
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(0.1)
        gc.collect()
        assert not [kept for kept in gc.get_objects() if type(kept) is Connection]


def test_a_flood_of_connections_leaves_others_unharmed() -> None:
    with standing() as server:
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                server.connect().close()

        threads = [threading.Thread(target=flood) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            with server.connect() as link:
                for _ in range(20):
                    began = time.monotonic()
                    link.sendall(request_of("/health"))
                    assert status_of(read_one(link)) == 200
                    assert time.monotonic() - began < 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_where_no_file_can_be_opened_connections_wait_until_one_can() -> None:
    with standing() as server:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        link = server.connect()
        link.sendall(request_of("/health"))
        assert status_of(read_one(link)) == 200  # it is taken on
        late = socket.socket()
        server.links.append(late)
        late.settimeout(10)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # all below are taken
            late.connect(("127.0.0.1", server.port))
            link.sendall(request_of("/health"))
            assert status_of(read_one(link)) == 200
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        late.sendall(request_of("/health"))
        assert status_of(read_one(late)) == 200


def test_files_that_may_be_open_are_raised_as_far_as_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        allow_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(300, hard)
        allow_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(300, hard)
        allow_files(10**9)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (10**9 if hard == -1 else hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port} of 127.0.0.1 is taken; give another port"):
            listening_sockets("127.0.0.1", port)
    with pytest.raises(InputError, match="is not known here"):
        listening_sockets("no.such.host.invalid", 0)
    with pytest.raises(InputError, match=r"cannot listen on 192\.0\.2\.1"):
        listening_sockets("192.0.2.1", 0)


def test_every_address_of_a_host_gets_the_same_port() -> None:
    sockets = listening_sockets("localhost", 0)
    try:
        ports = {listening.getsockname()[1] for listening in sockets}
        assert len(ports) == 1 and 0 not in ports
        assert url(sockets, tls=False).endswith(f":{ports.pop()}")
    finally:
        for listening in sockets:
            listening.close()


def test_urls_are_such_as_can_be_clicked() -> None:
    for host, shown in (
        ("0.0.0.0", "https://127.0.0.1:"),
        ("::1", "https://[::1]:"),
        ("::", "https://[::1]:"),
    ):
        try:
            sockets = listening_sockets(host, 0)
        except InputError:
            continue  # a machine without IPv6
        assert url(sockets, tls=True).startswith(shown)
        for listening in sockets:
            listening.close()


def test_tls_and_who_does_not_speak_it(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    settings = parse(ServeSettings, {"tls_certificate": str(cert), "tls_key": str(key)})
    trust = ssl.create_default_context(cafile=str(cert))
    with standing(tls=tls_context(settings), header_seconds=0.5) as server:
        silent = server.connect()
        plain = server.connect()
        plain.sendall(request_of("/health"))
        with trust.wrap_socket(server.connect(), server_hostname="localhost") as link:
            link.sendall(request_of("/health", "Connection: close"))
            answer = read_all(link)
            assert status_of(answer) == 200 and answer.endswith(b"fine")
        assert b"HTTP" not in read_all(plain)
        began = time.monotonic()
        read_all(silent)
        assert time.monotonic() - began < 3
        while server.listener.coming:
            assert time.monotonic() - began < 5
            time.sleep(0.01)
        silent.close()
        plain.close()


def test_tls_files_at_fault_are_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    secret = tmp_path / "secret.pem"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(secret), "-passout", "pass:abcd"],
        check=True,
    )
    (tmp_path / "text").write_text("hello")

    def fault(certificate: Path, key: Path) -> str:
        with pytest.raises(SettingsError) as caught:
            tls_context(parse(ServeSettings, {"tls_certificate": str(certificate), "tls_key": str(key)}))
        return str(caught.value)

    assert "No such file" in fault(tmp_path / "none.pem", key)
    assert "cannot be used" in fault(tmp_path / "text", key)
    assert "cannot be used" in fault(cert, cert)
    assert "passphrase" in fault(cert, secret)
