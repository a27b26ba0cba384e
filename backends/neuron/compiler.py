"""neuronx-cc as a subprocess: HLO in, NEFF out, and what its failures mean; no jax.

    neuronx-cc compile --framework XLA model.hlo.pb --target inf2 ... --output model.neff

It runs in a folder of its own, which it litters, with a time limit for it and all that it starts.
"""

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore

from octavo.backends.neuron import neff
from octavo.backends.neuron.errors import CompileFailed, NeffInvalid
from octavo.backends.neuron.targets import Target

TIME_LIMIT = 3600.0  # seconds; a large graph takes tens of minutes
LIST_SECONDS = 120
PROMPT = 128  # tokens from which a graph is a prompt's, which compiles for long
ERROR = re.compile(r"\bNCC_[A-Z]+\d+\b")
_SMALLER = (
    "use a smaller --max-num-batched-tokens and a shorter --max-model-len, or more cores with "
    "--mesh model=N"
)
_REPORT = "read the log; if the operation is one of Octavo's, report it with the log"
# By how the code begins, behind NCC_.
HINTS = {
    "EVRF007": f"the graph has too many instructions: {_SMALLER}",
    "EXTP004": f"the graph has too many instructions: {_SMALLER}",
    "EBVF030": f"the graph has too many instructions: {_SMALLER}",
    "EVRF009": f"the tensors do not fit the core: {_SMALLER}",
    "EOOM": f"the tensors do not fit the core: {_SMALLER}",
    "EXSP001": f"the tensors do not fit the core: {_SMALLER}",
    "EVRF051": "this target has no such float8: use --dtype bfloat16",
    "EVRF005": "this target has no such float8: use --dtype bfloat16",
}
HOST_MEMORY = (
    "the host ran out of memory: compile on one with 64 GiB or more, which needs no Neuron device, "
    "and copy the folder here"
)


@dataclass(frozen=True)
class Options:
    """What is asked of the compiler for one graph, besides the graph."""

    target: Target
    optlevel: int = 2  # 1 for prompts, whose graphs are large
    lnc: int = 0  # 0 is the target's default
    extra: tuple[str, ...] = ()  # the user's own flags, last

    def flags(self) -> tuple[str, ...]:
        """The command line without its paths: what decides the NEFF."""
        flags = ["--framework", "XLA", "--target", self.target.name]
        flags += ["--model-type", "transformer", "--auto-cast", "none"]
        flags += ["--optlevel", str(self.optlevel), "--enable-saturate-infinity"]
        if len(self.target.lnc) > 1:
            flags += ["--lnc", str(self.lnc or self.target.lnc[0])]
        return (*flags, *self.extra)


def options_for(target: Target, tokens: int, lnc: int = 0, extra: tuple[str, ...] = ()) -> Options:
    """How a graph that runs so many tokens is compiled: the same ahead and at a start."""
    return Options(target, 1 if tokens >= PROMPT else 2, lnc, extra)


class Compiler:
    """One neuronx-cc."""

    def __init__(
        self,
        command: Sequence[str],
        version: str,
        *,
        time_limit: float = TIME_LIMIT,
        jobs: int = 0,
    ) -> None:
        """command: the program, with what goes before `compile`. jobs: how many run at once, each
        with gigabytes of its own; 0 is one for every four processors."""
        self.command = tuple(command)
        self.version = version
        self.time_limit = time_limit
        self._turns = BoundedSemaphore(jobs or max(1, (os.cpu_count() or 1) // 4))

    def compile(self, graph: str, hlo: bytes, options: Options, log: Path) -> bytes:
        """The whole NEFF. `log` keeps what the compiler wrote, whether or not it succeeded.

        Raises CompileFailed.
        """
        with self._turns, tempfile.TemporaryDirectory(prefix="octavo-neuronx-cc-") as folder:
            source, made = Path(folder, "model.hlo.pb"), Path(folder, "model.neff")
            source.write_bytes(hlo)
            argv = [*self.command, "compile", str(source), *options.flags()]
            argv += ["--verbose", "error", "--logfile", str(Path(folder, "log-neuron-cc.txt"))]
            argv += ["--output", str(made)]
            status = self._run(argv, folder, graph, log)
            _append(log, Path(folder, "log-neuron-cc.txt"))
            if status:
                raise _failure(graph, status, log)
            try:
                data = made.read_bytes()
                neff.parse(data, made.name)
            except (OSError, NeffInvalid) as error:
                how = f"it ended well, but {getattr(error, 'message', 'wrote no model.neff')}"
                raise CompileFailed(graph, how, "", "see that the disk is not full", log) from None
            return data

    def operators(self) -> list[str]:
        """What it says that it compiles. Raises OSError or subprocess.SubprocessError."""
        argv = [*self.command, "list-operators", "--framework", "XLA"]
        with tempfile.TemporaryDirectory(prefix="octavo-neuronx-cc-") as folder:
            done = subprocess.run(
                argv, cwd=folder, capture_output=True, text=True, timeout=LIST_SECONDS, check=True
            )
        return done.stdout.split()

    def _run(self, argv: list[str], folder: str, graph: str, log: Path) -> int:
        """The exit code; negative is a signal. Raises CompileFailed where it took too long."""
        with log.open("wb") as out:
            try:
                process = subprocess.Popen(
                    argv, cwd=folder, stdout=out, stderr=out, start_new_session=True
                )
            except OSError as error:
                why = (error.strerror or str(error)).lower()
                hint = "see that neuronx-cc is installed and may be run"
                raise CompileFailed(graph, f"{argv[0]}: {why}", "", hint, log) from None
            try:
                return process.wait(self.time_limit)
            except subprocess.TimeoutExpired:
                hint = "set OCTAVO_NEURON_COMPILE_TIMEOUT to more seconds, or " + _SMALLER
                how = f"it took more than {self.time_limit:g} s"
                raise CompileFailed(graph, how, "", hint, log) from None
            finally:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the compiler and what it started: it runs passes in processes of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _append(log: Path, more: Path) -> None:
    if more.exists():
        with log.open("ab") as out:
            out.write(more.read_bytes())


def _failure(graph: str, status: int, log: Path) -> CompileFailed:
    """What an exit code and a log say."""
    found = ERROR.search(log.read_text(errors="replace"))
    code = found[0] if found else ""
    if status == -signal.SIGKILL:
        return CompileFailed(graph, "it was killed", code, HOST_MEMORY, log)
    name = code.removeprefix("NCC_")
    hint = next((hint for start, hint in HINTS.items() if name.startswith(start)), _REPORT)
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    return CompileFailed(graph, how, code, hint, log)
