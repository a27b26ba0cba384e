"""The docs say what is so: the files they name exist, the table is the one the code makes."""

import re
import tomllib
from pathlib import Path

import pytest

from octavo.engine.config import settings_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FOLDERS = (
    "backends|bench|constraints|deploy|docs|engine|models|octavo|pallas_kernels|scripts|server|"
    "tests"
)


def between(text: str, marker: str) -> str:
    """What stands between `<!-- marker -->` and `<!-- /marker -->`."""
    return text.split(f"<!-- {marker} -->\n")[1].split(f"<!-- /{marker} -->")[0].strip() + "\n"


def test_the_settings_table_is_the_one_the_code_makes() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert between(page, "settings") == settings_table(), (
        "run python scripts/write_settings_table.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(rf"`((?:{FOLDERS})/[\w./-]*\w/?)`", page.read_text()))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_life_of_a_request_has_eight_steps_and_each_names_a_file() -> None:
    page = (ROOT / "docs" / "life-of-a-request.md").read_text()
    steps = re.split(r"^\d+\. ", page, flags=re.MULTILINE)[1:]
    assert len(steps) == 8
    assert all(re.search(rf"`(?:{FOLDERS})/", step) for step in steps)


def test_every_dependency_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[<>=]", line)[0] for line in project["dependencies"]]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    assert [name for name in names if f"`{name}`" not in page] == []
