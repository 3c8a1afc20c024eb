"""Text in columns, for terminals."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], num_left: int = 1) -> list[str]:
    """Lines whose columns have one width each and stand two spaces apart.

    Args:
        rows: of equally many cells.
        num_left: so many first columns are flush left, the others flush right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
