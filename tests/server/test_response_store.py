"""The store of responses: its bounds, its time, several processes."""

import asyncio
import os
import time

import pytest

from octavo.server.conversions.responses import response_of
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.response_store import Limits, ResponseStore


def response(name: str, status: str = "completed"):
    made = response_of(ResponsesRequest(input="?"), name, 1, "tiny", {})
    made.status = status
    return made


@pytest.fixture
def store_of(tmp_path):
    opened = []

    def make(count=100, size=2**20, seconds=100.0, folder=tmp_path):
        opened.append(ResponseStore(str(folder), Limits(count, size, seconds)))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


async def kept(store, names):
    return "".join([name for name in names if await store.get(name) is not None])


async def test_the_one_used_longest_ago_goes_first(store_of):
    store = store_of(count=3)
    for name in "abc":
        await store.put(response(name), [])
    await store.get("a")
    await store.put(response("d"), [])
    assert await kept(store, "abcd") == "acd"


async def test_bytes_are_bounded_too(store_of):
    store = store_of(size=20_000)
    for name in "abcdef":
        await store.put(response(name), [{"text": "x" * 5_000}])
    assert await kept(store, "abcdef") == "def"
    await store.put(response("g"), [{"text": "x" * 50_000}])
    assert await kept(store, "g") == ""


async def test_what_is_worked_on_is_never_dropped(store_of):
    store = store_of(count=1)
    await store.put(response("a", "in_progress"), [])
    await store.put(response("b"), [])
    assert await kept(store, "a") == "a"


async def test_nothing_outlives_its_time(store_of):
    store = store_of(seconds=0.05)
    await store.put(response("a"), [])
    assert await kept(store, "a") == "a"
    time.sleep(0.06)
    assert await kept(store, "a") == ""


async def test_two_processes_see_the_same(store_of):
    one, other = store_of(), store_of()
    await one.put(response("a", "in_progress"), [{"id": "i"}], streams=True)
    found = await other.get("a")
    assert found.items == [{"id": "i"}] and found.streams
    await other.ask_to_cancel("a")
    assert await one.unwanted(["a", "gone"]) == ["a", "gone"]


async def test_many_may_open_it_at_once(store_of):
    stores = [store_of() for _ in range(8)]
    await asyncio.gather(*(store.put(response(str(i)), []) for i, store in enumerate(stores)))
    assert await kept(stores[0], "01234567") == "01234567"


async def test_work_of_a_process_that_ended_has_failed(store_of, monkeypatch):
    store = store_of()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    monkeypatch.setattr(os, "getpid", lambda: child)
    await store.put(response("a", "in_progress"), [])
    monkeypatch.undo()
    found = await store.get("a")
    assert found.response.status == "failed"
    assert "has ended" in found.response.error["message"]


async def test_events_are_found_behind_any_number(store_of):
    store = store_of()
    await store.put(response("a", "in_progress"), [])
    await store.append("a", 0, b"zero\n\none\n\n")
    await store.append("a", 2, b"two\n\nthree\n\n")
    assert await store.events("a", -1) == (b"zero\n\none\n\ntwo\n\nthree\n\n", 3, True)
    assert await store.events("a", 2) == (b"three\n\n", 3, True)
    await store.put(response("a"), [])
    assert await store.events("a", 3) == (b"", 3, False)
    await store.delete("a")
    assert await store.events("a", -1) == (b"", -1, False)


async def test_a_store_of_none_keeps_nothing(store_of):
    store = store_of(count=0)
    await store.put(response("a"), [])
    assert await store.get("a") is None
