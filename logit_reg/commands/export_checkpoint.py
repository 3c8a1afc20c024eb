"""Write a network as a checkpoint that the challenges' code restores, or its weights for PyTorch.

--output_dir gets the TF1 bundle with its `checkpoint` file, a config.json that the challenge's
scripts accept, and model_card.json, whose numbers come from the ledgers in --evaluations and from
nowhere else. --zip also packs the layout of the released models, with the same bytes every time.

With --to=safetensors it gets weights.safetensors instead, named and shaped for PyTorch's layers,
and the logits are compared where PyTorch is installed.
"""

from pathlib import Path

from absl import flags

from logit_reg.commands import command_line, flag_effects
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import UsageError

flags.DEFINE_string(
    "model_dir", None, "a run, a .keras file, or folder or prefix of a TF1 checkpoint; newest run"
)
flags.DEFINE_string("output_dir", None, "folder to write; must hold no other checkpoint")
flags.DEFINE_enum(
    "to", "challenge", ["challenge", "safetensors"], "what to write: a TF1 checkpoint, or weights"
)
flags.DEFINE_bool(
    "slots",
    None,
    "with the optimiser's state, so that training can go on (on where the model has one)",
)
flags.DEFINE_integer("step", None, "number of training steps of a .keras file, for the name (0)")
flags.DEFINE_string("zip", None, "archive to pack, as NAME.zip with models/NAME/ inside")
flags.DEFINE_list("evaluations", None, "folders of eval_challenge.py's results, for the card")
flags.DEFINE_string("link", None, "where the model is described, for the card")


def check_flags() -> None:
    """Refuse flags that have no effect."""
    flag_effects.refuse_without_effect(flag_effects.EXPORT)


def main() -> None:
    """Export as the flags say."""
    from logit_reg.commands import records
    from logit_reg.experiments.exports import export_model
    from logit_reg.experiments.torch_weights import export_torch

    if not FLAGS.output_dir:
        raise UsageError("--output_dir is missing; name the folder to write.")
    output_dir = Path(FLAGS.output_dir).expanduser()
    if FLAGS.to == "safetensors":
        export_torch(records.given_model(FLAGS.model_dir), output_dir)
        return
    export_model(
        records.given_model(FLAGS.model_dir),
        output_dir,
        archive=Path(FLAGS.zip).expanduser() if FLAGS.zip else None,
        slots=FLAGS.slots,
        step=FLAGS.step,
        evaluations=[Path(folder).expanduser() for folder in FLAGS.evaluations or []],
        link=FLAGS.link,
    )


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
