"""Replicas of an engine behind one address, under Ray Serve.

    pip install 'octavo[ray]'
    serve run octavo.ray_serve:build model=smollm2-135m max_replicas=4

Ray starts, counts, places and replaces the replicas; what a request meets is `server/replicas/`.
"""

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.engine.config import EngineConfig
from octavo.engine.process import CORE
from octavo.server.keys import with_all_keys
from octavo.server.logs import set_up as set_up_logs
from octavo.server.protocol.errors import unavailable
from octavo.server.replicas.door import Door, ReplicaLost
from octavo.server.replicas.exchange import Answer, Head, Order
from octavo.server.replicas.replica import Replica
from octavo.server.replicas.scale import Scale, parts_of
from octavo.server.settings import ServerSettings
from octavo.server.tracing import check_tracing

AT_A_DOOR = 4096  # requests that one door holds at once
HEALTH_PERIOD = 5.0  # seconds between two questions whether a replica is well
START_TIME = 1800.0  # seconds that loading and compiling may take before Ray gives a replica up


class EngineReplica:
    """What Ray runs as a replica: an actor, and the engine as its child."""

    async def __init__(  # type: ignore[misc]
        self, config: dict[str, Any], settings: dict[str, Any], core: str
    ) -> None:
        server = ServerSettings(**settings)
        set_up_logs(server.log_json)
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = await asyncio.to_thread(
            Replica,
            EngineConfig(**config),
            server,
            name,
            on_end=lambda: os._exit(1),  # Ray sees at once that it is gone, and starts another
            core=core,
        )
        await self._replica.start()

    async def answer(self, order: Order) -> AsyncIterator[Head | bytes]:
        async for piece in self._replica.answer(order):
            yield piece

    async def tell(self, order: Order) -> Answer:
        return await self._replica.tell(order)

    def check_health(self) -> None:
        """Ray asks; raising says that another should take this one's place."""
        trouble = self._replica.trouble()
        if trouble is not None:
            raise RuntimeError(trouble)

    async def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it never started
            await self._replica.stop()


class DoorKeeper:
    """What Ray runs at the address: a Door over a handle to the replicas."""

    def __init__(self, replicas: DeploymentHandle, retries: int, max_body_bytes: int) -> None:
        self._replicas = replicas
        self._streams = replicas.options(method_name="answer", stream=True)
        self._door = Door(self._ask, self._tell, retries=retries, max_body_bytes=max_body_bytes)

    async def __call__(self, request: Request) -> Response:
        return _Handed(self._door)

    async def _ask(self, order: Order) -> AsyncIterator[Head | bytes]:
        pieces = self._streams.remote(order)
        try:
            async for piece in pieces:
                yield _without_id(piece) if isinstance(piece, Head) else piece
        except (RayActorError, ReplicaUnavailableError) as error:
            raise ReplicaLost(str(error).splitlines()[0]) from None
        except RayTaskError as error:
            if isinstance(error.cause, ReplicaLost):
                raise ReplicaLost(str(error.cause)) from None
            raise
        except BackPressureError as error:
            raise unavailable(f"too many requests wait already: {error}", 1) from None
        except DeploymentUnavailableError:
            raise unavailable("no replica could be started; Ray Serve's log says why") from None
        finally:
            pieces.cancel()  # of what is over it does nothing

    async def _tell(self, order: Order) -> Sequence[Answer]:
        told = await self._replicas.broadcast("tell", order).results_async(return_exceptions=True)
        return [answer for answer in told if isinstance(answer, Answer)]


def _without_id(head: Head) -> Head:
    """Serve names each request itself, and the replica took that name for its answer's id."""
    return Head(head.status, [pair for pair in head.headers if pair[0] != b"x-request-id"])


class _Handed(Response):
    """A response that the door gives."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door(scope, receive, send)


def build(args: dict[str, Any]) -> serve.Application:
    """The application, from settings by name: the engine's, the endpoint's and `Scale`'s.

    ConfigError names a setting that does not exist or does not fit.
    """
    args = dict(args)
    core = args.pop("core", CORE)
    config, settings, scale = parts_of(args)
    settings = with_all_keys(settings)
    check_tracing(settings)
    replicas = _replicas(settings, config, scale).bind(
        dataclasses.asdict(config), dataclasses.asdict(settings), core
    )
    door = serve.deployment(
        DoorKeeper,
        name="Door",
        num_replicas=scale.doors,
        max_ongoing_requests=AT_A_DOOR,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
    )
    return door.bind(replicas, scale.retries, settings.max_body_bytes)


def _replicas(settings: ServerSettings, config: EngineConfig, scale: Scale) -> serve.Deployment:
    devices: dict[str, Any] = {"num_cpus": scale.cpus, "num_gpus": scale.gpus}
    if scale.tpus:
        devices["resources"] = {"TPU": scale.tpus}
    return serve.deployment(
        EngineReplica,
        name="Engine",
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_ongoing_requests,
            "upscale_delay_s": scale.upscale_delay,
            "downscale_delay_s": scale.downscale_delay,
            "look_back_period_s": scale.look_back,
        },
        max_ongoing_requests=scale.max_ongoing_requests,
        max_queued_requests=config.max_num_queued_reqs,
        ray_actor_options=devices,
        health_check_period_s=HEALTH_PERIOD,
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
    )
