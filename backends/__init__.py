"""One record per kind of hardware: which kernel, which layout, which buckets, what it cannot do."""

from octavo.backends.record import Backend, BackendError
from octavo.backends.select import select

__all__ = ["Backend", "BackendError", "select"]
