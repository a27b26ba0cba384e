"""How the server's process logs: sentences for people, or one JSON object a line."""

import json
import logging
import sys
import time

TEXT = "octavo: %(message)s"


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message", ...}; the facts of a request beside them."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up(as_json: bool) -> None:
    """Log to stderr from now on; warnings, and whatever a logger of ours is told to say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
