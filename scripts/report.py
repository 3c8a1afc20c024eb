"""Make tables and figures from runs and their ledgers.

Prints the table of the runs named with --runs, in their order; --page writes a self-contained
page with figures; --readme puts the table between the markers of a Markdown file.
"""

from pathlib import Path

from absl import flags

from logit_reg_scripts import command_line
from logit_reg_scripts.command_line import FLAGS, UsageError

flags.DEFINE_list("runs", None, "folders of runs, or one folder whose subfolders are runs")
flags.DEFINE_string("title", "Cheap defences against adversarial examples", "title of the page")
flags.DEFINE_string("page", None, "write a self-contained HTML page to this file")
flags.DEFINE_string("export", None, "copy ledgers, logs and settings of the runs to this folder")
flags.DEFINE_string("readme", None, "replace the table of this Markdown file")
flags.DEFINE_string("section", "results", "name of the markers in --readme")


def main() -> None:
    """Report as the flags say."""
    from logit_reg.files import write_text
    from logit_reg.page import write_page
    from logit_reg.report import replace_marked_section, results_table
    from logit_reg.runs import export_run, load_run

    folders = _folders()
    runs = [load_run(folder) for folder in folders]
    table = results_table(runs)
    print(table.to_text())
    if FLAGS.export:
        for folder in folders:
            export_run(folder, Path(FLAGS.export) / folder.name)
        names = "\n".join(folder.name for folder in folders) + "\n"
        write_text(Path(FLAGS.export) / "order.txt", names)
        print(f"ledgers: {FLAGS.export}")
    if FLAGS.page:
        write_page(Path(FLAGS.page), FLAGS.title, runs)
        print(f"page: {FLAGS.page}")
    if FLAGS.readme:
        path = command_line.existing_path("readme", FLAGS.readme)
        text = replace_marked_section(path.read_text(), FLAGS.section, table.to_markdown())
        write_text(path, text)
        print(f"table: {path}, section {FLAGS.section}")


def _folders() -> list[Path]:
    if not FLAGS.runs:
        raise UsageError("--runs is missing; name folders of runs, as --runs=runs/a,runs/b.")
    folders = [command_line.existing_path("runs", name) for name in FLAGS.runs]
    if len(folders) == 1 and not (folders[0] / "run.json").exists():
        order = folders[0] / "order.txt"
        if order.exists():
            return [folders[0] / name for name in order.read_text().split()]
        folders = sorted(path.parent for path in folders[0].glob("*/run.json"))
    if not folders:
        raise UsageError(f"--runs={','.join(FLAGS.runs)}: no runs (run.json) there.")
    return folders


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__)


if __name__ == "__main__":
    run()
