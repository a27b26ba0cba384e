"""ServerSettings: what a user decides about the endpoint; the engine has its own EngineConfig."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any


def setting(default: Any, metavar: str, help: str) -> Any:
    """A field that the command line can explain; a list is a flag that may be repeated."""
    metadata = {"help": help, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens, what it calls its model, who may ask, and for how much."""

    host: str = setting("127.0.0.1", "HOST", "address to listen on; 0.0.0.0 is all")
    port: int = setting(8000, "PORT", "port to listen on; 0 takes a free one")
    served_model_name: list[str] = setting(
        [], "NAME", "what requests call the model, instead of MODEL; may be repeated"
    )
    api_server_count: int = setting(1, "N", "processes that speak HTTP and tokenize")

    # Who may ask.
    api_key: list[str] = setting(
        [],
        "KEY",
        "requests need `Authorization: Bearer KEY` or `x-api-key: KEY`; may be repeated; "
        "OCTAVO_API_KEY and --api-key-file keep keys out of the list of processes",
    )
    api_key_file: str = setting("", "FILE", "file with API keys, one a line")
    guard_metrics: bool = setting(False, "", "ask for an API key at /metrics and /load too")
    cors_origin: list[str] = setting(
        [], "ORIGIN", "web page that may call from a browser; may be repeated"
    )
    ssl_keyfile: str = setting("", "FILE", "private key of the server, PEM: speaks HTTPS")
    ssl_certfile: str = setting("", "FILE", "certificate of the server and its chain, PEM")
    ssl_ca_certs: str = setting(
        "", "FILE", "clients must show a certificate signed by one of these authorities, PEM"
    )
    ssl_keyfile_password: str = setting("", "TEXT", "password of --ssl-keyfile")

    # For how much.
    max_body_bytes: int = setting(64 * 1024 * 1024, "N", "largest request body")
    max_header_bytes: int = setting(64 * 1024, "N", "largest request line with headers")
    max_header_count: int = setting(128, "N", "most headers of a request")
    header_timeout: float = setting(15.0, "SECONDS", "how long a request's headers may take")
    body_timeout: float = setting(
        30.0, "SECONDS", "a body of which less than 1 KiB comes in this time is given up"
    )
    write_timeout: float = setting(
        120.0, "SECONDS", "a client that takes nothing of its answer for this long is cut off"
    )
    keep_alive_timeout: int = setting(75, "SECONDS", "how long an idle connection stays open")
    request_timeout: float = setting(
        0.0, "SECONDS", "time limit of a request that names no `timeout`; 0 is none"
    )
    sse_keep_alive_interval: float = setting(
        15.0, "SECONDS", "comment in streams that are silent for this long; 0 sends none"
    )
    shutdown_timeout: float = setting(
        30.0, "SECONDS", "how long open requests may go on after SIGTERM"
    )
    hung_after: float = setting(
        30.0, "SECONDS", "how long the engine may be silent before /health answers 503"
    )

    # What is kept for GET /v1/responses/{id} and `previous_response_id`.
    max_stored_responses: int = setting(10_000, "N", "responses kept; 0 keeps none")
    max_stored_response_bytes: int = setting(
        256 * 1024 * 1024, "N", "bytes of kept responses; the one used longest ago goes first"
    )
    stored_response_ttl: float = setting(86_400.0, "SECONDS", "how long a response is kept at most")

    # Chat templates.
    chat_template: str = setting("", "FILE", "Jinja file instead of the model's own chat template")
    trust_request_chat_template: bool = setting(
        False, "", "let requests bring a `chat_template`; it runs apart, with limits"
    )
    chat_template_timeout: float = setting(
        2.0, "SECONDS", "how long the template of a request may run"
    )

    # Calls of tools, and thoughts.
    tool_call_parser: str = setting(
        "auto", "NAME", "how the model writes calls of tools; auto looks at its chat template"
    )
    reasoning_parser: str = setting(
        "auto", "NAME", "how the model writes thoughts; auto looks at its chat template"
    )
    enable_auto_tool_choice: bool = setting(
        False, "", "taken for other servers' command lines: the model may always choose tools here"
    )

    # What is told.
    enable_log_requests: bool = setting(
        False, "", "log one line for each request: tokens and times, never text"
    )
    log_json: bool = setting(False, "", "log JSON objects, one a line")
    otlp_traces_endpoint: str = setting(
        "", "URL", "send OpenTelemetry traces there, such as http://localhost:4318/v1/traces"
    )

    def names(self, model: str) -> list[str]:
        """The names that requests may use for the model; the first is the one in answers."""
        return self.served_model_name or [model]


def flags_table() -> str:
    """The flags as a Markdown table."""
    rows = ["| Flag | Default | What it is |", "|---|---|---|"]
    for f in fields(ServerSettings):
        default = "" if f.default is MISSING else f.default
        shown = {False: "off", True: "on"}[default] if isinstance(default, bool) else str(default)
        flag = "--" + f.name.replace("_", "-")
        rows.append(f"| `{flag}` | {f'`{shown}`' if shown else ''} | {f.metadata['help']} |")
    return "\n".join(rows) + "\n"
