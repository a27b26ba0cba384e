"""Plan, export and compile for Neuron cores that are not here: from a config.json to a folder.

OUT/graphs/NAME.hlo.pb, NAME.json    what neuronx-cc gets, and what its inputs and outputs are
OUT/VERSION/TARGET/KEY/              what it made; the folder is what OCTAVO_NEURON_CACHE names
OUT/report.json
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from octavo.backends.neuron import export, lint, targets
from octavo.backends.neuron.compiler import options_for
from octavo.backends.neuron.errors import CompilerMissing, NeuronError
from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.record import record
from octavo.backends.neuron.settings import Settings
from octavo.engine.ahead.wanted import Wanted, facts_of
from octavo.engine.assemble import Progress, cache_maker, limits_of, refusals
from octavo.engine.config import ConfigError, parse_mesh
from octavo.engine.memory import Resolved, resolve, size
from octavo.engine.prepare import readable
from octavo.engine.programs import Job, Programs
from octavo.engine.step import Machine

THREADS = 8  # that wait for compilers; how many of those run at once, the compiler's record says


@dataclass(frozen=True)
class Made:
    """One graph, and what became of it."""

    name: str
    operations: int  # of the HLO
    bytes_per_core: int  # of its inputs and outputs
    inputs: int
    outputs: int
    in_place: int  # outputs that are an input's buffer
    warnings: tuple[str, ...]
    neff_bytes: int = 0  # 0: not compiled


@dataclass(frozen=True)
class Report:
    """What fits, and the graphs."""

    target: targets.Target
    ranks: int
    resolved: Resolved
    graphs: list[Made] = field(default_factory=list)
    folder: Path | None = None
    compiler: str = ""

    def lines(self) -> list[str]:
        """For people."""
        target, memory = self.target, self.resolved.memory
        many = f"{self.ranks} core{'s' if self.ranks > 1 else ''}"
        out = [f"target     {target.name} ({target.chip}), {many}", *memory.lines()]
        if not self.graphs:
            return out
        out.append("")
        wide = max(len(graph.name) for graph in self.graphs)
        for graph in self.graphs:
            made = f", NEFF {size(graph.neff_bytes)}" if graph.neff_bytes else ""
            told = f", {len(graph.warnings)} warnings" if graph.warnings else ""
            out.append(
                f"{graph.name.ljust(wide)}  {graph.operations:>6,} operations, "
                f"{size(graph.bytes_per_core):>10} a core, {graph.in_place} of {graph.outputs} "
                f"outputs in place, keeps the rules{told}{made}"
            )
        for warning in dict.fromkeys(w for graph in self.graphs for w in graph.warnings):
            out.append(f"warning    {warning}")
        largest = max(graph.bytes_per_core for graph in self.graphs)
        out += [
            "",
            f"largest    {size(largest)} of {size(target.usable)} a core",
            f"folder     {self.folder}",
            self._next(),
        ]
        return out

    def _next(self) -> str:
        pages = self.resolved.memory.pages[0]
        if self.compiler:
            return (
                f"start with OCTAVO_NEURON_CACHE={self.folder} and --num-pages {pages} "
                "--device neuron, and the settings of this command"
            )
        return (
            "exported only: where neuronx-cc is, the same command without --export-only compiles; "
            f"--num-pages {pages} makes the same graphs"
        )

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "target": self.target.name,
            "ranks": self.ranks,
            "memory": asdict(self.resolved.memory),
            "row_buckets": self.resolved.row_buckets,
            "token_buckets": self.resolved.token_buckets,
            "context_buckets": self.resolved.context_buckets,
            "usable_bytes_per_core": self.target.usable,
            "graphs": [asdict(graph) for graph in self.graphs],
            "compiler": self.compiler or None,
            "folder": str(self.folder) if self.folder else None,
        }


def plan(wanted: Wanted) -> Report:
    """What fits: nothing is traced."""
    with _refusals():
        target, ranks, resolved = _sizes(wanted)
    return Report(target, ranks, resolved)


def compile(wanted: Wanted) -> Report:
    """Export every graph, hold it against the rules, and compile it unless that is not wanted."""
    assert wanted.output is not None
    folder = wanted.output
    with _refusals():
        target, ranks, resolved = _sizes(wanted)
        cache = None
        if not wanted.export_only:
            cache = Settings.read().open_cache(folder)
            if cache.compiler is None:
                raise CompilerMissing("it is not installed, and without it --export-only works")
        (folder / "graphs").mkdir(parents=True, exist_ok=True)
        jobs = [job for job in _jobs(target, resolved) if export.can_export(job)]
        graphs, exported = [], []
        for done, job in enumerate(jobs, 1):
            graph = export.export_job(job, ranks).exported
            graphs.append(_checked(graph, target, folder / "graphs"))
            exported.append((job, graph))
            if wanted.progress is not None:
                wanted.progress(f"export {job.name}", done, len(jobs))
        if cache is not None:
            graphs = _compiled(graphs, exported, cache, target, wanted.progress)
    version = cache.compiler.version if cache and cache.compiler else ""
    report = Report(target, ranks, resolved, graphs, folder, version)
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return report


@contextmanager
def _refusals() -> Iterator[None]:
    """What a target cannot do is the user's to mend, as a wrong setting is."""
    try:
        with refusals():
            yield
    except NeuronError as error:
        raise ConfigError(error.message, error.hint) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"`--output` {error.filename} cannot be written: {reason}", "give a folder that can"
        ) from None


def _sizes(wanted: Wanted) -> tuple[targets.Target, int, Resolved]:
    """Target, ranks and every size. Raises ConfigError or NeuronError."""
    target = targets.target_of(wanted.chip)
    if wanted.topology:
        raise ConfigError(
            f"`--target` {wanted.chip} has no topology, got {wanted.topology!r}",
            f"use --target {wanted.chip} --mesh model=2 for two cores",
        )
    config = readable(wanted.config)
    facts = facts_of(config, "serve it with --device cpu")
    ranks = _ranks(config.mesh)
    targets.check_parallel(target, ranks, facts.H)
    backend = record(target, f"neuron: for {target.name}, which is not here")
    resolved = resolve(config, backend, facts)
    return target, ranks, resolved


def _ranks(mesh: str) -> int:
    """The cores of a mesh such as "model=2"."""
    if mesh == "auto":
        raise ConfigError(
            "`mesh` is auto, and Neuron graphs are compiled for a number of cores",
            "use --mesh model=N, of the instance that they are for",
        )
    sizes = parse_mesh(mesh)
    if any(n > 1 for axis, n in sizes.items() if axis != "model"):
        raise ConfigError(
            f"`mesh` is {mesh}, and Neuron graphs are split along `model` only",
            "use --mesh model=N, and a process for each copy of the model",
        )
    return sizes.get("model", 1)


def _jobs(target: targets.Target, resolved: Resolved) -> list[Job]:
    """The programs that the engine would compile."""
    backend = record(target, "neuron: for export")
    machine = Machine(resolved.dims, resolved.model, backend, resolved.mesh)
    config = resolved.config
    programs = Programs(machine, limits_of(config, resolved), config.max_logprobs)
    params = resolved.model.abstract_params(resolved.dtype)
    return programs.jobs(params, cache_maker(backend, resolved))


def _checked(graph: Exported, target: targets.Target, folder: Path) -> Made:
    """Hold a graph against the rules and write it down. Raises LintError."""
    findings = lint.check(graph, target)
    (folder / f"{graph.name}.hlo.pb").write_bytes(graph.hlo)
    ports = {"aliases": graph.aliases, "ranks": graph.ranks}
    ports |= {side: [asdict(t) for t in getattr(graph, side)] for side in ("inputs", "outputs")}
    (folder / f"{graph.name}.json").write_text(json.dumps(ports, indent=1) + "\n")
    return Made(
        name=graph.name,
        operations=lint.operations(graph),
        bytes_per_core=graph.nbytes,
        inputs=len(graph.inputs),
        outputs=len(graph.outputs),
        in_place=len(graph.aliases),
        warnings=tuple(dict.fromkeys(map(str, findings))),
    )


def _compiled(
    graphs: list[Made],
    exported: list[tuple[Job, Exported]],
    cache: Any,
    target: targets.Target,
    progress: Progress | None,
) -> list[Made]:
    """Every graph through neuronx-cc, or found compiled. Raises CompileFailed and its like."""
    settings = Settings.read()

    def one(pair: tuple[Job, Exported]) -> int:
        job, graph = pair
        options = options_for(target, job.tokens, settings.lnc, settings.flags)
        return len(cache.get(graph, options))

    made = []
    with ThreadPoolExecutor(THREADS) as threads:
        for graph, neff_bytes in zip(graphs, threads.map(one, exported), strict=True):
            made.append(replace(graph, neff_bytes=neff_bytes))
            if progress is not None:
                progress(f"compile {graph.name}", len(made), len(graphs))
    return made
