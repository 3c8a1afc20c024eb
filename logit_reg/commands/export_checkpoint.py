"""Write a network as a checkpoint that the challenges' code restores.

--output_dir gets the TF1 bundle with its `checkpoint` file, a config.json that the challenge's
scripts accept, and model_card.json, whose numbers come from the ledgers in --evaluations and from
nowhere else. --zip also packs the layout of the released models, with the same bytes every time.
"""

from pathlib import Path

from absl import flags

from logit_reg.commands import command_line
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import UsageError

flags.DEFINE_string(
    "model_dir", None, "a run, a .keras file, or folder or prefix of a TF1 checkpoint; newest run"
)
flags.DEFINE_string("output_dir", None, "folder to write; must hold no other checkpoint")
flags.DEFINE_bool(
    "slots",
    None,
    "with the optimiser's state, so that training can go on (on where the model has one)",
)
flags.DEFINE_integer("step", None, "number of training steps of a .keras file, for the name (0)")
flags.DEFINE_string("zip", None, "archive to pack, as NAME.zip with models/NAME/ inside")
flags.DEFINE_list("evaluations", None, "folders of eval_challenge.py's results, for the card")
flags.DEFINE_string("link", None, "where the model is described, for the card")


def main() -> None:
    """Export as the flags say."""
    from logit_reg.commands import records
    from logit_reg.experiments.exports import export_model

    if not FLAGS.output_dir:
        raise UsageError("--output_dir is missing; name the folder to write.")
    export_model(
        records.given_model(FLAGS.model_dir),
        Path(FLAGS.output_dir).expanduser(),
        archive=Path(FLAGS.zip).expanduser() if FLAGS.zip else None,
        slots=FLAGS.slots,
        step=FLAGS.step,
        evaluations=[Path(folder).expanduser() for folder in FLAGS.evaluations or []],
        link=FLAGS.link,
    )


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__)


if __name__ == "__main__":
    run()
