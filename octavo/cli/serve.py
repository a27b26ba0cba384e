"""`octavo serve`: an OpenAI endpoint for one model."""

import argparse
import os
from dataclasses import MISSING, fields
from typing import Any

from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError
from octavo.engine.hosts import settle
from octavo.engine.process import CORE, MAX_CLIENTS
from octavo.server.follower import follow
from octavo.server.http import bind
from octavo.server.logs import set_up as set_up_logs
from octavo.server.settings import ServerSettings
from octavo.server.worker import serve

DESCRIPTION = """\
Serve a model over HTTP, as OpenAI's API has it: /v1/chat/completions, /v1/completions, /v1/models.
GET /health, /ready and /metrics are for probes and dashboards. SIGTERM or Ctrl-C lets open requests
finish, then ends; a second one ends at once.

examples:
  octavo serve smollm2-135m
  octavo serve llama-70b --mesh model=16 --hosts 2 --host-index 0 --leader 10.0.0.1:7461
  octavo serve ./my-model --host 0.0.0.0 --port 8000 --api-key secret --served-model-name mine
"""


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("serve", help="serve a model over HTTP", description=DESCRIPTION)
    add_config_flags(parser)
    group = parser.add_argument_group("endpoint")
    for f in fields(ServerSettings):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        flag, shown = "--" + f.name.replace("_", "-"), f" (default: {default})" if default else ""
        options: dict[str, Any] = {"help": f.metadata["help"] + shown, "default": default}
        if isinstance(default, bool):
            options |= {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, list):
            options |= {"action": "append", "default": None, "metavar": "X"}
        else:
            options |= {"type": type(default), "metavar": f.metadata["metavar"]}
        group.add_argument(flag, **options)


def settings_from_args(args: argparse.Namespace) -> ServerSettings:
    """ServerSettings of a parsed command line. Raises ConfigError."""
    values = {f.name: getattr(args, f.name) for f in fields(ServerSettings)}
    settings = ServerSettings(**{k: v for k, v in values.items() if v is not None})
    for name, low, high in (
        ("port", 0, 65535),
        ("api_server_count", 1, MAX_CLIENTS),
        ("shutdown_timeout", 0, 86400),
        ("hung_after", 1, 86400),
        ("max_body_bytes", 1024, 2**40),
        ("max_stored_responses", 0, 10**9),
        ("max_stored_response_bytes", 0, 2**50),
        ("stored_response_ttl", 1, 10**9),
        ("max_header_bytes", 1024, 2**30),
        ("max_header_count", 16, 65536),
        ("header_timeout", 0.1, 86400),
        ("body_timeout", 0.1, 86400),
        ("write_timeout", 0.1, 86400),
        ("keep_alive_timeout", 1, 86400),
        ("request_timeout", 0, 864000),
        ("sse_keep_alive_interval", 0, 86400),
        ("chat_template_timeout", 0.1, 60),
    ):
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ConfigError(f"`{name}` must be from {low} to {high}, got {value}")
    return settings


def run(args: argparse.Namespace, core: str = CORE) -> int:
    """Serve until a signal; 0 after a clean end, 1 if the engine died, 2 if it could not start."""
    settings = settings_from_args(args)
    config = settle(config_from_args(args), os.environ)
    set_up_logs(settings.log_json)
    listener = bind(settings)
    try:
        if config.host_index > 0:
            return follow(settings, config, listener)
        return serve(settings, config, listener, core)
    finally:
        listener.close()
