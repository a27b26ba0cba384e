"""Who watches the engine, and when the next View is due. No jax, no clock of its own."""

import math

from octavo.engine.messages import Watch

OFTEN = 0.1  # seconds: the least between two views, whatever is asked
SELDOM = 5.0


class Watchers:
    """The clients that asked for Views. With none of them, `due` is never."""

    def __init__(self) -> None:
        self.due = math.inf  # when the next view is wanted
        self._until: dict[int, float] = {}
        self._every: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def renew(self, client: int, watch: Watch, now: float) -> None:
        """Take in what a client asked for; 0 seconds ends it."""
        if watch.seconds <= 0:
            self._until.pop(client, None)
        else:
            self._until[client] = now + watch.seconds
            self._every[client] = min(max(watch.every, OFTEN), SELDOM)
        self.due = min(self.due, now) if self._until else math.inf

    def take(self, now: float) -> list[int]:
        """Whom to send a view now; the next one is due after the shortest time anybody asked."""
        for client in [c for c, until in self._until.items() if until < now]:
            del self._until[client]
        watching = list(self._until)
        every = (self._every[client] for client in watching)
        self.due = now + min(every) if watching else math.inf
        return watching
