"""What /live sends: where the engine stands as JSON, of each page map only the cells that changed.

{"kind": "state", ...}   first, and whenever the engine starts, is ready, or is in trouble
{"kind": "view", ...}    a few times a second while it can be used
"""

from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import numpy as np

from octavo import __version__
from octavo.engine.messages import PageMap, View
from octavo.server.frontend import Frontend

MOST_CHANGES = 4  # a map of n cells is sent whole when more than n / 4 of them changed
BEAT = b": still here\n\n"
_json = msgspec.json.Encoder().encode


class LiveState(msgspec.Struct, tag_field="kind", tag="state"):
    """Whether the engine can be used, and what there is to know of it."""

    state: str  # "starting" | "ready" | "trouble" | "stopped"
    message: str
    model: str
    mode: str  # "chat" | "text": has no chat template | "embedding" | "score": generates nothing
    max_model_len: int
    version: str


class LiveMap(msgspec.Struct, omit_defaults=True):
    """One page group: all its cells, or those that changed; see engine.messages.PageMap."""

    pages: int
    window: int
    per_cell: int
    hits: list[int]
    count: int  # cells
    cells: bytes | None = None  # u32[count] in base64
    at: list[int] | None = None  # else cell `at[i]` is now `to[i]`
    to: list[int] | None = None


class LiveView(msgspec.Struct, tag_field="kind", tag="view"):
    """The engine at one moment; `slots` has the columns of engine.messages.View."""

    time: float
    stats: dict[str, float]  # of engine.messages.Stats; of its lists, the sums
    page_size: int
    maps: list[LiveMap]
    slots: list[list[int]]


def state_of(frontend: Frontend) -> LiveState:
    """The engine as this process knows it."""
    client = frontend.client
    trouble = client.trouble()
    if client.last_words is not None:
        state = "stopped"
    elif client.ready is None:
        state = "starting"
    else:
        state = "ready" if trouble is None else "trouble"
    return LiveState(
        state=state,
        message="the engine does not answer" if state == "trouble" else trouble or "",
        model=frontend.names[0],
        mode=mode_of(frontend),
        max_model_len=client.ready.max_model_len if client.ready else 0,
        version=__version__,
    )


def mode_of(frontend: Frontend) -> str:
    """What a page can do with this model besides looking on."""
    ready = frontend.client.ready
    if ready is not None and ready.pooler is not None:
        return "embedding" if ready.pooler.task == "embed" else "score"
    return "chat" if frontend.chats else "text"


class LiveFrames:
    """The frames of one reader, who is told of each map only what changed since the last one."""

    def __init__(self) -> None:
        self._told: list[np.ndarray] = []

    def view(self, view: View) -> bytes:
        maps = [np.frombuffer(page_map.cells, "<u4") for page_map in view.maps]
        same = [m.shape for m in maps] == [m.shape for m in self._told]
        told = self._told if same else [None] * len(maps)
        self._told = maps
        return frame(
            LiveView(
                time=view.time,
                stats=_totals(view),
                page_size=view.page_size,
                maps=[_live_map(*each) for each in zip(view.maps, maps, told, strict=True)],
                slots=np.frombuffer(view.slots, "<u4").reshape(-1, 7).tolist(),
            )
        )


def _totals(view: View) -> dict[str, float]:
    facts = msgspec.structs.asdict(view.stats)
    return {name: sum(x) if isinstance(x, list) else x for name, x in facts.items()}


def _live_map(page_map: PageMap, cells: np.ndarray, told: np.ndarray | None) -> LiveMap:
    out = LiveMap(
        pages=page_map.pages,
        window=page_map.window,
        per_cell=page_map.per_cell,
        hits=np.frombuffer(page_map.hits, "<u4").tolist(),
        count=len(cells),
    )
    changed = None if told is None else np.flatnonzero(cells != told)
    if changed is None or len(changed) > len(cells) // MOST_CHANGES:
        out.cells = page_map.cells
    else:
        out.at, out.to = changed.tolist(), cells[changed].tolist()
    return out


def frame(message: LiveState | LiveView) -> bytes:
    """One server-sent event."""
    return b"data: " + _json(message) + b"\n\n"


async def live(frontend: Frontend) -> AsyncIterator[bytes]:
    """Frames until the server stops: the state when it changes, views while there are any."""
    frames, state = LiveFrames(), state_of(frontend)
    yield frame(state)
    async with aclosing(frontend.client.watch()) as views:
        async for view in views:
            if (now := state_of(frontend)) != state:
                state = now
                yield frame(state)
            yield frames.view(view) if view is not None else BEAT
