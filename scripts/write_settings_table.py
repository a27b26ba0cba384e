"""Write the tables of settings into docs/configuration.md, docs/serving.md and docs/deploy.md."""

from pathlib import Path

from octavo.engine.config import settings_table
from octavo.server.replicas.scale import scale_table
from octavo.server.settings import flags_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- settings -->\n", "<!-- /settings -->"


def main() -> None:
    """Replace what stands between the markers of each page."""
    for name, table in (
        ("configuration.md", settings_table()),
        ("serving.md", flags_table()),
        ("deploy.md", scale_table()),
    ):
        page = DOCS / name
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}{table}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
