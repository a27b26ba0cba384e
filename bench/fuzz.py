"""What malformed requests do to a server: they are refused, good ones between them are answered.

Bodies with damaged bytes, wrong types, huge numbers, invalid UTF-8, deep nesting; requests that are
no HTTP, stop in the middle, are half closed or leave before the answer. After each hundred a good
request is asked whose answer is known from before the storm. At the end nothing may be left
behind: no request running or waiting, no page in use, no restart.

examples:
  octavo bench fuzz --url http://localhost:8000 --requests 50000
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from octavo.bench.common import machine
from octavo.cli.client import Endpoint
from octavo.cli.table import print_table

PATIENCE = 5.0  # seconds that a malformed request waits for its answer before it leaves
SETTLE = 30.0  # seconds for the last requests to end
GOOD_EVERY = 100
GOOD = ("The capital of France is", "One, two, three,", "def main(", "Once upon a time")
HUGE: tuple[Any, ...] = (
    2**31, 2**32, 2**63, -(2**63) - 1, 10**400, -(10**400), 1e308, -1e308, 1e-320, -1, 0.5,
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, "", "\0", "\ud800", "é" * 5000, [], {}, [[]], [None], {"": {}}, [1, "a", {}],
    *HUGE,
)  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    "/v1/messages": {"model": "", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/messages/count_tokens": {"model": "", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1, 2]},
}


@dataclass
class Storm:
    """What came of it."""

    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)  # 5xx other than 503, with what was sent
    good: int = 0
    wrong: list[str] = field(default_factory=list)


class Maker:
    """Makes malformed requests for the routes that a server describes, the same for a seed."""

    def __init__(self, described: dict[str, Any], model: str, seed: int) -> None:
        self._random = random.Random(seed)
        self._fields: dict[str, list[str]] = {}
        schemas = described["components"]["schemas"]
        for path, methods in described["paths"].items():
            if path in BODIES and "post" in methods:
                schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
                named = schemas.get(schema.get("$ref", "").rsplit("/", 1)[-1], schema)
                self._fields[path] = sorted(named.get("properties", {}))
        self._model = model
        self.kinds: dict[str, Callable[[], bytes]] = {
            "damaged bytes": self._damaged,
            "wrong types": self._wrong_types,
            "huge numbers": self._huge,
            "invalid UTF-8": self._not_text,
            "deep nesting": self._deep,
            "not HTTP": self._not_http,
            "cut short": self._cut,
            "half closed": self._whole,
            "leaves at once": self._whole,
        }

    def _body(self) -> tuple[str, dict[str, Any]]:
        path = self._random.choice(list(self._fields))
        body = dict(BODIES[path])
        if "model" in body:
            body["model"] = self._model
        if self._random.random() < 0.3:
            body["stream"] = True
        return path, body

    def _request(self, path: str, body: bytes, length: int | None = None) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nHost: octavo\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
        return head.encode() + body

    def _whole(self) -> bytes:
        path, body = self._body()
        return self._request(path, json.dumps(body).encode())

    def _damaged(self) -> bytes:
        path, body = self._body()
        raw = bytearray(json.dumps(body).encode())
        for _ in range(self._random.randint(1, 6)):
            at = self._random.randrange(len(raw))
            match self._random.randrange(4):
                case 0:
                    raw[at] = self._random.randrange(256)
                case 1:
                    del raw[at : at + self._random.randint(1, 4)]
                case 2:
                    raw[at:at] = self._random.choice((b"{", b"]", b'"', b"\\u", b"\0", b"1e", b","))
                case _:
                    raw[at:at] = raw[self._random.randrange(len(raw)) :][:20]
            raw = raw or bytearray(b"{")
        return self._request(path, bytes(raw))

    def _changed(self, values: tuple[Any, ...]) -> bytes:
        path, body = self._body()
        for name in self._random.choices(self._fields[path], k=self._random.randint(1, 3)):
            value = self._random.choice(values)
            nested = self._random.random()
            body[name] = [value] if nested < 0.15 else {"type": value} if nested < 0.3 else value
        return self._request(path, json.dumps(body).encode())

    def _wrong_types(self) -> bytes:
        return self._changed(ODD)

    def _huge(self) -> bytes:
        return self._changed((*HUGE, float("nan"), float("inf"), -float("inf")))

    def _not_text(self) -> bytes:
        path, body = self._body()
        raw = json.dumps(body).encode()
        bad = self._random.choice((b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"))
        return self._request(path, raw.replace(b"H", bad, 1) if b"H" in raw else bad + raw)

    def _deep(self) -> bytes:
        path, body = self._body()
        depth = self._random.choice((65, 500, 5_000, 100_000))
        mark = '"DEEP"'
        name = self._random.choice(self._fields[path])
        raw = json.dumps({**body, name: "DEEP"})
        open_, close = self._random.choice((("[", "]"), ('{"a":', "}")))
        return self._request(path, raw.replace(mark, open_ * depth + "1" + close * depth).encode())

    def _not_http(self) -> bytes:
        make = self._random.choice
        size = self._random.choice((10, 1000, 100_000))
        return make(
            (
                self._random.randbytes(size) + b"\r\n\r\n",
                b"GET /" + b"a" * size + b" HTTP/1.1\r\nHost: x\r\n\r\n",
                b"POST /v1/completions HTTP/9.9\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n{}",
                b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * (size // 10) + b"\r\n",
                b"GET /health HTTP/1.1\r\nx: " + b"y" * size + b"\r\n\r\n",
                b"DELETE /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                b"GET /v1/models/%00%ff%2e%2e HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            )
        )

    def _cut(self) -> bytes:
        whole = self._whole()
        return whole[: self._random.randrange(1, len(whole))]

    def next(self) -> tuple[str, bytes]:
        kind = self._random.choice(list(self.kinds))
        return kind, self.kinds[kind]()


async def _send(endpoint: Endpoint, kind: str, request: bytes) -> str:
    """The class of the answer: a status, "closed" without one, "silent" after PATIENCE."""
    try:
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    except OSError as error:
        return f"no connection ({error.strerror})"
    try:
        writer.write(request)
        await writer.drain()
        if kind == "leaves at once":
            return "left"
        if kind in ("half closed", "cut short"):
            writer.write_eof()
        async with asyncio.timeout(PATIENCE):
            line = await reader.readline()
            while await reader.read(65536):
                pass
        return line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"
    except TimeoutError:
        return "silent"
    except (OSError, asyncio.IncompleteReadError, IndexError, ValueError):
        return "closed"
    finally:
        writer.transport.abort()


async def storm(endpoint: Endpoint, requests: int, concurrency: int, seed: int) -> Storm:
    """Send it all; the endpoint must be ready."""
    described = await endpoint.fetch("GET", "/openapi.json")
    model = await endpoint.first_model()
    maker, found = Maker(described, model, seed), Storm()
    expected = {prompt: await _good(endpoint, prompt) for prompt in GOOD}
    left = iter(range(requests))

    async def work() -> None:
        for i in left:
            if i % GOOD_EVERY == 0:
                prompt = GOOD[i // GOOD_EVERY % len(GOOD)]
                text = await _good(endpoint, prompt)
                found.good += 1
                if text != expected[prompt]:
                    found.wrong.append(f"{prompt!r} gave {text!r}, before {expected[prompt]!r}")
            kind, request = maker.next()
            answer = await _send(endpoint, kind, request)
            found.answers[kind][answer] += 1
            if answer.startswith(("5", "no")) and answer != "503":
                found.faults.append(f"{answer} for {request[:400]!r}")

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return found


async def _good(endpoint: Endpoint, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = await endpoint.fetch("POST", "/v1/completions", body)
    return str(answer["choices"][0]["text"])


LEFT = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "pages in use": 'octavo:pages{engine="0",model_name=',
    "restarts": "octavo:restarts_total",
    "compiles after ready": "octavo:compiles_after_ready_total",
}


async def leftovers(endpoint: Endpoint) -> dict[str, float]:
    """What is left once the last requests have had time to end; all zero is clean."""
    until = time.monotonic() + SETTLE
    while True:
        lines = (await endpoint.text("GET", "/metrics")).splitlines()
        values = {
            name: sum(
                float(line.rsplit(" ", 1)[1])
                for line in lines
                if line.startswith(start) and (name != "pages in use" or 'state="used"' in line)
            )
            for name, start in LEFT.items()
        }
        if not any(values.values()) or time.monotonic() > until:
            return values
        await asyncio.sleep(0.5)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://localhost:8000", help="the server")
    parser.add_argument("--api-key", default="", help="the server's key")
    for name, default, help in (
        ("requests", 50_000, "malformed requests"),
        ("concurrency", 32, "connections at once"),
        ("seed", 0, "the same seed makes the same requests"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=help)


async def _run(args: argparse.Namespace) -> tuple[Storm, dict[str, float], float]:
    endpoint = Endpoint.parse(args.url, args.api_key)
    began = time.monotonic()
    found = await storm(endpoint, args.requests, args.concurrency, args.seed)
    return found, await leftovers(endpoint), time.monotonic() - began


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 when anything broke, leaked or answered wrongly."""
    found, left, seconds = asyncio.run(_run(args))
    bad = found.faults + found.wrong
    if args.json:
        result = {"bench": "fuzz", "machine": machine(), "answers": found.answers, "left": left}
        print(json.dumps({**result, "good": found.good, "bad": bad, "seconds": seconds}))
    else:
        rows = [
            (kind, ", ".join(f"{count} x {what}" for what, count in answers.most_common()))
            for kind, answers in sorted(found.answers.items())
        ]
        rows.append(("good, between them", f"{found.good}; other answers {len(found.wrong)}"))
        rows.append(("faults of the server", str(len(found.faults))))
        rows += [(f"left: {name}", f"{value:g}") for name, value in left.items()]
        print(f"# {args.requests} malformed requests in {seconds:.0f} s, seed {args.seed}")
        print_table(("what", "answers"), rows, indent="")
        for line in bad[:20]:
            print(line)
    return int(bool(bad or any(left.values())))
