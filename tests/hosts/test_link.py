"""The line between hosts, without engines: who may join, what travels, how a lost end shows."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.config import ConfigError
from octavo.engine.link import Follower, HostLost, Leader
from octavo.engine.orders import FORWARD, GREEDY, Order, thick, thickened, thin, thinned
from tests.hosts.cluster import two_free_ports

FACTS = {"page_size": "16", "jax": "0.10.2"}
PATIENCE = 10.0  # seconds


class Team:
    """Both ends in this process; what a lost end would do is only written down."""

    def __init__(self, followers: int) -> None:
        self.lost: list[str] = []
        port = two_free_ports()
        self.leader = Leader(port, followers + 1, self.lost.append)
        self.followers = [
            Follower("127.0.0.1", port, i + 1, self.lost.append) for i in range(followers)
        ]

    def each(self, *work: object) -> list[object]:
        """Every end's part of a meeting; an error is a result."""
        results: list[object] = [None] * len(work)

        def one(index: int, call: Any) -> None:
            try:
                results[index] = call()
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(i, call)) for i, call in enumerate(work)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        return results

    def meet(self) -> "Team":
        calls = [lambda f=f: f.join(FACTS) for f in self.followers]
        assert self.each(lambda: self.leader.gather(FACTS), *calls) == [None] * (len(calls) + 1)
        return self


@pytest.fixture
def team() -> Iterator[Team]:
    one = Team(2)
    yield one
    one.leader.stop()


def until(holds) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_orders_come_whole_and_in_order_to_every_host(team) -> None:
    team.meet()
    sent = [
        Order(1, plan=bytes(4000) + b"\1\2\3\4", edit=True, rows=2, tokens=32, forward=FORWARD),
        Order(2, rows=2, forward=FORWARD, sampling=GREEDY),
        Order(3, empty=True),
    ]
    for order in sent:
        team.leader.order(order)
    assert team.leader.orders == 3
    assert team.leader.order_bytes < 400
    for follower in team.followers:
        orders = (order for order in follower.orders() if order is not None)
        assert [next(orders) for _ in sent] == sent


def test_the_least_memory_of_all_hosts_holds_for_all(team) -> None:
    team.meet()
    limits = [5000, 3000, 4000]
    ends = [team.leader, *team.followers]
    calls = [lambda e=e, n=n: e.agree(n) for e, n in zip(ends, limits, strict=True)]
    assert team.each(*calls) == [3000] * 3


def test_a_host_with_other_settings_is_refused_by_name(team) -> None:
    other = FACTS | {"page_size": "32"}

    def gather() -> None:
        try:
            team.leader.gather(FACTS)
        except ConfigError as error:
            team.leader.stop(str(error))
            raise

    first, second = team.followers
    found = team.each(gather, lambda: first.join(FACTS), lambda: second.join(other))
    words = "host 2 was started with `page_size` 32, the leader with 16"
    assert all(isinstance(error, ConfigError) and words in str(error) for error in found), found


def test_a_host_that_made_other_programs_is_refused(team) -> None:
    team.meet()
    first, second = team.followers
    first.built("same")
    second.built("other")
    with pytest.raises(ConfigError, match="host 2 came to other sizes"):
        team.leader.built("same")


def test_a_host_that_goes_is_missed_and_no_further_order_is_sent(team) -> None:
    team.meet()
    gone = team.followers[1]
    gone._socket.close(linger=0)
    until(lambda: team.lost)
    assert "host 2 is gone" in team.lost[0]
    with pytest.raises(HostLost, match="host 2 is gone"):
        team.leader.order(Order(1))


def test_a_host_that_fails_says_why(team) -> None:
    team.meet()
    team.followers[0].trouble("out of memory")
    until(lambda: team.lost)
    assert team.lost == ["host 1 cannot go on: out of memory"]


def test_a_host_that_missed_an_order_does_not_go_on(team) -> None:
    team.meet()
    team.leader.order(Order(2))
    with pytest.raises(HostLost, match="step 2 instead of 1"):
        list(team.followers[0].orders())


def test_a_clean_end_is_no_loss(team) -> None:
    team.meet()
    ends = [lambda f=f: list(f.orders()) for f in team.followers]
    assert team.each(lambda: team.leader.stop(), *ends)[0] is None
    assert team.lost == []


@given(st.binary(max_size=200).map(lambda b: b * 8), st.integers(0, 5000))
@settings(max_examples=50, deadline=None)
def test_an_array_is_the_same_after_its_journey(some: bytes, zeros: int) -> None:
    array = some + bytes(4 * zeros) + some
    array += bytes(-len(array) % 4)
    assert thick(thin(array)) == array
    order = Order(1, plan=array, mask=array)
    assert thickened(thinned(order)) == order
