"""What `report.py` makes of runs: tables, pages, figures, exports and comparisons."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from logit_reg.evaluation.ledger import evaluation_identity, read_ledger, stamp_ledger
from logit_reg.experiments.evaluations import refuse_other_settings
from logit_reg.experiments.sources import RUNS
from logit_reg.files import atomic_path, read_json, write_text
from logit_reg.messages import UsageError, existing_folder, existing_path
from logit_reg.report.compare import compare, comparison_table, pair_to_compare
from logit_reg.report.figures import accuracy_bars
from logit_reg.report.run_page import write_page
from logit_reg.report.runs import Run, evaluation_folders, export_run, load_run, run_folders
from logit_reg.report.style import to_svg
from logit_reg.report.sweep_figures import sweep_figure, sweep_table
from logit_reg.report.tables import (
    Table,
    replace_marked_section,
    results_table,
    split_by_dataset,
)
from logit_reg.report.verdicts import audit_folders, verdicts_table
from madry_compat.challenges import IMAGE_SETS


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    """Which runs a report is of, and what is made of them beside the table."""

    runs: Sequence[str] | None = None
    """Folders of runs, or of folders of runs; `runs` if None."""
    title: str = ""
    """Of the page."""
    page: str | None = None
    """The `.html` file of a page."""
    export: str | None = None
    """Folder that gets copies of ledgers, logs and settings."""
    readme: str | None = None
    """A Markdown file that gets the table."""
    section: str = "results"
    """Name of the markers in it."""
    against: str | None = None
    """The setting that a sweep varies; a table of all runs if None."""
    figure: str | None = None
    """The `.svg` file of a figure."""
    stamp: bool = False
    """Whether results of the first version get the hash of their ledger."""


def write_report(settings: ReportSettings) -> list[Path] | None:
    """Print the tables of some runs and write what else is wanted.

    Args:
        settings: runs and files.

    Returns:
        The folders of two evaluations to compare, if there are any.

    Raises:
        UsageError: if there are no runs, or a file is to be written over something else.
        ValueError: if a run cannot be read.
    """
    folders = _folders(settings.runs)
    if settings.stamp:
        for evaluation in (path for folder in folders for path in evaluation_folders(folder)):
            stamp_ledger(evaluation)
    runs = [load_run(folder) for folder in folders]
    if settings.against:
        tables = [sweep_table(runs, settings.against)]
    else:
        tables = [results_table(group) for group in split_by_dataset(runs)]
    print("\n\n".join(table.to_text() for table in tables))
    if settings.export:
        _export(folders, Path(settings.export))
    if settings.page:
        write_page(Path(settings.page), settings.title, runs, num_classes=_num_classes(runs))
        print(f"page: {settings.page}")
    if settings.figure:
        figure = (
            sweep_figure(runs, settings.against, _num_classes(runs))
            if settings.against
            else accuracy_bars(runs)
        )
        with atomic_path(settings.figure) as temporary:
            temporary.write_bytes(to_svg(figure))
        print(f"figure: {settings.figure}")
    if settings.readme:
        table = tables[0] if settings.against else results_table(runs)
        _into_page(existing_path("readme", settings.readme), settings.section, table)
    return pair_to_compare(list(zip(folders, runs, strict=True)))


def write_verdicts(names: Sequence[str], readme: str | None, section: str) -> None:
    """Print the table of verdicts of some audits, and put it into a page.

    Args:
        names: folders of audits, or of folders of audits.
        readme: a Markdown file that gets the table, too.
        section: name of the markers in it.

    Raises:
        UsageError: if there are no audits.
        ValueError: if one cannot be read, or the page has no such section.
    """
    folders = []
    for name in names:
        found = audit_folders(existing_folder("audits", name))
        if not found:
            raise UsageError(f"--audits={name}: there is no audit.json at or below it.")
        folders += found
    table = verdicts_table(folders)
    print(table.to_text())
    if readme:
        _into_page(existing_path("readme", readme), section, table)


def _into_page(path: Path, section: str, table: Table) -> None:
    write_text(path, replace_marked_section(path.read_text(), section, table.to_markdown()))
    print(f"table: {path}, section {section}")


def compare_evaluations(names: Sequence[str]) -> None:
    """Print the paired differences of two evaluations.

    Args:
        names: of their folders.

    Raises:
        UsageError: if there are not two, or one is not there.
        ValueError: if they have no images in common, or one cannot be read.
    """
    if len(names) != 2:
        raise UsageError("--compare takes two folders, as --compare=runs/a/strong,runs/b/strong.")
    folders = [existing_folder("compare", name) for name in names]
    (ledger_a, result_a), (ledger_b, result_b) = map(read_ledger, folders)
    found = compare((ledger_a, result_a), (ledger_b, result_b))
    print(f"A: {folders[0]}\nB: {folders[1]}")
    print(comparison_table(found, str(result_a.get("dataset"))).to_text())


def _num_classes(runs: Sequence[Run]) -> int:
    """K of the data set that was trained on; 10 where that is none of the project's."""
    names = {str(run.settings.get("dataset")) for run in runs} & IMAGE_SETS.keys()
    return max((IMAGE_SETS[name].challenge.num_classes for name in names), default=10)


def _folders(names: Sequence[str] | None) -> list[Path]:
    if not names and not RUNS.is_dir():
        raise UsageError(f"there is no {RUNS}/ here; name folders of runs, as --runs=a,b.")
    folders = []
    for name in names or [str(RUNS)]:
        found = run_folders(existing_folder("runs", name))
        if not found:
            raise UsageError(f"--runs={name}: no runs (run.json) and no evaluations there.")
        folders += found
    return folders


def _export(folders: Sequence[Path], destination: Path) -> None:
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        # Runs of several sweeps.
        names = [f"{folder.resolve().parent.name}-{folder.resolve().name}" for folder in folders]
    if len(set(names)) < len(names):
        raise UsageError("--runs names a run twice; --export needs a folder for each.")
    pairs = [(folder, destination / name) for folder, name in zip(folders, names, strict=True)]
    _refuse_other_runs(pairs, destination)
    for folder, place in pairs:
        export_run(folder, place)
    write_text(destination / "order.txt", "\n".join(names) + "\n")
    print(f"ledgers: {destination}")


def _refuse_other_runs(pairs, destination) -> None:
    """An export goes into a folder of its own, or onto an earlier one of the same runs."""
    places = [place for _, place in pairs]
    held = destination.iterdir() if destination.is_dir() else ()
    others = sorted(path.name for path in held if path.is_dir() and path not in places)
    if others:
        raise UsageError(
            f"--export={destination}: the folder holds other runs ({', '.join(others)}); choose "
            f"another, or remove it."
        )
    for folder, place in pairs:
        if (place / "run.json").exists() and (folder / "run.json").exists():
            old, new = (
                read_json(path / "run.json").get("settings", {}) for path in (place, folder)
            )
            refuse_other_settings(place, old, new, "--export")
        for evaluation in evaluation_folders(folder):
            copy = place / evaluation.relative_to(folder)
            if (copy / "result.json").exists():
                held, wanted = (
                    evaluation_identity(read_json(path / "result.json"))
                    for path in (copy, evaluation)
                )
                refuse_other_settings(copy, held, wanted, "--export")
