"""Who may ask: API keys, compared in constant time, at every route that is not open to all."""

import dataclasses
import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.engine.config import ConfigError
from octavo.server.protocol.errors import ApiError
from octavo.server.respond import error_response
from octavo.server.settings import ServerSettings

VARIABLE = "OCTAVO_API_KEY"
OPEN = frozenset({"/health", "/ping", "/ready", "/"})  # for probes, and the page without its data
OPEN_FOLDER = "/page/"
FIGURES = frozenset({"/metrics", "/load"})


def with_all_keys(settings: ServerSettings) -> ServerSettings:
    """The settings with the keys of flags, environment and file. Raises ConfigError."""
    keys = [*settings.api_key]
    if os.environ.get(VARIABLE):
        keys.append(os.environ[VARIABLE])
    if settings.api_key_file:
        keys += _read(settings.api_key_file)
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                "an API key must be printable ASCII without spaces, and not empty",
                "openssl rand -hex 24 makes one",
            )
    if settings.guard_metrics and not keys:
        raise ConfigError("--guard-metrics needs an API key", f"set {VARIABLE}")
    return dataclasses.replace(settings, api_key=list(dict.fromkeys(keys)))


def _read(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`api_key_file`: {path} cannot be read: {error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"`api_key_file`: {path} holds no key", "write one key a line")
    return keys


def needs_key(settings: ServerSettings, path: str) -> bool:
    """Whether this path answers only to those with a key."""
    if not settings.api_key or path in OPEN or path.startswith(OPEN_FOLDER):
        return False
    return settings.guard_metrics or path not in FIGURES


class ApiKeys:
    """Lets nobody past without one of the keys, except where all may go."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and needs_key(self._settings, scope["path"]):
            if not self._knows(scope["headers"]):
                await error_response(_unauthorized())(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether one of the keys was sent. All are compared, always: time says nothing."""
        known = False
        for name, value in headers:
            if name == b"x-api-key":
                key = value
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
            else:
                continue
            digest = hashlib.sha256(key).digest()
            for own in self._digests:
                known |= hmac.compare_digest(digest, own)
        return known


def _unauthorized() -> ApiError:
    return ApiError(
        401,
        "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
        headers={"www-authenticate": "Bearer"},
    )
