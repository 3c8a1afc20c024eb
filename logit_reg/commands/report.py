"""Make tables and figures from runs and their ledgers.

With nothing else it prints the table of all runs in runs/; --runs names runs, in their order, and
folders of runs. Networks that were evaluated and not trained here have a row, too. --page writes a
self-contained page with figures; --readme puts the table between the markers of a Markdown file.
--against draws a sweep instead: its accuracies against a setting of the training, such as beta,
against training_step or against attack_steps.

--audits takes folders of audits and shows the table of their verdicts beside what is known of each
network (audit.py --known_accuracy).

--compare takes two evaluations of the same images instead, as
--compare=runs/a/strong,runs/b/strong; --leaderboard ranks the model cards in --checkpoints;
--stamp adds the hash of each ledger to results of the first version.
"""

import dataclasses
from typing import Any

from absl import flags

from logit_reg.commands import command_line, flag_effects
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import UsageError, existing_folder

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
flags.DEFINE_list("audits", None, "folders of audits, or of folders of audits")
flags.DEFINE_string("leaderboard", None, "write a page made from model cards to this .html file")
flags.DEFINE_string("checkpoints", "checkpoints", "folder of the model cards of --leaderboard")
flags.DEFINE_bool("stamp", False, "add the hash of ledger.csv to each result.json without one")


def check_flags() -> None:
    """Refuse flags that have no effect."""
    flag_effects.refuse_without_effect(flag_effects.REPORT)


def main() -> None:
    """Report as the flags say."""
    from logit_reg.experiments.reports import (
        ReportSettings,
        compare_evaluations,
        write_report,
        write_verdicts,
    )
    from logit_reg.report.leaderboard import write_leaderboard

    wanted = [n for n in ("runs", "compare", "audits", "leaderboard") if FLAGS[n].value]
    if len(wanted) > 1:
        raise UsageError(
            "give one of --runs=runs/a,runs/b, --compare=A,B, --audits=A,B and "
            "--leaderboard=FILE.html."
        )
    if FLAGS.compare:
        compare_evaluations(FLAGS.compare)
    elif FLAGS.audits:
        write_verdicts(FLAGS.audits, FLAGS.readme, FLAGS.section)
    elif FLAGS.leaderboard:
        write_leaderboard(FLAGS.leaderboard, existing_folder("checkpoints", FLAGS.checkpoints))
        print(f"page: {FLAGS.leaderboard}")
    else:
        names = [field.name for field in dataclasses.fields(ReportSettings)]
        values: dict[str, Any] = {name: FLAGS[name].value for name in names}
        pair = write_report(ReportSettings(**values))
        if pair:
            command_line.print_next("report", {"compare": pair})


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
