"""Make tables and figures from runs and their ledgers.

Prints the table of the runs named with --runs, in their order; --page writes a self-contained
page with figures; --readme puts the table between the markers of a Markdown file. --against draws
a sweep instead: its accuracies against a setting of the training, such as beta, against
training_step or against attack_steps.

--compare takes two evaluations of the same images instead, as
--compare=runs/a/strong,runs/b/strong; --leaderboard ranks the model cards in --checkpoints;
--stamp adds the hash of each ledger to results of the first version.
"""

import re
from pathlib import Path

from absl import flags

from logit_reg_scripts import command_line, flag_effects
from logit_reg_scripts.command_line import FLAGS, UsageError

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
    if len(wanted) != 1:
        raise UsageError(
            "give one of --runs=runs/a,runs/b, --compare=A,B and --leaderboard=FILE.html."
        )
    if FLAGS.compare:
        _compare()
    elif FLAGS.leaderboard:
        from logit_reg.leaderboard import write_leaderboard

        folder = command_line.existing_path("checkpoints", FLAGS.checkpoints)
        write_leaderboard(FLAGS.leaderboard, folder)
        print(f"page: {FLAGS.leaderboard}")
    else:
        _report()


def _report() -> None:
    from logit_reg.files import write_text
    from logit_reg.ledger import stamp_ledger
    from logit_reg.page import write_page
    from logit_reg.report import replace_marked_section, results_table
    from logit_reg.runs import load_run

    folders = _folders()
    if FLAGS.stamp:
        for result in (path for folder in folders for path in folder.glob("*/result.json")):
            stamp_ledger(result.parent)
    runs = [load_run(folder) for folder in folders]
    if FLAGS.against:
        from logit_reg.sweep_figures import sweep_table

        table = sweep_table(runs, FLAGS.against)
    else:
        table = results_table(runs)
    print(table.to_text())
    if FLAGS.export:
        _export(folders, Path(FLAGS.export))
    if FLAGS.page:
        write_page(Path(FLAGS.page), FLAGS.title, runs)
        print(f"page: {FLAGS.page}")
    if FLAGS.figure:
        _draw(runs)
    if FLAGS.readme:
        path = command_line.existing_path("readme", FLAGS.readme)
        text = replace_marked_section(path.read_text(), FLAGS.section, table.to_markdown())
        write_text(path, text)
        print(f"table: {path}, section {FLAGS.section}")


def _draw(runs) -> None:
    from logit_reg.figure_style import to_svg
    from logit_reg.figures import accuracy_bars
    from logit_reg.files import atomic_path
    from logit_reg.sweep_figures import sweep_figure

    figure = sweep_figure(runs, FLAGS.against) if FLAGS.against else accuracy_bars(runs)
    with atomic_path(FLAGS.figure) as temporary:
        temporary.write_bytes(to_svg(figure))
    print(f"figure: {FLAGS.figure}")


def _compare() -> None:
    from logit_reg.compare import compare, comparison_table
    from logit_reg.ledger import read_ledger

    if len(FLAGS.compare) != 2:
        raise UsageError("--compare takes two folders, as --compare=runs/a/strong,runs/b/strong.")
    folders = [command_line.existing_path("compare", name) for name in FLAGS.compare]
    (ledger_a, result_a), (ledger_b, result_b) = map(read_ledger, folders)
    found = compare((ledger_a, result_a), (ledger_b, result_b))
    print(f"A: {folders[0]}\nB: {folders[1]}")
    print(comparison_table(found, str(result_a.get("dataset"))).to_text())


def _folders() -> list[Path]:
    if not FLAGS.runs:
        raise UsageError("--runs is missing; name folders of runs, as --runs=runs/a,runs/b.")
    folders = []
    for name in FLAGS.runs:
        folders += _runs_in(command_line.existing_path("runs", name))
    return folders


def _runs_in(folder: Path) -> list[Path]:
    """A run, or the runs in its subfolders: in their order.txt, else by number, then name."""
    if (folder / "run.json").exists():
        return [folder]
    order = folder / "order.txt"
    if order.exists():
        return [folder / name for name in order.read_text().split()]

    def by_number(path):
        words = re.split(r"(\d+(?:\.\d+)?)", path.name)
        return [(0.0, word) if i % 2 == 0 else (float(word), "") for i, word in enumerate(words)]

    folders = sorted((path.parent for path in folder.glob("*/run.json")), key=by_number)
    if not folders:
        raise UsageError(f"--runs={folder}: no runs (run.json) there.")
    return folders


def _export(folders: list[Path], destination: Path) -> None:
    from logit_reg.files import write_text
    from logit_reg.runs import export_run

    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        # Runs of several sweeps.
        names = [f"{folder.resolve().parent.name}-{folder.name}" for folder in folders]
    if len(set(names)) < len(names):
        raise UsageError("--runs names a run twice; --export needs a folder for each.")
    for folder, name in zip(folders, names, strict=True):
        export_run(folder, destination / name)
    write_text(destination / "order.txt", "\n".join(names) + "\n")
    print(f"ledgers: {destination}")


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
