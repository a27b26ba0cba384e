"""Several hosts become one mesh: they meet, start jax's runtime, and build the same engine.

leader     gather   start_runtime   agree on memory   compile, load   built   orders ...
follower   join     start_runtime   agree on memory   compile, load   built   ... run
"""

import dataclasses
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax

import octavo
from octavo.backends.record import Backend
from octavo.engine.assemble import Progress, assemble
from octavo.engine.build import Build
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.dispatch import Dispatcher
from octavo.engine.hosts import leader_endpoint
from octavo.engine.link import Follower, HostLost, Leader, end_process
from octavo.engine.memory import Resolved
from octavo.engine.planning import check_workspace
from octavo.engine.runner import choose_runner
from octavo.engine.store import sources

HEARTBEAT = 10  # seconds after which jax's own runtime ends who lost a peer; we are faster
TOGETHER = 300  # seconds for every host to start jax's runtime
CHECK_BEHIND = 8  # orders after which a follower looks whether one failed
# Settings that may differ from host to host: where things lie, and who is who.
OWN = ("host_index", "leader", "model", "tokenizer", "offline", "compilation_cache")


def facts(config: EngineConfig) -> dict[str, str]:
    """What must be equal on every host, as text by name."""
    settings = {k: str(v) for k, v in dataclasses.asdict(config).items() if k not in OWN}
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    python = "{}.{}".format(*sys.version_info)
    return {**settings, **versions, "octavo": octavo.__version__, "python": python} | {
        "sources": sources()[:12]
    }


def digest(resolved: Resolved) -> str:
    """One name for all that decides the programs."""
    r = resolved
    mesh = None if r.mesh is None else tuple(r.mesh.shape.items())
    parts = (r.model.config, r.dims, str(r.dtype), str(r.kv_dtype), r.row_buckets, r.token_buckets)
    whole = repr((*parts, r.steps, r.several_rows, mesh))
    return hashlib.sha256(whole.encode()).hexdigest()


def start_runtime(config: EngineConfig) -> None:
    """jax's own runtime on every host: from here on their devices are one list."""
    host, port = leader_endpoint(config.leader)
    if config.device in ("auto", "gpu"):
        # Else hosts tune kernels for each other, and one that found its programs kept is not there.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_shard_autotuning=false".strip()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"{host}:{port + 1}",
        num_processes=int(config.hosts),
        process_id=config.host_index,
        initialization_timeout=TOGETHER,
        heartbeat_timeout_seconds=HEARTBEAT,
        cluster_detection_method="deactivate",
    )


def lead(config: EngineConfig, address: str) -> Leader:
    """Wait for the other hosts and start the runtime with them. Raises ConfigError."""
    _check_model(config)
    leader = Leader(leader_endpoint(config.leader)[1], int(config.hosts), end_process(address))
    try:
        leader.gather(facts(config))
        start_runtime(config)
    except BaseException as error:
        leader.stop(str(error))
        raise
    return leader


def agreed(agree: Callable[[int], int], backend: Backend) -> Backend:
    """The backend with the memory of the host that has the least."""
    limit = agree(backend.memory_limit())
    return dataclasses.replace(backend, memory_limit=lambda: limit)


def follow(
    config: EngineConfig,
    address: str,
    progress: Progress | None,
    on_ready: Callable[[list[str]], object],
) -> None:
    """Be a host that is not the leader until that ends. Raises ConfigError with what is wrong."""
    _check_model(config)
    host, port = leader_endpoint(config.leader)
    follower = Follower(host, port, config.host_index, end_process(address))
    try:
        follower.join(facts(config))
        start_runtime(config)
        build = Build(config, progress)
        with build.stopped_by_errors():
            parts = assemble(
                config, progress, build.begin, lambda backend: agreed(follower.agree, backend)
            )
        dispatcher = Dispatcher(parts.params, build.programs())
        check_workspace(parts.resolved, dispatcher.programs.workspace())
        follower.built(digest(parts.resolved))
        on_ready(
            [f"backend  {parts.backend.reason}", f"model    {parts.resolved.model.config.family}"]
        )
        run(dispatcher, follower)
    except ConfigError as error:
        follower.trouble(error.message)
        raise
    except Exception as error:
        if why := follower.why(timeout=2.0):  # an end of the line explains what it broke
            raise HostLost(why) from error
        follower.trouble(f"{type(error).__name__}: {error}")
        raise


def run(dispatcher: Dispatcher, follower: Follower) -> None:
    """Run what the leader runs, and choose nothing. A program that failed raises here."""
    behind: deque[Any] = deque()
    for order in follower.orders():
        if order is not None:
            done = dispatcher.run(order)
            behind.append(done.taken)
        while behind and (order is None or len(behind) > CHECK_BEHIND):
            jax.block_until_ready(behind.popleft())


def _check_model(config: EngineConfig) -> None:
    if choose_runner(config) == "pooling":
        raise ConfigError(
            "a model that reads (`runner` pooling) runs on one host", "leave `hosts` at 1"
        )
