"""How many replicas, on what: the settings that are neither the engine's nor the endpoint's."""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import yaml

from octavo.engine.config import ConfigError, EngineConfig, field_types
from octavo.server.settings import ServerSettings, setting

# What belongs to whoever holds the port.
FOREIGN = frozenset(
    "host port api_server_count cors_origin ssl_keyfile ssl_certfile ssl_ca_certs "
    "ssl_keyfile_password max_header_bytes max_header_count header_timeout body_timeout "
    "write_timeout keep_alive_timeout".split()
)
ALONE = frozenset({"max_stored_responses"})  # kept in one replica, unknown to the others


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Replicas and what each of them gets."""

    min_replicas: int = setting(1, "N", "replicas that always run")
    max_replicas: int = setting(1, "N", "replicas at most")
    target_ongoing_requests: float = setting(
        32.0, "X", "requests of a replica, waiting ones included, above which another starts"
    )
    max_ongoing_requests: int = setting(
        256, "N", "requests that a replica takes; more wait at the door for whichever has room"
    )
    upscale_delay: float = setting(10.0, "SECONDS", "how long it must be too much to start one")
    downscale_delay: float = setting(300.0, "SECONDS", "how long it must be too few to end one")
    look_back: float = setting(15.0, "SECONDS", "over which the number of requests is averaged")
    cpus: float = setting(1.0, "X", "processor cores that Ray sets aside for a replica")
    gpus: float = setting(0.0, "X", "GPUs of a replica")
    tpus: int = setting(0, "N", "TPU chips of a replica")
    doors: int = setting(1, "N", "processes that pass requests on")
    retries: int = setting(2, "N", "how often a request is asked for again when its replica ended")


def parts_of(args: Mapping[str, Any]) -> tuple[EngineConfig, ServerSettings, Scale]:
    """Settings by name, sorted by whose they are; text is read as the type that is wanted.

    ConfigError names what does not exist or does not fit.
    """
    args = {str(key).replace("-", "_"): value for key, value in args.items()}
    engine, server, scale = field_types(), _defaults(ServerSettings), _defaults(Scale)
    for name in args:
        if name in FOREIGN:
            raise ConfigError(
                f"`{name}` belongs to whoever holds the port: here Ray Serve does",
                "see http_options of its config file",
            )
        if name not in engine and name not in server and name not in scale:
            near = difflib.get_close_matches(name, [*engine, *server, *scale], n=1)
            hint = f"did you mean `{near[0]}`?" if near else "docs/deploy.md lists the names"
            raise ConfigError(f"there is no setting `{name}`", hint)
    of_engine = {n: _read(v, str in engine[n]) for n, v in args.items() if n in engine}
    config = EngineConfig.from_mapping(of_engine)
    settings = ServerSettings(**_typed(args, server))
    wanted = Scale(**_typed(args, scale))
    _check(wanted)
    if wanted.max_replicas > 1:
        for name in ALONE & args.keys():
            if args[name]:
                raise ConfigError(
                    f"`{name}` must be 0 with more than one replica: none knows what another kept",
                    "leave it out, or max_replicas=1",
                )
        settings = ServerSettings(**{**_typed(args, server), "max_stored_responses": 0})
    return config, settings, wanted


def scale_table() -> str:
    """The settings of replicas as a Markdown table."""
    rows = ["| Setting | Default | What it is |", "|---|---|---|"]
    rows += [f"| `{f.name}` | `{f.default:g}` | {f.metadata['help']} |" for f in fields(Scale)]
    return "\n".join(rows) + "\n"


def _defaults(kind: type[Any]) -> dict[str, Any]:
    return {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default
        for f in fields(kind)
    }


def _read(value: Any, is_text: bool) -> Any:
    """What a command line gives as text, as a number or a truth."""
    if not isinstance(value, str) or is_text:
        return value
    return yaml.safe_load(value)


def _typed(args: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `args` that `defaults` has, each of its type."""
    found: dict[str, Any] = {}
    for name, default in defaults.items():
        if name not in args:
            continue
        value = _read(args[name], isinstance(default, str | list))
        if isinstance(default, list) and isinstance(value, str):
            value = [value]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            kind = type(default).__name__
            raise ConfigError(f"`{name}` must be {kind}, got {value!r}", f"the default: {default}")
        found[name] = value
    return found


def _check(scale: Scale) -> None:
    for name, low, high in (
        ("min_replicas", 1, 10_000),
        ("max_replicas", 1, 10_000),
        ("target_ongoing_requests", 0.1, 1e6),
        ("max_ongoing_requests", 1, 10**6),
        ("upscale_delay", 0, 86_400),
        ("downscale_delay", 0, 86_400),
        ("look_back", 10.5, 86_400),
        ("cpus", 0, 10_000),
        ("gpus", 0, 1000),
        ("tpus", 0, 1000),
        ("doors", 1, 1000),
        ("retries", 0, 100),
    ):
        if not low <= getattr(scale, name) <= high:
            raise ConfigError(
                f"`{name}` must be from {low:g} to {high:g}, got {getattr(scale, name):g}"
            )
    if scale.max_replicas < scale.min_replicas:
        raise ConfigError(
            f"`max_replicas` is {scale.max_replicas}, below `min_replicas` {scale.min_replicas}",
            f"max_replicas={scale.min_replicas} starts no others",
        )
    if scale.max_ongoing_requests < scale.target_ongoing_requests:
        raise ConfigError(
            f"`max_ongoing_requests` is {scale.max_ongoing_requests}, below "
            f"`target_ongoing_requests` {scale.target_ongoing_requests:g}: no replica would start",
            "leave one of them out",
        )
