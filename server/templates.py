"""Chat templates that requests bring: rendered in a process apart that is ended when it takes long.

A template is a program. Jinja's sandbox keeps it from files and objects, not from looping for ever
or from filling memory, and no thread of ours could be stopped from outside. So a child that holds
nothing renders them, one at a time, within limits of time and memory; one that overstays is killed
and the next template gets a fresh child. It starts with the first such request.

    parent --4 bytes of length, msgpack--> child: RenderOrder
    parent <--4 bytes of length, msgpack-- child: Rendered
"""

import asyncio
import contextlib
import os
import resource
import struct
import sys
from typing import Any

import msgspec

from octavo.engine.text.template import ChatTemplate, TemplateError

MEMORY = 512 * 1024 * 1024  # bytes of address space beyond what the child begins with
LONGEST = 1 << 20  # characters of a template
LONGEST_PROMPT = 1 << 24  # characters of what it makes
START_SECONDS = 20.0  # for the child to start, which is no fault of the template
_LENGTH = struct.Struct("<I")


class RenderOrder(msgspec.Struct, array_like=True):
    source: str
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    arguments: dict[str, Any]


class Rendered(msgspec.Struct, array_like=True):
    text: str = ""
    error: str = ""


class TemplateRoom:
    """Where templates of requests are rendered."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._turn = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None

    async def render(self, order: RenderOrder) -> str:
        """The prompt's text. Raises TemplateError, also when it takes longer than it may."""
        if len(order.source) > LONGEST:
            raise TemplateError(f"the chat template has more than {LONGEST:,} characters")
        try:
            payload = msgspec.msgpack.encode(order)
        except (TypeError, ValueError, OverflowError) as error:
            raise TemplateError(f"the chat template's variables cannot be read: {error}") from None
        async with self._turn:
            try:
                child = await self._ready_child()
                rendered = await asyncio.wait_for(_ask(child, payload), self._seconds)
            except TimeoutError:
                raise TemplateError(
                    f"the chat template of this request ran longer than {self._seconds:g} s"
                ) from None
            except (OSError, asyncio.IncompleteReadError):
                raise TemplateError(
                    "the chat template of this request took more memory than it may have"
                ) from None
            finally:
                if sys.exception() is not None:  # cancelled ones too: it may still be at work
                    self.close()
        if rendered.error:
            raise TemplateError(rendered.error)
        return rendered.text

    async def _ready_child(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                "from octavo.server.templates import main; main()",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            assert self._child.stdout is not None
            await asyncio.wait_for(self._child.stdout.readexactly(1), START_SECONDS)
        return self._child

    def close(self) -> None:
        """End the child; another starts when one is needed."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()
            self._child = None


async def _ask(child: asyncio.subprocess.Process, payload: bytes) -> Rendered:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(_LENGTH.pack(len(payload)) + payload)
    await child.stdin.drain()
    (length,) = _LENGTH.unpack(await child.stdout.readexactly(_LENGTH.size))
    return msgspec.msgpack.decode(await child.stdout.readexactly(length), type=Rendered)


def main() -> None:
    """The child: renders until its input ends."""
    order, answer = sys.stdin.buffer, sys.stdout.buffer
    with open("/proc/self/statm", "rb") as statm:
        held = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    answer.write(b"+")
    answer.flush()
    while head := order.read(_LENGTH.size):
        payload = order.read(_LENGTH.unpack(head)[0])
        made = msgspec.msgpack.encode(_render(msgspec.msgpack.decode(payload, type=RenderOrder)))
        answer.write(_LENGTH.pack(len(made)) + made)
        answer.flush()


def _render(order: RenderOrder) -> Rendered:
    try:
        template = ChatTemplate(order.source, order.special_tokens)
        text = template.render(order.messages, **order.arguments)
        if len(text) > LONGEST_PROMPT:
            return Rendered(error=f"the chat template made more than {LONGEST_PROMPT:,} characters")
        return Rendered(text)
    except TemplateError as error:
        return Rendered(error=str(error))
    except MemoryError:
        return Rendered(error="the chat template took more memory than it may have")
    except RecursionError:
        return Rendered(error="the chat template calls itself too often")
    except Exception as error:
        return Rendered(error=f"the chat template refuses these messages: {error}")
