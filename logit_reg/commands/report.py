"""Make tables and figures from runs and their ledgers.

With nothing else it prints the table of all runs in runs/; --runs names runs, in their order, and
folders of runs. Networks that were evaluated and not trained here have a row, too. --page writes a
self-contained page with figures; --readme puts the table between the markers of a Markdown file.
--against draws a sweep instead: its accuracies against a setting of the training, such as beta,
against training_step or against attack_steps.

--compare takes two evaluations of the same images instead, as
--compare=runs/a/strong,runs/b/strong; --leaderboard ranks the model cards in --checkpoints;
--stamp adds the hash of each ledger to results of the first version.
"""

import itertools
from pathlib import Path

import numpy as np
from absl import flags

from logit_reg.commands import command_line, flag_effects
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import UsageError, existing_folder, existing_path

flags.DEFINE_list("runs", None, "folders of runs, or one folder whose subfolders are runs")
flags.DEFINE_string("title", "Cheap defences against adversarial examples", "title of the page")
flags.DEFINE_string("page", None, "write a self-contained HTML page to this file")
flags.DEFINE_string("export", None, "copy ledgers, logs and settings of the runs to this folder")
flags.DEFINE_string("readme", None, "replace the table of this Markdown file")
flags.DEFINE_string("section", "results", "name of the markers in --readme")
flags.DEFINE_string("against", None, "what a sweep varies: beta, training_step, attack_steps, ...")
flags.DEFINE_string(
    "figure", None, "write the sweep's figure, or the runs' bars, to this .svg file"
)
flags.DEFINE_list("compare", None, "two folders of evaluations, A and B")
flags.DEFINE_string("leaderboard", None, "write a page made from model cards to this .html file")
flags.DEFINE_string("checkpoints", "checkpoints", "folder of the model cards of --leaderboard")
flags.DEFINE_bool("stamp", False, "add the hash of ledger.csv to each result.json without one")


def check_flags() -> None:
    """Refuse flags that have no effect."""
    flag_effects.refuse_without_effect(flag_effects.REPORT)


def main() -> None:
    """Report as the flags say."""
    wanted = [name for name in ("runs", "compare", "leaderboard") if FLAGS[name].value]
    if len(wanted) > 1:
        raise UsageError(
            "give one of --runs=runs/a,runs/b, --compare=A,B and --leaderboard=FILE.html."
        )
    if FLAGS.compare:
        _compare()
    elif FLAGS.leaderboard:
        from logit_reg.report.leaderboard import write_leaderboard

        folder = existing_folder("checkpoints", FLAGS.checkpoints)
        write_leaderboard(FLAGS.leaderboard, folder)
        print(f"page: {FLAGS.leaderboard}")
    else:
        _report()


def _report() -> None:
    from logit_reg.evaluation.ledger import stamp_ledger
    from logit_reg.files import write_text
    from logit_reg.report.run_page import write_page
    from logit_reg.report.runs import evaluation_folders, load_run
    from logit_reg.report.tables import replace_marked_section, results_table, split_by_dataset

    folders = _folders()
    if FLAGS.stamp:
        for evaluation in (path for folder in folders for path in evaluation_folders(folder)):
            stamp_ledger(evaluation)
    runs = [load_run(folder) for folder in folders]
    if FLAGS.against:
        from logit_reg.report.sweep_figures import sweep_table

        tables = [sweep_table(runs, FLAGS.against)]
    else:
        tables = [results_table(group) for group in split_by_dataset(runs)]
    print("\n\n".join(table.to_text() for table in tables))
    if FLAGS.export:
        _export(folders, Path(FLAGS.export))
    if FLAGS.page:
        write_page(Path(FLAGS.page), FLAGS.title, runs, num_classes=_num_classes(runs))
        print(f"page: {FLAGS.page}")
    if FLAGS.figure:
        _draw(runs)
    if FLAGS.readme:
        path = existing_path("readme", FLAGS.readme)
        table = tables[0] if FLAGS.against else results_table(runs)
        text = replace_marked_section(path.read_text(), FLAGS.section, table.to_markdown())
        write_text(path, text)
        print(f"table: {path}, section {FLAGS.section}")
    if pair := _pair_to_compare(folders, runs):
        command_line.print_next("report", {"compare": pair})


def _draw(runs) -> None:
    from logit_reg.files import atomic_path
    from logit_reg.report.figures import accuracy_bars
    from logit_reg.report.style import to_svg
    from logit_reg.report.sweep_figures import sweep_figure

    figure = (
        sweep_figure(runs, FLAGS.against, _num_classes(runs))
        if FLAGS.against
        else accuracy_bars(runs)
    )
    with atomic_path(FLAGS.figure) as temporary:
        temporary.write_bytes(to_svg(figure))
    print(f"figure: {FLAGS.figure}")


def _num_classes(runs) -> int:
    """K of the data set that was trained on; 10 where that is none of the project's."""
    from madry_compat.challenges import IMAGE_SETS

    names = {run.settings.get("dataset") for run in runs} & IMAGE_SETS.keys()
    return max((IMAGE_SETS[name].challenge.num_classes for name in names), default=10)


def _compare() -> None:
    from logit_reg.evaluation.ledger import read_ledger
    from logit_reg.report.compare import compare, comparison_table

    if len(FLAGS.compare) != 2:
        raise UsageError("--compare takes two folders, as --compare=runs/a/strong,runs/b/strong.")
    folders = [existing_folder("compare", name) for name in FLAGS.compare]
    (ledger_a, result_a), (ledger_b, result_b) = map(read_ledger, folders)
    found = compare((ledger_a, result_a), (ledger_b, result_b))
    print(f"A: {folders[0]}\nB: {folders[1]}")
    print(comparison_table(found, str(result_a.get("dataset"))).to_text())


def _pair_to_compare(folders, runs) -> list[Path] | None:
    """Two evaluations on the same images: the strongest of two runs, else two of one run."""
    from logit_reg.report.tables import shown_evaluations, strongest

    places = list(zip(folders, runs, strict=True))
    strong = [
        (folder / name, evaluation, evaluation.label)
        for folder, run in places
        for name, evaluation in shown_evaluations(run).items()
        if strongest(run) is evaluation
    ]
    candidates = [strong]
    # Of one run, the attacks differ: each evaluation stands for its own.
    candidates += [
        [(folder / name, evaluation, "") for name, evaluation in shown_evaluations(run).items()]
        for folder, run in places
    ]
    for found in candidates:
        for (path_a, a, label_a), (path_b, b, label_b) in itertools.combinations(found, 2):
            on_same = a.dataset == b.dataset and np.array_equal(a.ledger.index, b.ledger.index)
            if on_same and label_a == label_b:
                return [path_a, path_b]
    return None


def _folders() -> list[Path]:
    from logit_reg.experiments.sources import RUNS
    from logit_reg.report.runs import run_folders

    if not FLAGS.runs and not RUNS.is_dir():
        raise UsageError(f"there is no {RUNS}/ here; name folders of runs, as --runs=a,b.")
    folders = []
    for name in FLAGS.runs or [str(RUNS)]:
        found = run_folders(existing_folder("runs", name))
        if not found:
            raise UsageError(f"--runs={name}: no runs (run.json) and no evaluations there.")
        folders += found
    return folders


def _export(folders: list[Path], destination: Path) -> None:
    from logit_reg.files import write_text
    from logit_reg.report.runs import export_run

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
    from logit_reg.evaluation.ledger import evaluation_identity
    from logit_reg.experiments.evaluations import refuse_other_settings
    from logit_reg.files import read_json
    from logit_reg.report.runs import evaluation_folders

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


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
