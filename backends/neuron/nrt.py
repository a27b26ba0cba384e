"""AWS's runtime, libnrt, through ctypes: its public C interface, call by call; no jax.

The layouts are those of the headers that the runtime is published with, written down by hand;
`tests/neuron` compares them with a C compiler's view of the same declarations. Each
call that fails raises NrtError with the runtime's code and the next step.
"""

import ctypes
import os
from collections.abc import Iterator
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from dataclasses import dataclass

from octavo.backends.neuron.errors import NrtError

ON_DEVICE, ON_HOST, VIRTUAL = 0, 1, 2  # where a tensor lies
NO_FRAMEWORK = 1
INPUT, OUTPUT = 0, 1
ANY_COUNT = -1  # of a parameter that the runtime no longer reads

# The runtime's numbers of types, under XLA's names.
DTYPES = {
    "u64": 0x1,
    "s8": 0x2,
    "u8": 0x3,
    "pred": 0x3,
    "s16": 0x4,
    "u16": 0x5,
    "bf16": 0x6,
    "f16": 0x7,
    "s32": 0x8,
    "u32": 0x9,
    "f32": 0xA,
    "s64": 0xC,
    "f8e4m3": 0xE,
    "f8e5m2": 0xF,
}


class TensorInfo(ctypes.Structure):
    """nrt_tensor_info_t."""

    _fields_ = [
        ("name", c_char * 256),
        ("usage", c_int),
        ("size", c_size_t),
        ("dtype", c_int),
        ("shape", POINTER(c_uint32)),
        ("ndim", c_uint32),
    ]


class TensorInfoArray(ctypes.Structure):
    """nrt_tensor_info_array_t; the entries lie behind it."""

    _fields_ = [("count", c_uint64), ("first", TensorInfo * 0)]


class InstanceInfo(ctypes.Structure):
    """nrt_instance_info_t."""

    _fields_ = [
        ("family", c_uint32),
        ("size", c_uint32),
        ("arch_name", c_char * 16),
        ("revision", c_char * 8),
    ]


class MemoryStats(ctypes.Structure):
    """nrt_vnc_memory_stats_t."""

    _fields_ = [("used", c_size_t), ("limit", c_size_t)]


class Version(ctypes.Structure):
    """nrt_version_t."""

    _fields_ = [
        ("major", c_uint64),
        ("minor", c_uint64),
        ("patch", c_uint64),
        ("maintenance", c_uint64),
        ("detail", c_char * 128),
        ("git_hash", c_char * 64),
    ]


# Bytes on a 64-bit machine, as a C compiler lays the headers' structures out.
SIZES = {TensorInfo: 296, TensorInfoArray: 8, InstanceInfo: 32, MemoryStats: 16, Version: 224}
for _structure, _size in SIZES.items():
    assert ctypes.sizeof(_structure) == _size, f"{_structure.__name__} is not laid out as in C"

_OUT = POINTER(pointer)
# name: (what it returns, what it takes); None is no value, c_int a status that is checked.
_CALLS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "nrt_init": (c_int, (c_int, c_char_p, c_char_p)),
    "nrt_close": (None, ()),
    "nrt_load": (c_int, (c_char_p, c_size_t, c_int32, c_int32, _OUT)),
    "nrt_load_collectives": (
        c_int,
        (c_char_p, c_size_t, c_int32, c_int32, c_uint32, c_uint32, _OUT),
    ),
    "nrt_unload": (c_int, (pointer,)),
    "nrt_get_model_tensor_info": (c_int, (pointer, POINTER(POINTER(TensorInfoArray)))),
    "nrt_free_model_tensor_info": (c_int, (POINTER(TensorInfoArray),)),
    "nrt_tensor_allocate": (c_int, (c_int, c_int, c_size_t, c_char_p, _OUT)),
    "nrt_tensor_free": (None, (_OUT,)),
    "nrt_tensor_read": (c_int, (pointer, pointer, c_size_t, c_size_t)),
    "nrt_tensor_write": (c_int, (pointer, pointer, c_size_t, c_size_t)),
    "nrt_tensor_memset": (c_int, (pointer, c_uint64, c_int, c_size_t)),
    "nrt_tensor_get_size": (c_size_t, (pointer,)),
    "nrt_allocate_tensor_set": (c_int, (_OUT,)),
    "nrt_destroy_tensor_set": (None, (_OUT,)),
    "nrt_add_tensor_to_tensor_set": (c_int, (pointer, c_char_p, pointer)),
    "nrt_execute": (c_int, (pointer, pointer, pointer)),
    "nrt_get_visible_vnc_count": (c_int, (POINTER(c_uint32),)),
    "nrt_get_instance_info": (c_int, (POINTER(InstanceInfo), c_size_t)),
    "nrt_get_version": (c_int, (POINTER(Version), c_size_t)),
    "nrt_get_vnc_memory_stats": (
        c_int,
        (c_uint32, POINTER(MemoryStats), c_size_t, POINTER(c_size_t)),
    ),
}


@dataclass(frozen=True)
class Port:
    """An input or output of a loaded graph, as the runtime sees it."""

    name: str
    usage: int  # INPUT or OUTPUT
    nbytes: int
    dtype: int  # a value of DTYPES
    shape: tuple[int, ...]


class Nrt:
    """The runtime of this process. Handles are plain integers; whoever makes one frees it."""

    def __init__(self, library: str) -> None:
        """Raises OSError where the library cannot be loaded."""
        self._library = ctypes.CDLL(library)
        for name, (result, arguments) in _CALLS.items():
            call = getattr(self._library, name)
            call.restype, call.argtypes = result, arguments

    def init(self) -> None:
        """Take the visible cores."""
        self._do("nrt_init", NO_FRAMEWORK, b"", b"")

    def close(self) -> None:
        """Give the cores back."""
        self._library.nrt_close()

    def cores(self) -> int:
        """Logical cores that this process may use."""
        count = c_uint32()
        self._do("nrt_get_visible_vnc_count", byref(count))
        return count.value

    def instance(self) -> InstanceInfo:
        """The kind of instance."""
        info = InstanceInfo()
        self._do("nrt_get_instance_info", byref(info), ctypes.sizeof(info))
        return info

    def version(self) -> str:
        """The runtime's version."""
        version = Version()
        self._do("nrt_get_version", byref(version), ctypes.sizeof(version))
        return f"{version.major}.{version.minor}.{version.patch}.{version.maintenance}"

    def memory(self, core: int) -> tuple[int, int]:
        """Bytes used of one core, and its limit."""
        stats, written = MemoryStats(), c_size_t()
        self._do(
            "nrt_get_vnc_memory_stats", core, byref(stats), ctypes.sizeof(stats), byref(written)
        )
        return stats.used, stats.limit

    def load(self, neff: bytes, core: int, rank: int = 0, ranks: int = 1) -> int:
        """A graph on a core; with several ranks it waits for the others to load theirs."""
        model = pointer()
        if ranks == 1:
            self._do("nrt_load", neff, len(neff), core, ANY_COUNT, byref(model))
        else:
            group = (core, ANY_COUNT, rank, ranks)
            self._do("nrt_load_collectives", neff, len(neff), *group, byref(model))
        return _made(model)

    def unload(self, model: int) -> None:
        """Take a graph off its core."""
        self._do("nrt_unload", model)

    def ports(self, model: int) -> tuple[Port, ...]:
        """The inputs and outputs of a loaded graph."""
        array = POINTER(TensorInfoArray)()
        self._do("nrt_get_model_tensor_info", model, byref(array))
        try:
            return tuple(_ports(array))
        finally:
            self._do("nrt_free_model_tensor_info", array)

    def allocate(self, nbytes: int, core: int, name: str = "") -> int:
        """A tensor in a core's memory; what it holds is not defined."""
        tensor = pointer()
        at = (ON_DEVICE, core, nbytes, name.encode() or None)
        self._do("nrt_tensor_allocate", *at, byref(tensor))
        return _made(tensor)

    def free(self, tensor: int) -> None:
        """Give a tensor's memory back."""
        self._library.nrt_tensor_free(byref(pointer(tensor)))

    def write(self, tensor: int, address: int, nbytes: int, offset: int = 0) -> None:
        """Copy host memory to a tensor; it has been read when this returns."""
        self._do("nrt_tensor_write", tensor, address, offset, nbytes)

    def read(self, tensor: int, address: int, nbytes: int, offset: int = 0) -> None:
        """Copy a tensor to host memory."""
        self._do("nrt_tensor_read", tensor, address, offset, nbytes)

    def zero(self, tensor: int, nbytes: int) -> None:
        """Fill a tensor with zeros."""
        self._do("nrt_tensor_memset", tensor, 0, 0, nbytes)

    def tensor_set(self, tensors: dict[str, int]) -> int:
        """A set of tensors by name."""
        made = pointer()
        self._do("nrt_allocate_tensor_set", byref(made))
        for name, tensor in tensors.items():
            self._do("nrt_add_tensor_to_tensor_set", made, name.encode(), tensor)
        return _made(made)

    def free_set(self, tensors: int) -> None:
        """Forget a set; its tensors stay."""
        self._library.nrt_destroy_tensor_set(byref(pointer(tensors)))

    def execute(self, model: int, inputs: int, outputs: int) -> None:
        """Run a graph and wait for it."""
        self._do("nrt_execute", model, inputs, outputs)

    def _do(self, call: str, *arguments: object) -> None:
        status = getattr(self._library, call)(*arguments)
        if status:
            raise NrtError(call, status)


def logical_cores() -> int:
    """Physical cores in a logical one, as this process asks the runtime for; 0 is its default."""
    return int(os.environ.get("NEURON_LOGICAL_NC_CONFIG", "0") or 0)


def _made(handle: pointer) -> int:
    assert handle.value is not None, "the runtime said it succeeded and gave no handle"
    return handle.value


def _ports(array: "ctypes._Pointer[TensorInfoArray]") -> Iterator[Port]:
    count = array.contents.count
    start = ctypes.addressof(array.contents) + TensorInfoArray.first.offset
    for info in (TensorInfo * count).from_address(start):
        shape = tuple(info.shape[i] for i in range(info.ndim))
        yield Port(info.name.decode(), info.usage, info.size, info.dtype, shape)
