"""The models of these tests: SmolLM2 in this process, SmolLM2 served, and one too small to know."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from octavo import LLM
from tests.e2e.golden import SMALL, need
from tests.e2e.served import end, serve
from tests.server.conftest import Server
from tests.server.tiny_model import write_tiny_model

TINY_FLAGS = ("--load-format", "dummy", "--served-model-name", "tiny", "--max-num-seqs", "4")


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LLM]:
    """SmolLM2 in this process, with the sizes that these tests share."""
    need("smollm2-135m")
    with LLM("smollm2-135m", quiet=True, **SMALL) as llm:
        yield llm
        assert llm.core.stats().compiles_after_ready == 0


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`octavo serve smollm2-135m`, as its first user types it."""
    need("smollm2-135m")
    log = tmp_path_factory.mktemp("served") / "log"
    server = serve("smollm2-135m", "--dtype", "float32", log=log)
    yield server
    compiled = server.metric("octavo:compiles_after_ready_total")
    assert end(server) == 0, log.read_text()
    assert compiled == 0


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer with random weights, which compiles in seconds."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def launch(tiny: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Serves the tiny model with the real engine, for one test."""
    started: list[Server] = []

    def launcher(*flags: str) -> Server:
        log = tmp_path / f"log{len(started)}"
        started.append(serve(str(tiny), *TINY_FLAGS, *flags, log=log))
        return started[-1]

    yield launcher
    for one in started:
        one.process.kill()
        one.process.wait()
