"""Plain tables for the terminal: numbers to the right, words to the left."""

from collections.abc import Sequence


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> None:
    """Print aligned columns; a later column of digits is set to the right."""
    print(format_table(header, rows, indent))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """What print_table prints."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    numeric = [
        i > 0 and bool(rows) and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows)
        for i in range(len(header))
    ]
    return "\n".join(
        indent
        + "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def size(count: int) -> str:
    """Bytes in the unit people compare: 1.5 GiB, 93.8 MiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
