"""`octavo compile`: what it compiles is what the next start finds."""

import json
import subprocess
import sys
from pathlib import Path

from tests.server.tiny_model import write_tiny_model


def compile_it(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "octavo", "compile", *words, "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_second_time_everything_is_found(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = str(write_tiny_model(tmp_path / "model"))  # it has no weights
    words = [model, "--max-num-seqs", "1", "--compilation-cache", str(tmp_path / "cache")]
    first, again = (compile_it(*words, "--json") for _ in range(2))
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    one, other = json.loads(first.stdout), json.loads(again.stdout)
    assert one["found"] == 0 and one["compiled"] > 5
    assert (other["found"], other["compiled"]) == (one["compiled"], 0)


def test_no_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path))
    done = compile_it(model, "--compilation-cache", "none")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no folder to keep compiled programs in\nhint: ")
