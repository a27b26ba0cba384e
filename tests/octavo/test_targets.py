"""`--target`: what is refused before anything is compiled."""

import pytest

from octavo.cli.main import main


@pytest.mark.parametrize(
    "words, message, hint",
    [
        (
            ["compile", "m", "--target", "v9:2x2", "--output", "out"],
            "`--target` names no chip that is known here: v9",
            "--target v6e:2x2",
        ),
        (
            ["plan", "m", "--target", ":2x2"],
            "`--target` names no chip that is known here: ':2x2'",
            "--target v6e:2x2",
        ),
        (
            ["compile", "m", "--output", "out"],
            "`--output` is for programs of another machine, and no `--target` names it",
            "--compilation-cache",
        ),
        (
            ["compile", "m", "--target", "v6e:2x2"],
            "`--target` needs a folder for what it compiles",
            "--output ./compiled",
        ),
    ],
    ids=" ".join,
)
def test_a_target_that_says_too_little_is_refused_with_the_next_step(
    words: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"error: {message}\n" in error
    assert hint in error.split("hint: ")[1]
