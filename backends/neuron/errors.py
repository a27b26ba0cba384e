"""What can go wrong on the way to a Neuron core: one sentence each, with the next step; no jax."""

from collections.abc import Sequence
from pathlib import Path

GUIDE = "docs/neuron.md"
RULES = "docs/neuron-graphs.md"
INDEX = f"install it from AWS's own package index; {GUIDE} has the command"


class NeuronError(ValueError):
    """A setting, a machine or a graph that cannot work: `message`, and `hint` for the next step."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.message = message
        self.hint = hint


class UnknownTarget(NeuronError):
    """A name that is no target."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"no Neuron target is called {name!r}", f"use {_either(known)}")


class StubPackage(NeuronError):
    """A package that only has the name of AWS's."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"the installed {package} is a stub that only holds the name",
            f"pip uninstall {package}, then {INDEX}",
        )


class PackageMissing(NeuronError):
    """A package of AWS's that is not there."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed", INDEX)


class NoNeuronDevice(NeuronError):
    """Nothing to run on."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"no Neuron device can be used: {why}",
            "run on an inf2, trn1, trn2 or trn3 instance with its driver "
            f"({GUIDE}), or use --device cpu",
        )


class JaxPinMismatch(NeuronError):
    """The plugin was made for another jax."""

    def __init__(self, found: str, wanted: str) -> None:
        super().__init__(
            f"jax {found} is installed, and the Neuron plugin was made for {wanted}",
            f"pip install jax=={wanted} jaxlib=={wanted}",
        )


class UnsupportedTP(NeuronError):
    """A number of cores that do not work together."""

    def __init__(self, target: str, cores: int, degrees: Sequence[int]) -> None:
        super().__init__(
            f"`mesh` asks for model={cores}, which {target} cannot link",
            f"use model={_either(degrees)}",
        )


class HeadsNotDivisible(NeuronError):
    """Heads that cannot be dealt out evenly."""

    def __init__(self, heads: int, cores: int, fitting: Sequence[int]) -> None:
        super().__init__(
            f"`mesh` asks for model={cores}, but the model's {heads} heads cannot be dealt to "
            f"{cores} cores",
            f"use model={_either(fitting)}",
        )


class UnsupportedDtype(NeuronError):
    """A type that the hardware has not."""

    def __init__(self, field: str, dtype: str, target: str, known: Sequence[str]) -> None:
        super().__init__(
            f"`{field}` asks for {dtype}, in which {target} does not compute",
            f"use --{field.replace('_', '-')} {_either(known)}",
        )


class X64Enabled(NeuronError):
    """64-bit types switched on in jax."""

    def __init__(self) -> None:
        super().__init__(
            "`jax_enable_x64` is on, and a Neuron graph may have no 64-bit type",
            "leave JAX_ENABLE_X64 unset",
        )


class SequenceExceedsBuckets(NeuronError):
    """A context longer than every graph."""

    def __init__(self, length: int, longest: int) -> None:
        super().__init__(
            f"`max_model_len` is {length:,}, but the longest graph sees {longest:,} tokens",
            f"use --max-model-len {longest}, or compile with the longer one",
        )


class TooManyGraphs(NeuronError):
    """More graphs than anybody waits for."""

    def __init__(self, count: int, most: int) -> None:
        super().__init__(
            f"these settings need {count} graphs, and at most {most} are compiled",
            "use a smaller --max-num-seqs or --max-num-batched-tokens, which make fewer buckets",
        )


class LintError(NeuronError):
    """A graph with operations that the compiler would refuse."""

    def __init__(self, graph: str, findings: Sequence[object]) -> None:
        shown = "; ".join(map(str, findings[:5]))
        more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
        super().__init__(
            f"graph {graph} breaks {len(findings)} of the compiler's rules: {shown}{more}",
            f"write these in the forms that {RULES} lists",
        )
        self.findings = tuple(findings)


class CompilerMissing(NeuronError):
    """No neuronx-cc that runs."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"neuronx-cc cannot be used: {why}",
            "install AWS's compiler, or bring graphs that were compiled elsewhere and set "
            f"OCTAVO_NEURON_REQUIRE_CACHED=1 ({GUIDE})",
        )


class CompileFailed(NeuronError):
    """neuronx-cc ended without a NEFF."""

    def __init__(self, graph: str, how: str, code: str, hint: str, log: Path) -> None:
        named = f" ({code})" if code else ""
        super().__init__(f"neuronx-cc failed on {graph}: {how}{named}, log in {log}", hint)
        self.code = code
        self.log = log


class CacheMiss(NeuronError):
    """Not compiled ahead, where that was asked for."""

    def __init__(self, graph: str, folder: Path) -> None:
        super().__init__(
            f"graph {graph} was not compiled ahead: {folder} does not exist",
            "run `octavo compile` with the same settings on a machine with neuronx-cc and copy its "
            "folder here, or unset OCTAVO_NEURON_REQUIRE_CACHED",
        )


class NeffInvalid(NeuronError):
    """A file that is no NEFF, or half of one."""

    def __init__(self, path: object, why: str) -> None:
        super().__init__(
            f"{path} is no NEFF that can be loaded: {why}", "delete it and compile again"
        )


class NeffTargetMismatch(NeuronError):
    """Compiled for other hardware."""

    def __init__(self, graph: str, compiled: str, here: str) -> None:
        super().__init__(
            f"graph {graph} was compiled for {compiled}, and this instance is {here}",
            f"compile with --target {here}",
        )


class LncMismatch(NeuronError):
    """Compiled for another size of logical cores."""

    def __init__(self, graph: str, compiled: int, here: int) -> None:
        super().__init__(
            f"graph {graph} was compiled for logical cores of {compiled}, and the runtime's have "
            f"{here}",
            f"set NEURON_LOGICAL_NC_CONFIG={compiled}, or compile again with it set to {here}",
        )


class NrtError(RuntimeError):
    """A call of the runtime that failed."""

    def __init__(self, call: str, code: int) -> None:
        name, hint = NRT_CODES.get(code, ("unknown code", "look into the runtime's log"))
        super().__init__(f"{call} failed with {code} ({name}); {hint}")
        self.code = code


_HARDWARE = "run neuron-ls and neuron-top; if it comes again, stop and start the instance"
_LOG = "set NEURON_RT_LOG_LEVEL=INFO and look into the log"
NRT_CODES = {
    1: ("failure", _LOG),
    2: ("invalid NEFF or input", "compile the graphs again with this version of Octavo"),
    3: ("invalid handle", "this is Octavo's own mistake: please report it"),
    4: (
        "out of device memory",
        "use fewer --num-pages, a smaller --max-num-seqs, or more cores with --mesh model=N",
    ),
    5: ("timeout", "raise NEURON_RT_EXEC_TIMEOUT, and see neuron-top for a core that hangs"),
    6: ("hardware failure", _HARDWARE),
    7: ("queue full", "this is Octavo's own mistake: please report it"),
    9: (
        "not enough free cores",
        "another process holds them: see neuron-ls, or set NEURON_RT_VISIBLE_CORES to free ones",
    ),
    10: ("NEFF version", "update aws-neuronx-runtime-lib to the compiler's release"),
    11: ("out of host memory", "use an instance with more memory, or fewer graphs"),
    13: ("not initialized", "this is Octavo's own mistake: please report it"),
    14: ("closed", "start the process again"),
    101: ("a core cannot go on", "start the process again"),
    1002: ("bad input", "compile the graphs again with this version of Octavo"),
    1003: (
        "numerical error",
        "use --dtype float32 to see whether the model's own numbers overflow",
    ),
    1004: ("completed with errors", _HARDWARE),
    1005: ("core busy", "another process holds the core: see neuron-ls"),
    1006: ("index out of bounds", "this is Octavo's own mistake: please report it"),
    1200: ("stuck in a collective", "see whether another rank's log has an earlier error"),
    1201: ("memory error", _HARDWARE),
    1202: ("on-chip memory error", _HARDWARE),
    1203: ("transfer aborted", _HARDWARE),
    1204: ("notification queue overflow", _LOG),
    1205: ("repairable memory error", "stop and start the instance"),
    1206: ("network proxy failure", _LOG),
}


def _either(options: Sequence[object]) -> str:
    *most, last = [str(option) for option in options]
    return f"{', '.join(most)} or {last}" if most else last
