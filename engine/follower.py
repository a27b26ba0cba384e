"""The engine process of a host that is not the leader: it has no clients and decides nothing."""

import signal
import traceback
from pathlib import Path

from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.link import HostLost, last_words_file, ready_file
from octavo.engine.progress import startup_progress
from octavo.engine.team import follow


def run_follower(config: EngineConfig, address: str) -> int:
    """Run what the leader says until it ends; returns the exit code.

    `address` is a folder as ipc://folder: for the word that it is ready, and its last words.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the leader says when
    ready, words = Path(ready_file(address)), Path(last_words_file(address))
    try:
        with startup_progress() as progress:
            follow(config, address, progress, lambda lines: ready.write_text("\n".join(lines)))
    except ConfigError as error:
        words.write_text(str(error))
        return 2
    except HostLost as error:
        words.write_text(str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        words.write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0
