"""The flags of the endpoint: documented, checked, and passed on."""

from dataclasses import fields
from pathlib import Path

import pytest

from octavo.server.settings import ServerSettings, flags_table
from tests.server.conftest import PATIENCE

ROOT = Path(__file__).parent.parent.parent


def test_every_flag_is_documented_with_its_default():
    text = (ROOT / "docs/serving.md").read_text()
    table = text.partition("<!-- settings -->\n")[2].partition("<!-- /settings -->")[0]
    assert table == flags_table(), "run python scripts/write_settings_table.py"
    for f in fields(ServerSettings):
        assert f"\n| `--{f.name.replace('_', '-')}` |" in table


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
