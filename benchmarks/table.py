"""The results as text: for the terminal, and in Markdown for pages.

As a command: `python -m benchmarks.table results/speed/*.json --page=docs/speed.md
--section=speed`.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from logit_reg.files import read_json, write_text
from logit_reg.report.tables import replace_marked_section
from logit_reg.text_columns import aligned

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

_IN_PAGES = ("contender", "rate /s", "time / ours [min, max]", "of peak", "right %")


def case_table(result: Mapping) -> str:
    """One case of the results, as `run.case_result` makes it."""
    case = result["case"]
    title = (
        f"{case['name']}: network {case['network']}, {result['work']} {result['unit']} a "
        f"repetition, {case['repeats']} repetitions; data: {result['data']}"
    )
    rows = [_row(contender) for contender in result["contenders"]]
    missing = [f"  {name}: not here ({why})" for name, why in result["missing"].items()]
    lines = [f"  {line}" for line in aligned([_COLUMNS, *rows])]
    return "\n".join([title, *lines, *missing, *result["disagreements"]])


def markdown_table(records: Sequence[Mapping]) -> str:
    """All cases of some results in one table, and under it what was measured.

    Args:
        records: contents of results.json files.
    """
    lines = [
        "| case | contender | a second | its time / ours [least, most] | of the matrix peak "
        "| right % |",
        "|---|---|---:|---:|---:|---:|",
    ]
    notes = []
    for record in records:
        for result in record["cases"]:
            case = result["case"]
            for contender in result["contenders"]:
                row = dict(zip(_COLUMNS, _row(contender), strict=True))
                cells = [case["name"], *(row[name] or "–" for name in _IN_PAGES)]
                lines.append(f"| {' | '.join(cells)} |")
            notes.append(_settings(record, result))
    return "\n".join([*lines, "", *notes])


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


def _settings(record, result):
    case = result["case"]
    if case["num_batches"]:
        size = f"{case['num_batches']} steps of {case['batch_size']} images a turn"
    else:
        size = f"{case['num_images']:,} images, batch {case['batch_size']}"
    turns = "1 turn" if case["repeats"] == 1 else f"{case['repeats']} turns"
    peak = record["matrix_peak"]["flops_per_second"] / 1e9
    return (
        f"- {case['name']}: network {case['network']}, {size}, {turns}; a second: "
        f"{result['unit']}; matrix peak {peak:.0f} GFLOP/s; {result['data']}; commit "
        f"`{record['provenance']['commit'][:7]}`."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of results, or put it into a page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description="Results in Markdown."
    )
    parser.add_argument("results", nargs="+", type=Path, help="results.json files")
    parser.add_argument("--page", type=Path, help="Markdown file; the terminal if left out")
    parser.add_argument("--section", default="speed", help="its marked section (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        table = markdown_table([read_json(path) for path in options.results])
        if options.page is None:
            print(table)
            return 0
        text = replace_marked_section(options.page.read_text(), options.section, table)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(options.page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
