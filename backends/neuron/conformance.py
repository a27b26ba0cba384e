"""What only an instance can prove: small graphs that are compiled and run there, question by
question. `octavo doctor neuron` prints the answers.

A check that is needed must be proven before a model is served; the others are probes, whose answer
either way is worth knowing: Octavo avoids what they ask about.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.backends.neuron import detect, targets
from octavo.backends.neuron.cache import NeffCache
from octavo.backends.neuron.compiler import Compiler, Options
from octavo.backends.neuron.errors import NeuronError, NrtError
from octavo.backends.neuron.export import Graph
from octavo.backends.neuron.runner import Cores
from octavo.backends.neuron.settings import Settings

PROVEN, FAILED, SKIPPED = "proven", "failed", "not applicable"


@dataclass(frozen=True)
class Result:
    """One answer."""

    question: str
    status: str
    found: str = ""
    needed: bool = True


@dataclass
class Bench:
    """What there is to ask with; None where it is not there."""

    found: detect.Found
    target: targets.Target | None = None
    compiler: Compiler | None = None
    cores: Cores | None = None
    root: Path = field(default_factory=Path)  # of a cache of its own

    @property
    def visible(self) -> int:
        """Cores that this process may use."""
        return self.cores.nrt.cores() if self.cores else 0

    def cache(self) -> NeffCache:
        """For compiled checks, so that a second doctor is quick."""
        return NeffCache(self.root, self.compiler)

    def options(self) -> Options:
        assert self.target is not None
        return Options(self.target)

    def run(self, graph: Graph) -> Callable[..., Any]:
        """Compiled and loaded."""
        assert self.cores is not None
        data = self.cache().get(graph.exported, self.options())
        return graph.call(self.cores.load(graph.exported, data))


def open_bench(settings: Settings) -> Bench:
    """Whatever this machine has."""
    found = detect.find()
    bench = Bench(found, found.target, root=settings.cache.parent / "doctor")
    with suppress(NeuronError):
        bench.compiler = settings.compiler()
    with suppress(NeuronError, NrtError):
        bench.cores = Cores(settings.libnrt)
        family = bench.cores.nrt.instance().family
        bench.target = targets.of_family(family) or bench.target
    return bench


Check = Callable[[Bench], str]  # returns what was found; raises where it failed
Entry = tuple[str, Check, int | str, bool]  # question, check, what it needs, is it needed
NEEDS_COMPILER, NEEDS_CORE = "no neuronx-cc", "no device"


def run_all(bench: Bench, checks: Sequence[Entry]) -> Iterator[Result]:
    """Every check in turn; none can end the others."""
    for question, check, needs, needed in checks:
        if missing := _missing(bench, needs):
            yield Result(question, SKIPPED, missing, needed)
            continue
        try:
            yield Result(question, PROVEN, check(bench), needed)
        except Exception as error:
            yield Result(question, FAILED, str(error) or type(error).__name__, needed)


def _missing(bench: Bench, needs: int | str) -> str:
    """Why a check cannot be made, or nothing. needs: "", "compiler", or a number of cores."""
    if needs == "":
        return ""
    if bench.target is None and needs != "compiler":
        return NEEDS_CORE
    if bench.compiler is None:
        return NEEDS_COMPILER
    if isinstance(needs, int) and bench.visible < needs:
        return f"needs {needs} cores, {bench.visible} are visible" if bench.cores else NEEDS_CORE
    return ""
