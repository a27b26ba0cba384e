"""The flags of the endpoint: documented, checked, and passed on."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from octavo.server.settings import ServerSettings
from tests.server.conftest import PATIENCE

ROOT = Path(__file__).parent.parent.parent


def test_every_flag_is_documented_with_its_default():
    text = (ROOT / "docs/serving.md").read_text()
    table = text.partition("<!-- settings -->")[2].partition("<!-- /settings -->")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (?:`(.*?)`)? ?\| (.*) \|$", table, re.MULTILINE)
    wanted = []
    for f in fields(ServerSettings):
        default = f.default if f.default is not MISSING else ""
        shown = {False: "off", True: "on"}[default] if isinstance(default, bool) else str(default)
        wanted.append(("--" + f.name.replace("_", "-"), shown, f.metadata["help"]))
    assert rows == wanted


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--header-timeout=0", "header_timeout"),
        ("--max-header-count=1", "max_header_count"),
        ("--request-timeout=-1", "request_timeout"),
        ("--chat-template-timeout=1000", "chat_template_timeout"),
    ],
)
def test_a_limit_that_makes_no_sense_ends_the_start(launch, flag, name):
    refused = launch(flag, wait=False)
    _, err = refused.process.communicate(timeout=PATIENCE)
    assert refused.process.returncode == 2
    assert err.startswith(f"error: `{name}` must be from ")
