"""Which host this is: flags, then the environment, then the launcher's own variables."""

from typing import Any

import pytest

from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.hosts import Found, find, first_host, leader_endpoint, settle

LWS = {"LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2", "LWS_LEADER_ADDRESS": "pod-0.svc"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "gpu[03-06]"}
TPU = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}


def config(**more: Any) -> EngineConfig:
    return EngineConfig(**{"mesh": "model=8"} | more)


def test_one_host_needs_nothing_and_asks_nobody() -> None:
    assert settle(config(), LWS | SLURM | TPU) == config()


def test_the_environment_fills_in_what_the_flags_leave_open() -> None:
    environment = {"OCTAVO_HOSTS": "2", "OCTAVO_HOST_INDEX": "1", "OCTAVO_LEADER": "a:7000"}
    assert settle(config(), environment) == config(hosts=2, host_index=1, leader="a:7000")
    mine = config(hosts=4, host_index=3, leader="b:1")
    assert settle(mine, environment) == mine


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        (LWS, Found("LeaderWorkerSet", 4, 2, "pod-0.svc")),
        (SLURM, Found("Slurm", 4, 1, "gpu03")),
        (TPU, Found("Cloud TPU", 2, 1, "t-0.svc")),
        ({"SLURM_PROCID": "1"}, None),
    ],
)
def test_launchers_say_who_is_who(environment, found) -> None:
    assert find(environment) == found
    if found is not None:
        settled = settle(config(hosts="auto"), environment)
        assert (settled.hosts, settled.host_index) == (found.hosts, found.index)
        assert settled.leader == f"{found.leader}:7461"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-006,9],cpu1", "gpu003"), ("a,b", "a"), ("n[7]-ib", "n7-ib"), ("x", "x")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hosts": 2}, "`host_index` is not given"),
        ({"hosts": "auto"}, "`hosts` is not given"),
        ({"hosts": 2, "host_index": 1}, "`leader` is not given"),
        ({"hosts": 2, "host_index": 2, "leader": "a:1"}, "from 0 to 1 .* got 2"),
        ({"host_index": 1}, "`host_index` is 1, but `hosts` is 1"),
        ({"hosts": 3, "host_index": 0, "leader": "a:1"}, "8 devices, which 3 hosts cannot share"),
        ({"hosts": 2, "host_index": 0, "leader": "a:1", "mesh": ""}, "1 device, which 2 hosts"),
        ({"hosts": 2, "host_index": 0, "leader": "a:1", "mesh": "data=2"}, "cuts `data`"),
        ({"hosts": 2, "host_index": 0, "leader": ":1"}, "must be ADDRESS:PORT"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(settings, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settle(config(**settings), {})


def test_addresses() -> None:
    assert leader_endpoint("10.0.0.1:99") == ("10.0.0.1", 99)
    assert leader_endpoint("name") == ("name", 7461)
    assert leader_endpoint("[::1]:99") == ("[::1]", 99)
    with pytest.raises(ConfigError):
        leader_endpoint("::1")
    with pytest.raises(ConfigError, match="65534"):
        leader_endpoint("a:65535")
