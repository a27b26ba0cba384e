"""Graphs on Neuron cores through libnrt: tensors that stay there, and programs that run there.

Every rank has a thread, which does its work in the order in which it was asked for: calls return
at once, as jax's do, and a failure is raised where a result is read. `Tensor` has what the engine
asks of an array: shape, dtype, is_ready, copy_to_host_async, delete, and its values through numpy.

A tensor that a graph updates in place (an alias of the exporter's) is the same memory before and
after; the old name of it is gone with the call, as a donated array of jax is.
"""

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import ml_dtypes
import numpy as np

from octavo.backends.neuron import neff
from octavo.backends.neuron.errors import NeffInvalid, NoNeuronDevice
from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.nrt import DTYPES, INPUT, OUTPUT, Nrt, logical_cores
from octavo.backends.neuron.work import Work, guarded, work_off

KEPT_SETS = 64  # of tensors, per program and rank
NUMPY: dict[str, Any] = {
    "pred": np.dtype("bool"),
    "u8": np.dtype("uint8"),
    "s8": np.dtype("int8"),
    "s32": np.dtype("int32"),
    "u32": np.dtype("uint32"),
    "f32": np.dtype("float32"),
    "f16": np.dtype("float16"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3),
    "f8e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


class Tensor:
    """One array in the cores' memory, a part or a copy of it on each."""

    def __init__(
        self,
        cores: "Cores",
        buffers: "Buffers | None",
        shape: tuple[int, ...],
        dtype: Any,
        work: Work | None = None,
    ) -> None:
        self.shape = shape  # of one rank, or of the whole where it was cut on its way
        self.dtype = dtype
        self.work = work  # that makes it; None: it is there
        self._cores = cores
        self._buffers = buffers
        self._copy: tuple[Work, np.ndarray] | None = None
        self._cut = False

    @property
    def buffers(self) -> "Buffers":
        """Where it lies. Raises RuntimeError where it was given away."""
        if self._buffers is None:
            raise RuntimeError("this tensor was updated in place or deleted")
        return self._buffers

    @property
    def nbytes(self) -> int:
        """Bytes on one rank."""
        whole = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
        return whole // self._cores.ranks if self._cut else whole

    def delete(self) -> None:
        """Let its memory go; work that was asked for before still finds it."""
        self._buffers = None

    def is_deleted(self) -> bool:
        """Whether it was given away."""
        return self._buffers is None

    def copy_to_host_async(self) -> None:
        """Begin to read it, behind the work that makes it."""
        if self._cut:
            raise RuntimeError("this tensor lies in parts on several cores, and no core has all")
        if self._copy is None:
            out = np.empty(self.shape, self.dtype)
            work = Work(1)
            self._copy = (work, out)
            self._cores.ask([_reading(self, out, work)])

    def is_ready(self) -> bool:
        """Whether reading it would not wait."""
        if self._copy is not None:
            return self._copy[0].done
        return self.work is None or self.work.done

    def block_until_ready(self) -> "Tensor":
        """Wait until it is made. Raises what failed."""
        if self.work is not None:
            self.work.wait()
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What the first rank has."""
        self.copy_to_host_async()
        self.block_until_ready()  # on every rank: one that failed leaves the others waiting
        assert self._copy is not None
        self._copy[0].wait()
        out = self._copy[1]
        return out if dtype is None or out.dtype == dtype else out.astype(dtype)


class Buffers:
    """The same number of bytes on every rank; they go back when nobody holds this any more."""

    def __init__(self, handles: tuple[int, ...], nbytes: int) -> None:
        self.handles = handles
        self.nbytes = nbytes


class Cores:
    """The cores of one mesh, core i is rank i."""

    def __init__(self, library: str, ranks: int = 1) -> None:
        """Takes the cores. Raises NoNeuronDevice or NrtError."""
        try:
            self.nrt = Nrt(library)
        except (OSError, AttributeError) as error:
            raise NoNeuronDevice(f"{library} cannot be used: {error}") from None
        self.nrt.init()
        self.ranks = ranks
        if (there := self.nrt.cores()) < ranks:
            self.nrt.close()
            raise NoNeuronDevice(f"the mesh needs {ranks} cores, and {there} are visible")
        self.programs: list[Program] = []
        self._free: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        self._lock = Lock()
        self._all: set[tuple[int, ...]] = set()
        self._queues: list[SimpleQueue[Callable[[], None] | None]] = [
            SimpleQueue() for _ in range(ranks)
        ]
        self._threads = [
            Thread(target=work_off, args=(queue,), name=f"neuron core {rank}", daemon=True)
            for rank, queue in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def memory(self) -> tuple[int, int]:
        """Bytes used of the fullest core, and the least limit."""
        every = [self.nrt.memory(core) for core in range(self.ranks)]
        return max(used for used, _ in every), min(limit for _, limit in every)

    def ask(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Queue one task for each of the first ranks; they catch their own failures."""
        for queue, task in zip(self._queues, tasks, strict=False):
            queue.put(task)

    def take(self, nbytes: int) -> Buffers:
        """Memory on every core, which somebody else may have used. Raises NrtError."""
        nbytes = max(nbytes, 1)
        with self._lock:
            handles = self._free[nbytes].pop() if self._free[nbytes] else None
        if handles is None:
            made: list[int] = []
            try:
                for core in range(self.ranks):
                    made.append(self.nrt.allocate(nbytes, core))
            except BaseException:
                for handle in made:
                    self.nrt.free(handle)
                raise
            handles = tuple(made)
            with self._lock:
                self._all.add(handles)
        buffers = Buffers(handles, nbytes)
        weakref.finalize(buffers, self._give, nbytes, handles).atexit = False
        return buffers

    def _give(self, nbytes: int, handles: tuple[int, ...]) -> None:
        with self._lock:
            if handles in self._all:
                self._free[nbytes].append(handles)

    def put(self, array: np.ndarray, axis: int | None = None) -> Tensor:
        """An array to the cores: its parts along `axis`, or a copy to each. It has been read when
        this returns."""
        array = np.asarray(array)
        parts = [array] * self.ranks if axis is None else np.split(array, self.ranks, axis)
        parts = [np.require(part, requirements="C") for part in parts]
        tensor = Tensor(self, self.take(parts[0].nbytes), array.shape, array.dtype)
        tensor._cut = axis is not None and self.ranks > 1
        for part, handle in zip(parts, tensor.buffers.handles, strict=True):
            if part.nbytes:
                self.nrt.write(handle, part.ctypes.data, part.nbytes)
        return tensor

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """Zeros on every core, made there. shape: of one rank."""
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        tensor = Tensor(self, self.take(nbytes), shape, dtype)
        for handle in tensor.buffers.handles:
            self.nrt.zero(handle, max(nbytes, 1))
        return tensor

    def load(self, exported: Exported, data: bytes) -> "Program":
        """A compiled graph on every core. Raises NrtError, NeffInvalid or LncMismatch."""
        program = Program(self, exported, data)
        self.programs.append(program)
        return program

    def close(self) -> None:
        """Finish what was asked for, free everything, give the cores back."""
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        for program in self.programs:
            program.unload()
        self.programs.clear()
        with self._lock:
            every, self._all = self._all, set()
            self._free.clear()
        for handles in every:
            for handle in handles:
                self.nrt.free(handle)
        self.nrt.close()


class Program:
    """A graph that was loaded: tensors in, tensors out."""

    def __init__(self, cores: Cores, exported: Exported, data: bytes) -> None:
        if cores.ranks != exported.ranks:
            raise ValueError(f"{exported.name} is for {exported.ranks} ranks, not {cores.ranks}")
        self.exported = exported
        self._cores = cores
        if lnc := logical_cores():
            neff.check_lnc(neff.parse(data, exported.name), exported.name, lnc)
        self._models = [0] * cores.ranks
        # By the handles in them: making a set costs a call a tensor, and they come again.
        self._sets: list[OrderedDict[tuple[int, ...], tuple[int, int]]] = [
            OrderedDict() for _ in range(cores.ranks)
        ]
        self._aliases = dict(exported.aliases)
        work = Work(cores.ranks)

        def loading(rank: int) -> Callable[[], None]:
            def load() -> None:
                self._models[rank] = cores.nrt.load(data, rank, rank, cores.ranks)

            return guarded(load, work)

        cores.ask([loading(rank) for rank in range(cores.ranks)])  # they wait for one another
        try:
            work.wait()
            _check_ports(exported, cores.nrt, self._models[0])
        except BaseException:
            self.unload()
            raise

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run it. Inputs that are updated in place are gone afterwards."""
        cores, exported = self._cores, self.exported
        work = Work(cores.ranks)
        into = [tensor.buffers for tensor in inputs]
        for tensor, info in zip(inputs, exported.inputs, strict=True):
            if tensor.nbytes != info.nbytes:
                raise ValueError(
                    f"{exported.name} wants {info.dtype}{list(info.shape)} as {info.leaf}, "
                    f"got {tensor.dtype}{list(tensor.shape)}"
                )
        out = [
            into[self._aliases[i]] if i in self._aliases else cores.take(info.nbytes)
            for i, info in enumerate(exported.outputs)
        ]
        before = [tensor.work for tensor in inputs if tensor.work is not None]
        made = [
            Tensor(cores, buffers, info.shape, NUMPY[info.dtype], work)
            for buffers, info in zip(out, exported.outputs, strict=True)
        ]
        for source in self._aliases.values():
            inputs[source].delete()
        cores.ask([self._running(rank, into, out, before, work) for rank in range(cores.ranks)])
        return made

    def _running(
        self, rank: int, into: list[Buffers], out: list[Buffers], before: list[Work], work: Work
    ) -> Callable[[], None]:
        def run() -> None:
            for earlier in before:
                if earlier.error is not None:
                    raise earlier.error
            sets = self._bind(rank, into, out)
            self._cores.nrt.execute(self._models[rank], *sets)

        return guarded(run, work)

    def _bind(self, rank: int, into: list[Buffers], out: list[Buffers]) -> tuple[int, int]:
        """The sets of a call's inputs and outputs."""
        key = tuple(buffers.handles[rank] for buffers in (*into, *out))
        kept, nrt = self._sets[rank], self._cores.nrt
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
        names = [info.name for info in self.exported.inputs]
        inputs = nrt.tensor_set(dict(zip(names, key, strict=False)))
        names = [info.name for info in self.exported.outputs]
        outputs = nrt.tensor_set(dict(zip(names, key[len(into) :], strict=True)))
        kept[key] = inputs, outputs
        if len(kept) > KEPT_SETS:
            for old in kept.popitem(last=False)[1]:
                nrt.free_set(old)
        return kept[key]

    def unload(self) -> None:
        """Take it off the cores; nothing may run."""
        for kept, model in zip(self._sets, self._models, strict=True):
            for sets in kept.values():
                for one in sets:
                    self._cores.nrt.free_set(one)
            kept.clear()
            if model:
                self._cores.nrt.unload(model)


def _reading(tensor: Tensor, out: np.ndarray, work: Work) -> Callable[[], None]:
    buffers = tensor.buffers

    def read() -> None:
        if tensor.work is not None and tensor.work.error is not None:
            raise tensor.work.error
        if out.nbytes:
            tensor._cores.nrt.read(buffers.handles[0], out.ctypes.data, out.nbytes)

    return guarded(read, work)


def _check_ports(exported: Exported, nrt: Nrt, model: int) -> None:
    """Raises NeffInvalid where the runtime sees other inputs or outputs than were exported."""
    ports = nrt.ports(model)
    for usage, wanted, what in (
        (INPUT, exported.inputs, "inputs"),
        (OUTPUT, exported.outputs, "outputs"),
    ):
        found = {port.name: port for port in ports if port.usage == usage}
        if missing := {info.name for info in wanted} ^ set(found):
            raise NeffInvalid(
                exported.name, f"its {what} differ in {', '.join(sorted(missing)[:5])}"
            )
        for info in wanted:
            port = found[info.name]
            if (port.nbytes, port.dtype) != (info.nbytes, DTYPES[info.dtype]):
                raise NeffInvalid(
                    exported.name, f"{info.name} is no {info.dtype}{list(info.shape)} there"
                )
