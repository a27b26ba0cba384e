"""The command as people run it: help that teaches, errors in one form, exit codes."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

import octavo
from octavo.cli import main as cli
from octavo.cli.table import format_table, size

pytestmark = pytest.mark.smoke

NAMES = [name.replace("_", "-") for name in cli.COMMANDS]


def octavo_command(*words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "octavo", *words], capture_output=True, text=True, input=stdin
    )


def test_the_version_is_the_package_version() -> None:
    done = octavo_command("--version")
    assert (done.returncode, done.stdout) == (0, f"octavo {octavo.__version__}\n")


def test_the_help_names_every_command_and_where_to_begin() -> None:
    done = octavo_command("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in NAMES)
    assert "octavo chat smollm2-135m" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_has_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    assert f"\n  octavo {name}" in capsys.readouterr().out


def test_help_imports_no_jax() -> None:
    program = (
        "import sys\n"
        "from octavo.cli.main import build_parser\n"
        "build_parser()\n"
        "print([m for m in ('jax', 'jaxlib', 'flax', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "sentence", "hint"),
    [
        (["generate"], "there is no prompt", "--prompt"),
        (["generate", "--dtype", "float15", "--prompt", "x"], "must be one of auto", "`float16`?"),
        (["generate", "--config", "nowhere.yaml", "--prompt", "x"], "cannot read", "--config"),
        (["chat", "--url", "ftp://x"], "not an HTTP address: ftp://x", "--url http://"),
        (["bench", "serve", "--url", "http://127.0.0.1:1"], "cannot reach", "octavo serve"),
        (["run-batch", "-i", "nowhere.jsonl", "-o", "x"], "cannot read nowhere.jsonl", ""),
    ],
)
def test_an_error_of_the_user_is_one_sentence_and_a_hint_and_exit_code_2(
    words: list[str], sentence: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert sentence in shown
    assert hint in shown
    assert "Traceback" not in shown


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["gen"], ["generate", "--colour", "red"], []])
def test_a_typing_error_names_the_help_and_exits_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "--help" in shown


def test_the_doctor_reports_a_check_that_breaks_and_goes_on() -> None:
    from octavo.cli.doctor import Line, guarded

    def check_sky() -> Iterator[Line]:
        yield Line("ok", "cloud", "white")
        raise RuntimeError("it fell")

    lines = list(guarded(check_sky))
    assert [line.level for line in lines] == ["ok", "warn"]
    assert "it fell" in lines[1].found


def test_the_doctor_finds_python_jax_and_a_device() -> None:
    done = octavo_command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("python", "jax", "device", "host memory", "compiled programs"):
        assert any(line.startswith(f"ok    {what}") for line in done.stdout.splitlines()), what


def test_sizes_have_the_unit_people_compare() -> None:
    assert [size(n) for n in (0, 1023, 1536, 98_362_432, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "93.8 MiB",
        "3.00 GiB",
    ]


def test_a_table_sets_numbers_to_the_right() -> None:
    assert format_table(("case", "ms"), [("a", "1.5"), ("long", "12.5")], indent="") == (
        "case    ms\na      1.5\nlong  12.5"
    )
