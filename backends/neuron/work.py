"""What is asked of every rank's thread: done in order, failures kept for whoever reads a result."""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Event, Lock


class Work:
    """Something asked of every rank, done or failed."""

    def __init__(self, ranks: int) -> None:
        self.error: BaseException | None = None
        self._left = ranks
        self._lock = Lock()
        self._done = Event()

    @property
    def done(self) -> bool:
        """Whether every rank is through with it."""
        return self._done.is_set()

    def finish(self, error: BaseException | None) -> None:
        """One rank is through with it."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            if not self._left:
                self._done.set()

    def wait(self) -> None:
        """Until it is done. Raises what failed."""
        self._done.wait()
        if self.error is not None:
            raise self.error


def work_off(queue: "SimpleQueue[Callable[[], None] | None]") -> None:
    """A rank's thread: one task after another, until there is a None."""
    while (task := queue.get()) is not None:
        task()
        del task  # it holds tensors


def guarded(do: Callable[[], None], work: Work) -> Callable[[], None]:
    """A task that reports to `work` instead of raising."""

    def task() -> None:
        error: BaseException | None = None
        try:
            do()
        except BaseException as raised:  # raised again where a result is read
            error = raised
        work.finish(error)

    return task
