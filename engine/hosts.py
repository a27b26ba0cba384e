"""Which of several hosts this one is: from the command line, else from what starts the processes.

No jax: the command line asks before any engine starts, to know who owns the endpoint.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from octavo.engine.config import ConfigError, EngineConfig, parse_mesh

PORT = 7461  # of the leader, where none is given; the next one is for jax's own runtime


@dataclass(frozen=True)
class Found:
    """What a launcher says of its processes."""

    by: str
    hosts: int
    index: int
    leader: str  # host name or address, without a port


def leader_endpoint(leader: str) -> tuple[str, int]:
    """`host:port` as its parts; `[::1]:7461` is an IPv6 address. Raises ConfigError."""
    host, _, port = leader.rpartition(":") if re.search(r":\d+$", leader) else (leader, "", "")
    if not host or (":" in host and not host.startswith("[")):
        raise ConfigError(
            f"`leader` must be ADDRESS:PORT, got {leader!r}",
            f"for example --leader 10.0.0.1:{PORT}; an IPv6 address stands in brackets",
        )
    number = int(port) if port else PORT
    if not 1 <= number < 65535:
        raise ConfigError(f"the port of `leader` must be from 1 to 65534, got {number}")
    return host, number


def settle(config: EngineConfig, environ: Mapping[str, str]) -> EngineConfig:
    """The config with `hosts`, `host_index` and `leader` filled in. Raises ConfigError.

    What the config leaves open is looked up in OCTAVO_HOSTS, OCTAVO_HOST_INDEX and OCTAVO_LEADER,
    then, where more than one host is asked for, in what Kubernetes' LeaderWorkerSet, Cloud TPU and
    Slurm tell their processes.
    """
    hosts: int | str = config.hosts
    if hosts == 1 and environ.get("OCTAVO_HOSTS"):
        hosts = _number(environ, "OCTAVO_HOSTS") if environ["OCTAVO_HOSTS"] != "auto" else "auto"
    if hosts == 1:
        if config.host_index > 0:
            raise ConfigError(
                f"`host_index` is {config.host_index}, but `hosts` is 1", "give every host --hosts"
            )
        return config
    index, leader = config.host_index, config.leader or environ.get("OCTAVO_LEADER", "")
    if index < 0 and environ.get("OCTAVO_HOST_INDEX"):
        index = _number(environ, "OCTAVO_HOST_INDEX")
    if hosts == "auto" or index < 0 or not leader:
        found = find(environ)
        if found is None:
            missing = "hosts" if hosts == "auto" else "host_index" if index < 0 else "leader"
            raise ConfigError(
                f"`{missing}` is not given, and nothing here says it: neither LeaderWorkerSet, "
                "Cloud TPU nor Slurm started this process",
                f"--hosts 2 --host-index 0 --leader 10.0.0.1:{PORT}",
            )
        hosts = found.hosts if hosts == "auto" else hosts
        index = found.index if index < 0 else index
        leader = leader or f"{found.leader}:{PORT}"
    settled = replace(config, hosts=hosts, host_index=index, leader=leader)
    settled.validate()
    check(settled)
    return settled if hosts != 1 else replace(settled, host_index=-1, leader="")


def check(config: EngineConfig) -> None:
    """Raise ConfigError where a settled config cannot work."""
    hosts, index = config.hosts, config.host_index
    assert isinstance(hosts, int), "settled"
    leader_endpoint(config.leader)
    if not 0 <= index < hosts:
        raise ConfigError(
            f"`host_index` must be from 0 to {hosts - 1} with `hosts` {hosts}, got {index}",
            "0 is the leader",
        )
    if hosts == 1 or config.mesh == "auto":
        return
    sizes = parse_mesh(config.mesh)
    devices = 1
    for count in sizes.values():
        devices *= count
    if devices < hosts or devices % hosts:
        raise ConfigError(
            f"`mesh={config.mesh}` has {devices} device{'s' * (devices != 1)}, which {hosts} hosts "
            "cannot share evenly",
            f"--mesh model={max(devices, hosts) // hosts * hosts}, over the devices of all hosts",
        )
    if sizes.get("data", 1) > 1:
        raise ConfigError(
            f"`mesh={config.mesh}` cuts `data`, whose results one host alone cannot read",
            "cut `model` or `expert`, or start one server per group of hosts",
        )


def find(environ: Mapping[str, str]) -> Found | None:
    """What the launcher of this process says, if it says it all."""
    for by, names in (
        ("LeaderWorkerSet", ("LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS")),
        ("Slurm", ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")),
    ):
        size, index, leader = (environ.get(name, "") for name in names)
        if size.isdecimal() and index.isdecimal() and leader:
            return Found(by, int(size), int(index), first_host(leader))
    workers, index = environ.get("TPU_WORKER_HOSTNAMES", ""), environ.get("TPU_WORKER_ID", "")
    if workers and index.isdecimal():
        machines = [name.strip() for name in workers.split(",")]
        return Found("Cloud TPU", len(machines), int(index), machines[0])
    return None


def first_host(nodes: str) -> str:
    """The first name of Slurm's list: `gpu[003-006,9],cpu1` begins with gpu003."""
    first = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,]*)", nodes)
    assert first is not None
    before, numbers, after = first.groups()
    return before + re.split(r"[-,]", numbers or "")[0] + after


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise ConfigError(f"the environment's {name} must be a number, got {environ[name]!r}")
    return int(environ[name])
