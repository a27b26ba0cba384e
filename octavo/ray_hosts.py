"""One model over several hosts of a Ray cluster: the same command on each, as one Ray job.

    ray job submit -- python -m octavo.ray_hosts --hosts 2 --gpus 8 MODEL --mesh model=16

Ray finds hosts that have room and starts `octavo serve` on each; what crosses between them then is
none of Ray's business. When one ends, or the job is stopped, all end.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PORT = 7461
SERVE = (sys.executable, "-m", "octavo", "serve")
GRACE = 60.0  # seconds for `octavo serve` to end by itself


class Host:
    """One host: it runs one command, unless it is told to stop first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def address(self) -> str:
        return str(ray.util.get_node_ip_address())

    def serve(self, command: Sequence[str], environment: dict[str, str]) -> int:
        """The exit code, when it ends; 0 if it never began."""
        with self._lock:
            if self._stopped:
                return 0
            self._process = subprocess.Popen([*command], env={**os.environ, **environment})
        return self._process.wait()

    def stop(self) -> None:
        """Ask it to end, then end it."""
        with self._lock:
            self._stopped = True
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()


def run(hosts: int, devices: dict[str, float], command: Sequence[str], port: int = PORT) -> int:
    """Run `command` on `hosts` hosts with `devices` each; the first exit code that is not 0."""
    group = placement_group([devices] * hosts, strategy="STRICT_SPREAD")
    ray.get(group.ready())  # waits until there are so many hosts with room
    actors = [_host(group, i, devices) for i in range(hosts)]
    leader = ray.get(actors[0].address.remote())
    print(f"octavo: the endpoint is on {leader}", flush=True)
    shared = {"OCTAVO_HOSTS": str(hosts), "OCTAVO_LEADER": f"{leader}:{port}"}
    running = [
        actor.serve.remote(command, {**shared, "OCTAVO_HOST_INDEX": str(i)})
        for i, actor in enumerate(actors)
    ]
    try:
        ray.wait(running)
    finally:
        ray.get([actor.stop.remote() for actor in actors])
    codes: list[int] = ray.get(running)
    return next((code for code in codes if code), 0)


def _host(group: Any, index: int, devices: dict[str, float]) -> Any:
    others = {name: n for name, n in devices.items() if name not in ("CPU", "GPU")}
    actor: Any = ray.remote(Host)
    return actor.options(
        max_concurrency=2,  # `stop` is called while `serve` waits
        num_cpus=devices.get("CPU", 0),
        num_gpus=devices.get("GPU", 0),
        resources=others or None,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=index
        ),
    ).remote()


def main() -> int:
    """What stands behind our own flags goes to `octavo serve`."""
    parser = argparse.ArgumentParser(prog="python -m octavo.ray_hosts", description=__doc__)
    parser.add_argument("--hosts", type=int, required=True, metavar="N")
    parser.add_argument("--gpus", type=float, default=0, metavar="X", help="of each host")
    parser.add_argument("--tpus", type=float, default=0, metavar="X", help="of each host")
    parser.add_argument("--cpus", type=float, default=1, metavar="X", help="of each host")
    ours, rest = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `ray job stop`: `finally` runs
    ray.init()
    wanted = {"CPU": ours.cpus, "GPU": ours.gpus, "TPU": ours.tpus}
    return run(ours.hosts, {k: v for k, v in wanted.items() if v}, [*SERVE, *rest])


if __name__ == "__main__":
    raise SystemExit(main())
