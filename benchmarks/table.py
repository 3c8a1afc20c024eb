"""The results as text for the terminal."""

from collections.abc import Mapping, Sequence

_COLUMNS = (
    "contender",
    "median s",
    "min - max s",
    "rate /s",
    "time / ours [min, max]",
    "of peak",
    "peak MiB",
    "right %",
    "differ",
)


def case_table(result: Mapping) -> str:
    """One case of the results, as `run.case_result` makes it."""
    case = result["case"]
    title = (
        f"{case['name']}: network {case['network']}, {result['work']} {result['unit']} a "
        f"repetition, {case['repeats']} repetitions; data: {result['data']}"
    )
    rows = [_row(contender) for contender in result["contenders"]]
    missing = [f"  {name}: not here ({why})" for name, why in result["missing"].items()]
    return "\n".join([title, *aligned([_COLUMNS, *rows]), *missing, *result["disagreements"]])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns of one width, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _row(contender):
    ratio, share, accuracy = (
        contender["ratio"],
        contender["share_of_peak"],
        contender["accuracy"],
    )
    different, rate = contender["num_different"], contender["rate"]
    return (
        contender["name"],
        f"{contender['median']:.3g}",
        "{:.3g} - {:.3g}".format(*contender["spread"]),
        f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}",
        "{:.2f} [{:.2f}, {:.2f}]".format(*ratio),
        "" if share is None else f"{share:.2f}",
        f"{contender['peak_bytes'] / 2**20:,.0f}",
        "" if accuracy is None else f"{100 * accuracy:.1f}",
        "" if different is None else str(different),
    )
