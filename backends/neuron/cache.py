"""Compiled graphs on disk, by what they are made from; no jax.

    ROOT/COMPILER-VERSION/TARGET/KEY/   model.hlo.pb  model.neff  manifest.json  log
    ROOT/COMPILER-VERSION/TARGET/KEY.failed.json      the compiler refused it
    ROOT/COMPILER-VERSION/TARGET/KEY.lock             held while it is compiled

A folder appears whole or not at all. ROOT may be copied to other machines: one without a compiler
takes the newest version that has the key. What the compiler refused is refused again at once,
until it is asked to retry; what was killed or ran out of time is simply tried again.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from octavo.backends.neuron import neff
from octavo.backends.neuron.compiler import Compiler, Options
from octavo.backends.neuron.errors import (
    CacheMiss,
    CompileFailed,
    CompilerMissing,
    NeffTargetMismatch,
)
from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.hlo import Module
from octavo.backends.neuron.targets import check_length

FORMAT = 1  # of what is kept, and of what the exporter makes
HISTORY = "state.slots.history"  # the tokens of every slot: as wide as the longest sequence
KILLED_OR_LATE = ("it was killed", "it took more than", "it ended well")


class NeffCache:
    """A folder of compiled graphs, and the compiler that fills it."""

    def __init__(
        self,
        root: Path,
        compiler: Compiler | None,
        *,
        require_cached: bool = False,
        retry_failed: bool = False,
    ) -> None:
        """compiler: None where there is none."""
        self.root = root
        self.compiler = compiler
        self.require_cached = require_cached
        self.retry_failed = retry_failed
        self.hits = 0
        self.misses = 0

    def get(self, exported: Exported, options: Options) -> bytes:
        """The NEFF of a graph, compiled now where it is not kept.

        Raises CacheMiss, CompilerMissing, CompileFailed, NeffInvalid, NeffTargetMismatch or
        SequenceExceedsBuckets.
        """
        name = self.key(exported, options)
        folder = self._kept(name, options)
        if folder is None:
            folder = self._folder(name, options)
            if self.require_cached or self.compiler is None:
                self._check_kept(exported, options)
            if self.require_cached:
                raise CacheMiss(exported.name, folder)
            if self.compiler is None:
                raise CompilerMissing("it is not installed")
            with _locked(folder.with_suffix(".lock")):
                if not (folder / "model.neff").exists():  # nobody else made it meanwhile
                    self._make(folder, exported, options, self.compiler)
        else:
            self.hits += 1
        data = (folder / "model.neff").read_bytes()
        neff.parse(data, folder / "model.neff")
        return data

    def key(self, exported: Exported, options: Options) -> str:
        """A digest of all that decides the NEFF but the compiler's version."""
        parts = [str(FORMAT), json.dumps(options.flags()), str(exported.ranks)]
        parts += [json.dumps(exported.aliases)]
        digest = sha256("\n".join(parts).encode())
        digest.update(without_sources(exported.hlo))
        return digest.hexdigest()[:32]

    def _folder(self, key: str, options: Options) -> Path:
        version = self.compiler.version if self.compiler else "any-version"
        return self.root / version / options.target.name / key

    def _kept(self, key: str, options: Options) -> Path | None:
        if self.compiler is not None:
            places = [self._folder(key, options)]
        else:
            places = list(self.root.glob(f"*/{options.target.name}/{key}"))
        there = [place for place in places if (place / "model.neff").exists()]
        return max(there, key=lambda place: place.stat().st_mtime, default=None)

    def _check_kept(self, exported: Exported, options: Options) -> None:
        """Raises NeffTargetMismatch or SequenceExceedsBuckets where the graph was compiled, but
        for other hardware or for shorter sequences only."""
        here = options.target.name
        lengths: dict[str, list[int]] = {}  # by target, of each compiled graph of that name
        for path in self.root.glob("*/*/*/manifest.json"):
            manifest = json.loads(path.read_text())
            if manifest["name"] == exported.name:
                inputs = [(tensor["leaf"], tensor["shape"]) for tensor in manifest["inputs"]]
                lengths.setdefault(path.parent.parent.name, []).append(_length(inputs))
        if lengths and here not in lengths:
            raise NeffTargetMismatch(exported.name, min(lengths), here)
        length = _length([(tensor.leaf, tensor.shape) for tensor in exported.inputs])
        if here in lengths and length:
            check_length(length, lengths[here])

    def _make(self, folder: Path, exported: Exported, options: Options, compiler: Compiler) -> None:
        failed = folder.with_suffix(".failed.json")
        if failed.exists() and not self.retry_failed:
            raise _again(exported.name, failed)
        self.misses += 1
        log = folder.with_suffix(".log")
        try:
            data = compiler.compile(exported.name, exported.hlo, options, log)
        except CompileFailed as error:
            if not any(how in error.message for how in KILLED_OR_LATE):
                told = {"message": error.message, "hint": error.hint, "code": error.code}
                _write(failed, json.dumps(told | {"log": str(log)}).encode())
            raise
        failed.unlink(missing_ok=True)
        building = folder.with_suffix(f".{os.getpid()}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        _write(building / "model.hlo.pb", exported.hlo)
        _write(building / "model.neff", data)
        manifest = _manifest(exported, options, compiler)
        _write(building / "manifest.json", json.dumps(manifest, indent=1).encode())
        log.rename(building / "log")
        building.rename(folder)


def _length(inputs: Iterable[tuple[str, Sequence[int]]]) -> int:
    """The longest sequence that a graph was made for; 0 where it does not see that."""
    return next((shape[-1] for leaf, shape in inputs if leaf == HISTORY), 0)


def without_sources(hlo: bytes) -> bytes:
    """The module without where its operations come from: folders differ from machine to machine."""
    try:
        module = Module.parse(hlo)
    except (ValueError, IndexError, StopIteration):
        return hlo
    if not module.computations:
        return hlo
    module.frames = b""
    for computation in module.computations:
        for instruction in computation.instructions:
            instruction.metadata = b""
    return module.encode()


def _manifest(exported: Exported, options: Options, compiler: Compiler) -> dict[str, object]:
    ports = {
        "inputs": [asdict(t) for t in exported.inputs],
        "outputs": [asdict(t) for t in exported.outputs],
    }
    return {
        "format": FORMAT,
        "name": exported.name,
        "target": options.target.name,
        "ranks": exported.ranks,
        "flags": options.flags(),
        "compiler": compiler.version,
        "aliases": exported.aliases,
        **ports,
    }


def _again(graph: str, failed: Path) -> CompileFailed:
    """The failure of an earlier time."""
    told = json.loads(failed.read_text())
    how = "an earlier run's attempt failed too"
    hint = f"{told['hint']}; OCTAVO_NEURON_RETRY_FAILED=1 tries again"
    return CompileFailed(graph, how, told["code"], hint, Path(told["log"]))


def _write(path: Path, data: bytes) -> None:
    """Whole and on the disk, or not there."""
    half = path.with_name(path.name + ".half")
    with half.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    half.rename(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process or thread at a time; the lock goes with its holder, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
