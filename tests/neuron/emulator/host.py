"""The Python half of the emulator of libnrt: it runs a fake NEFF's HLO on XLA's CPU client.

Used in tests only. Several ranks of a graph wait for one another, as cores do, and run as one
program of as many replicas; the process needs as many CPU devices.
"""

import ctypes
import io
import shutil
import subprocess
import sys
import tarfile
import traceback
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from functools import cache, cached_property
from pathlib import Path
from threading import Condition, Lock
from typing import Any

import jax
import numpy as np

from octavo.backends.neuron.exported import BYTES
from octavo.backends.neuron.wire import Message
from tests.neuron.on_cpu import XlaComputation, compiled

SOURCE = Path(__file__).parent / "libnrt.c"
HEADER = 1024
ALIASES = 8  # of HloModuleProto
MEETING = 8.0  # seconds that a rank waits for the others
NUMPY = {"pred": "uint8", "u8": "uint8", "s32": "int32", "u32": "uint32", "f32": "float32"}
NUMPY |= {"bf16": "bfloat16", "f16": "float16"}
# nrt.h's numbers, written down a second time so that a slip in the package is seen.
CODES = {"pred": 3, "u8": 3, "s32": 8, "u32": 9, "f32": 10, "bf16": 6, "f16": 7}

Load = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_uint32, c_uint32)
Run = CFUNCTYPE(c_int, c_void_p, c_size_t, POINTER(c_void_p), c_size_t, POINTER(c_void_p))


def build(folder: Path) -> Path | None:
    """Compile the emulator; None where there is no gcc."""
    compiler = shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "libnrt-emulator.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(library)]
    subprocess.run([compiler, *flags, str(SOURCE), "-ldl", "-lpthread"], check=True, timeout=60)
    return library


def attach(library: str) -> "Emulator":
    """Hand the library's loads and executes to this process. Called by the library too."""
    return _attached(str(Path(library).resolve()))


@cache
def _attached(library: str) -> "Emulator":
    return Emulator(library)


class Emulator:
    """What runs behind one emulator library."""

    def __init__(self, library: str) -> None:
        self.library = ctypes.CDLL(library)
        self.library.emulator_describe.argtypes = (
            c_void_p,
            c_char_p,
            c_int,
            c_size_t,
            c_int,
            POINTER(c_uint32),
            c_uint32,
        )
        self.library.emulator_become.argtypes = (c_uint32, c_uint32, c_size_t)
        self.programs: dict[int, tuple[Program, int]] = {}  # by model: what, and which rank
        self.shared: dict[tuple[bytes, int], list[Program]] = {}  # some rank has not loaded them
        self.executed = 0
        self._loading = Lock()
        self._load, self._run = Load(self._on_load), Run(self._on_run)
        self.library.emulator_attach(self._load, self._run)

    def become(self, *, cores: int = 2, family: int = 4, memory: int = 16 << 30) -> None:
        """Another instance. family: of nrt_get_instance_info."""
        self.library.emulator_become(cores, family, memory)

    def fail_next(self, code: int) -> None:
        """The next execute fails."""
        self.library.emulator_fail(code)

    def counts(self) -> tuple[int, int, int]:
        """Tensors, tensor sets and models that are alive."""
        out = (c_size_t * 3)()
        self.library.emulator_counts(out)
        return out[0], out[1], out[2]

    def _on_load(self, model: int, data: int, size: int, rank: int, ranks: int) -> int:
        try:
            hlo = _hlo_of(ctypes.string_at(data, size))
            program = self._program(hlo, rank, ranks)
            self.programs[model] = (program, rank)
            for usage, ports in enumerate((program.inputs, program.outputs)):
                for i, (dtype, shape) in enumerate(ports):
                    name = f"{('input', 'output')[usage]}{i}".encode()
                    nbytes = int(np.prod(shape, dtype=np.int64)) * BYTES[dtype]
                    dims = (c_uint32 * max(1, len(shape)))(*shape)
                    port = (model, name, usage, nbytes, CODES[dtype], dims, len(shape))
                    if status := self.library.emulator_describe(*port):
                        return status
            return 0
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return 2

    def _program(self, hlo: bytes, rank: int, ranks: int) -> "Program":
        """Every rank loads its own copy, and the n-th load of each is one program."""
        if ranks == 1:
            return Program(hlo, 1)
        with self._loading:
            waiting = self.shared.setdefault((hlo, ranks), [])
            for program in waiting:
                if rank not in program.loaded:
                    program.loaded.add(rank)
                    return program
            waiting.append(Program(hlo, ranks))
            waiting[-1].loaded.add(rank)
            return waiting[-1]

    def _on_run(self, model: int, inputs: int, into: Any, outputs: int, out: Any) -> int:
        try:
            program, rank = self.programs[model]
            arrays = [_view(into[i], *program.inputs[i]) for i in range(inputs)]
            for i in program.in_place:
                arrays[i] = arrays[i].copy()
            results = program.run(rank, arrays)
            for i in range(outputs):
                result = np.ascontiguousarray(results[i])
                ctypes.memmove(out[i], result.ctypes.data, result.nbytes)
            self.executed += 1
            return 0
        except TimeoutError:
            return 5
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return 1004


class Program:
    """A module on as many CPU devices as it has ranks."""

    def __init__(self, hlo: bytes, ranks: int) -> None:
        computation = XlaComputation(hlo)
        shape = computation.program_shape()
        self.inputs = [_port(part) for part in shape.parameter_shapes()]
        self.outputs = [_port(part) for part in shape.result_shape().tuple_shapes()]
        # What XLA may write over; other inputs, all weights among them, are read where they lie.
        aliases = Message.parse(hlo).message(ALIASES).all(1)
        self.in_place = [Message.parse(alias).number(2) for alias in aliases]
        self.ranks = ranks
        self.loaded: set[int] = set()
        self._computation = computation
        self._devices = jax.devices("cpu")[:ranks]
        self._meeting = Condition()
        self._arrived: dict[int, list[Any]] = {}
        self._results: dict[int, list[np.ndarray]] = {}

    @cached_property
    def _program(self) -> Any:
        """Compiled when it first runs: an engine loads more programs than a test uses."""
        return compiled(self._computation, self._devices)

    def run(self, rank: int, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """The results of one rank; waits until all ranks are here."""
        placed = [jax.device_put(array, self._devices[rank]) for array in arrays]
        if self.ranks == 1:
            return [np.asarray(array) for array in self._program.execute(placed)]
        with self._meeting:
            self._meeting.wait_for(lambda: rank not in self._arrived, MEETING)
            self._arrived[rank] = placed
            if len(self._arrived) == self.ranks:
                every = zip(*(self._arrived[r] for r in range(self.ranks)), strict=True)
                ran = self._program.execute_sharded([self._together(port) for port in every])
                parts = ran.disassemble_into_single_device_arrays()
                for r in range(self.ranks):
                    self._results[r] = [np.asarray(part[r]) for part in parts]
                self._meeting.notify_all()
            if not self._meeting.wait_for(lambda: rank in self._results, MEETING):
                del self._arrived[rank]
                raise TimeoutError("a rank did not come to a collective graph")
            results = self._results.pop(rank)
            if not self._results:
                self._arrived.clear()
                self._meeting.notify_all()
            return results

    def _together(self, parts: tuple[jax.Array, ...]) -> jax.Array:
        """What each rank has, as one array; it need not be the same on all of them."""
        mesh = jax.sharding.Mesh(np.array(self._devices), ("rank",))
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        shape = parts[0].shape
        return jax.make_array_from_single_device_arrays(shape, spread, list(parts))


def _hlo_of(neff: bytes) -> bytes:
    """What the fake neuronx-cc put into its container."""
    with tarfile.open(fileobj=io.BytesIO(neff[HEADER:])) as tar:
        packed = tar.extractfile("fake/model.hlo.pb")
        assert packed is not None
        return packed.read()


def _port(shape: Any) -> tuple[str, tuple[int, ...]]:
    name = str(shape.numpy_dtype())
    for dtype, known in NUMPY.items():
        if known == name or (name == "bool" and dtype == "pred"):
            return dtype, tuple(shape.dimensions())
    raise ValueError(f"the emulator knows no {name}")


def _view(address: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor where it lies."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = (ctypes.c_char * (count * BYTES[dtype])).from_address(address)
    kind = np.bool_ if dtype == "pred" else jax.numpy.dtype(NUMPY[dtype])
    return np.frombuffer(memoryview(raw), kind).reshape(shape)
