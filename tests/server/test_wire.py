"""Raw sockets that send too much, too slowly, or nothing: what a connection may do."""

import json
import os
import socket
import time
from pathlib import Path

import pytest

PATIENCE = 20.0
FLAGS = (
    "--max-header-bytes=4096 --max-header-count=20 --header-timeout=1 --body-timeout=1 "
    "--keep-alive-timeout=2 --max-body-bytes=20000"
).split()


@pytest.fixture(scope="module")
def strict(model):
    from tests.server.conftest import start

    running = start(model, *FLAGS)
    yield running
    assert running.post("/v1/completions", {"prompt": "ab", "max_tokens": 2}).status_code == 200
    running.process.terminate()
    running.process.wait(PATIENCE)


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def read_all(connection):
    parts = []
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def error_of(answer):
    """Status and the OpenAI error object of a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def post(body, *headers):
    lines = [
        "POST /v1/completions HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_too_many_headers_are_431(strict):
    with connect(strict) as c:
        c.sendall(post(b"{}", *(f"x-{i}: 1" for i in range(40))))
        status, error = error_of(read_all(c))
    assert (status, error["type"], error["code"]) == (431, "RequestHeaderFieldsTooLargeError", 431)
    assert error["message"] == "the request has more than 20 headers"


def test_what_was_refused_before_it_was_a_request_is_counted(strict):
    name = 'octavo:http_requests_total{engine="0",method="OTHER",model_name="tiny",route="none"'
    before = strict.metric(f'{name},status="431"}}')
    with connect(strict) as c:
        c.sendall(post(b"{}", "x-long: " + "a" * 5000))
        read_all(c)
    assert strict.metric(f'{name},status="431"}}') == before + 1


def test_headers_that_are_too_large_are_431(strict):
    with connect(strict) as c:
        c.sendall(post(b"{}", "x-long: " + "a" * 5000))
        assert error_of(read_all(c))[0] == 431


def test_a_header_that_never_ends_is_431_before_it_fills_memory(strict):
    with connect(strict) as c:
        c.sendall(b"GET /health HTTP/1.1\r\nx-long: ")
        with pytest.raises(OSError):
            for _ in range(2000):
                c.sendall(b"a" * 4096)
                time.sleep(0.001)


def test_a_long_address_is_431(strict):
    with connect(strict) as c:
        c.sendall(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert error_of(read_all(c))[0] == 431


def test_headers_that_come_a_byte_at_a_time_are_408(strict):
    began = time.monotonic()
    with connect(strict) as c:
        c.settimeout(0.05)
        answer = b""
        for byte in post(b"{}", "x-a: " + "b" * 500):
            try:
                c.sendall(bytes([byte]))
                answer += c.recv(65536)
            except TimeoutError:
                pass
            if answer:
                break
        status, error = error_of(answer)
    assert (status, error["message"]) == (408, "the headers were not whole after 1 s")
    assert time.monotonic() - began < 5


def test_a_connection_that_says_nothing_is_closed_without_a_word(strict):
    with connect(strict) as c:
        assert read_all(c) == b""


def test_an_idle_connection_is_closed_and_line_ends_do_not_keep_it(strict):
    with connect(strict) as c:
        c.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in c.recv(65536)
        c.settimeout(0.1)
        began = time.monotonic()
        closed = False
        while not closed and time.monotonic() - began < 10:
            try:
                c.sendall(b"\r\n")
                closed = c.recv(100) == b""
            except TimeoutError:
                pass
            except OSError:
                closed = True
    assert closed


def test_a_body_that_stops_coming_is_408(strict):
    with connect(strict) as c:
        c.sendall(post(b'{"prompt": "ab"}')[:-5])
        status, error = error_of(read_all(c))
    assert status == 408 and "in 1 s hardly any of it came" in error["message"]
    assert error["type"] == "RequestTimeoutError"


def test_a_body_a_byte_at_a_time_is_408(strict):
    with connect(strict) as c:
        c.sendall(post(b"x" * 10000)[:-10000])
        c.settimeout(0.05)
        answer, began = b"", time.monotonic()
        while not answer and time.monotonic() - began < 5:
            try:
                c.sendall(b"x")
                answer = c.recv(65536)
            except TimeoutError:
                pass
    assert error_of(answer)[0] == 408


def test_a_body_that_says_it_is_too_large_is_413_before_it_comes(strict):
    with connect(strict) as c:
        c.sendall(post(b"")[:-4].replace(b"content-length: 0", b"content-length: 99999999"))
        c.sendall(b"\r\n\r\n")
        status, error = error_of(read_all(c))
    assert (status, error["type"]) == (413, "RequestTooLargeError")


def test_a_chunked_body_that_grows_too_large_is_413(strict):
    with connect(strict) as c:
        head = post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
        c.sendall(head + b"".join(b"400\r\n" + b" " * 1024 + b"\r\n" for _ in range(30)))
        assert error_of(read_all(c))[0] == 413


def test_what_is_no_http_is_400_in_the_same_shape(strict):
    with connect(strict) as c:
        c.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n")
        status, error = error_of(read_all(c))
    assert (status, error["message"]) == (400, "this is not an HTTP/1.1 request")


def test_trailers_and_extensions_of_chunks_are_limited_too(strict):
    head = post(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
    for flood in (b"0\r\n" + b"x-t: " + b"a" * 30000, b"1;" + b"e" * 30000):
        with connect(strict) as c:
            c.sendall(head)
            time.sleep(0.05)
            c.sendall(flood)
            assert error_of(read_all(c))[0] in (431, 400)


def test_an_offer_of_http_2_is_declined_and_the_body_read(strict):
    body = b'{"prompt": "ab", "max_tokens": 2}'
    offer = ("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAE")
    with connect(strict) as c:
        c.sendall(post(body, *offer))
        answer = b""
        while b'"usage"' not in answer:
            answer += c.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200 OK")


def test_requests_in_one_packet_are_answered_in_order(strict):
    first, second = b'{"prompt": "ab", "max_tokens": 2}', b'{"prompt": "cd", "max_tokens": 2}'
    with connect(strict) as c:
        c.sendall(post(first) + post(second, "connection: close"))
        answer = read_all(c)
    assert answer.count(b"200 OK") == 2 and answer.index(b'"ab"') < answer.index(b'"cd"')


def sockets(server):
    """How many sockets the server process holds."""
    folder = Path(f"/proc/{server.process.pid}/fd")
    return sum(os.readlink(link).startswith("socket:") for link in folder.iterdir())


def test_a_client_that_reads_nothing_is_cut_off(launch):
    server = launch("--write-timeout=1", "--keep-alive-timeout=600")
    time.sleep(0.5)  # until the connection that asked whether it is ready is gone
    before = sockets(server)
    with connect(server) as c:
        c.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        asked = {"prompt": ["ab" * 20] * 400, "max_tokens": 400, "stream": True, "logprobs": 5}
        c.sendall(post(json.dumps(asked).encode()))
        server.until(lambda: sockets(server) > before, "it never came")
        server.until(lambda: sockets(server) <= before, "it is held")
