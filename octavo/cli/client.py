"""A small client of an OpenAI endpoint, on asyncio's own streams.

One connection per request, HTTP/1.1, bodies by length or in chunks, server-sent events. It is this
small so that the load generator measures the server and not the client.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from octavo.engine.config import ConfigError

LINE_LIMIT = 2**24  # bytes in one line: an event with the log probabilities of a whole chunk fits


class HttpError(Exception):
    """A response whose status is not 200."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {error_message(body)}")
        self.status = status
        self.body = body


def error_message(body: str) -> str:
    """The sentence in an OpenAI error object, or the body as it is."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.strip()[:500]


@dataclass(frozen=True)
class Endpoint:
    """Where requests go."""

    host: str
    port: int
    secure: bool = False
    root: str = ""  # path before /v1
    key: str = ""

    @classmethod
    def parse(cls, url: str, key: str = "") -> Self:
        """`http://localhost:8000`, with or without a trailing `/v1`."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"not an HTTP address: {url}", "write --url http://localhost:8000")
        secure = parts.scheme == "https"
        root = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if secure else 80), secure, root, key)

    def __str__(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.host}:{self.port}{self.root}"

    async def fetch(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of a whole response; HttpError unless the status is 200."""
        return json.loads(await self.text(method, path, body))

    async def text(self, method: str, path: str, body: Any = None) -> str:
        """A whole response as it is; HttpError unless the status is 200."""
        async with self._exchange(method, path, body) as (status, lines):
            text = "\n".join([line async for line in lines])
        if status != 200:
            raise HttpError(status, text)
        return text

    async def events(self, path: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        """The JSON of each server-sent event, until `[DONE]` or the end of the stream."""
        async with self._exchange("POST", path, body) as (status, lines):
            if status != 200:
                raise HttpError(status, "\n".join([line async for line in lines]))
            async for line in lines:
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise HttpError(500, data)
                yield event

    async def first_model(self) -> str:
        """The first name that the server lists."""
        models = await self.fetch("GET", "/v1/models")
        return str(models["data"][0]["id"])

    @asynccontextmanager
    async def _exchange(
        self, method: str, path: str, body: Any
    ) -> AsyncIterator[tuple[int, AsyncIterator[str]]]:
        """Send one request; the status and the lines of the body."""
        reader, writer = await self._connect()
        try:
            payload = b"" if body is None else json.dumps(body).encode()
            head = [
                f"{method} {self.root}{path} HTTP/1.1",
                f"Host: {self.host}:{self.port}",
                "Connection: close",
                "Content-Type: application/json",
                f"Content-Length: {len(payload)}",
            ]
            if self.key:
                head.append(f"Authorization: Bearer {self.key}")
            writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + payload)
            await writer.drain()
            status, headers = await _read_head(reader)
            if headers.get("transfer-encoding") == "chunked":
                yield status, _lines(_chunks(reader))
            else:
                yield status, _lines(_whole(reader, headers.get("content-length")))
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        context = ssl.create_default_context() if self.secure else None
        try:
            return await asyncio.open_connection(
                self.host, self.port, ssl=context, limit=LINE_LIMIT
            )
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise ConfigError(
                f"cannot reach {self}: {reason}", "start a server: octavo serve smollm2-135m"
            ) from None


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first = (await reader.readline()).split()
    if len(first) < 2:
        raise ConnectionResetError("the server closed the connection before it answered")
    headers = {}
    while (line := (await reader.readline()).decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return int(first[1]), headers


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a chunked body."""
    while (length := int((await reader.readline()).split(b";")[0] or b"0", 16)) > 0:
        yield await reader.readexactly(length)
        await reader.readline()


async def _whole(reader: asyncio.StreamReader, length: str | None) -> AsyncIterator[bytes]:
    yield await (reader.read() if length is None else reader.readexactly(int(length)))


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The lines of a body, whatever its pieces are."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.decode().rstrip("\r")
    if rest:
        yield rest.decode()
