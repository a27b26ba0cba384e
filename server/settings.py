"""ServerSettings: what a user decides about the endpoint; the engine has its own EngineConfig."""

from dataclasses import dataclass, field
from typing import Any


def setting(default: Any, metavar: str, help: str) -> Any:
    """A field that the command line can explain; a list is a flag that may be repeated."""
    metadata = {"help": help, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens, what it calls its model, who may ask."""

    host: str = setting("127.0.0.1", "HOST", "address to listen on; 0.0.0.0 is all")
    port: int = setting(8000, "PORT", "port to listen on; 0 takes a free one")
    api_key: list[str] = setting(
        [], "KEY", "requests to /v1 need `Authorization: Bearer KEY`; may be repeated"
    )
    served_model_name: list[str] = setting(
        [], "NAME", "what requests call the model, instead of MODEL; may be repeated"
    )
    chat_template: str = setting("", "FILE", "Jinja file instead of the model's own chat template")
    shutdown_timeout: float = setting(
        30.0, "SECONDS", "how long open requests may go on after SIGTERM"
    )
    hung_after: float = setting(
        30.0, "SECONDS", "how long the engine may be silent before /health answers 503"
    )
    api_server_count: int = setting(1, "N", "processes that speak HTTP and tokenize")
    max_body_bytes: int = setting(64 * 1024 * 1024, "N", "largest request body")
    max_stored_responses: int = setting(
        10_000, "N", "responses kept for GET and `previous_response_id`; 0 keeps none"
    )
    max_stored_response_bytes: int = setting(
        256 * 1024 * 1024, "N", "bytes of kept responses; the one used longest ago goes first"
    )
    stored_response_ttl: float = setting(86_400.0, "SECONDS", "how long a response is kept at most")
    cors_origin: list[str] = setting(
        [], "ORIGIN", "web page that may call from a browser; may be repeated"
    )

    def names(self, model: str) -> list[str]:
        """The names that requests may use for the model; the first is the one in answers."""
        return self.served_model_name or [model]
