"""Write the table of settings into docs/configuration.md, between its markers."""

from pathlib import Path

from octavo.engine.config import settings_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
BEGIN, END = "<!-- settings -->\n", "<!-- /settings -->"


def main() -> None:
    """Replace what stands between the markers."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}{settings_table()}{END}{after}")


if __name__ == "__main__":
    main()
