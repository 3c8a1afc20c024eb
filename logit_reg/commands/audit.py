"""Test whether a claim of robustness holds: 34 diagnostics and a verdict with its evidence.

With nothing else it audits the newest run. --claim is the claimed robust accuracy in per cent and
--claimed_by the protocol that it rests on, whose attacks are then tested, too; --num_steps,
--step_size, --loss_func and --restarts describe another attack of the claimant's. --controls
names models of which the truth is known: runs, released models, KIND:PATH with a kind of natural,
noise_only, adversarial, same_recipe or squeezed, or reference:93.60:PATH with the accuracy under
APGD-CE that was published of it. The quick budget does without. With nothing named, the standard
and the full one train what they need on MNIST and its lookalikes into runs/controls, once; among
names, and on CIFAR, the word `train` asks for it, and `none` does without. --model and --data take
a network and images of your own. All values are in pixel units: [0, 1] for MNIST, [0, 255] for
CIFAR.

--fake audits the network behind one of the planted fakes of logit_reg.audit.fakes, whose
robustness is none: a test of the audit itself. Without --claim, the claim is what the claimant's
attack leaves of the fake, PGD with the challenge's steps where none is named.

An interrupted audit goes on when the same command is given again.
"""

import dataclasses

from absl import flags

from logit_reg.commands import command_line, flag_effects, flag_groups
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import UsageError

flag_groups.define_model_flag()
flag_groups.define_data_flags()
flag_groups.define_own_model_flags()

flags.DEFINE_float("claim", None, "the claimed robust accuracy, per cent")
flags.DEFINE_string("claimed_by", None, "the protocol that the claim rests on, as paper-mnist")
flags.DEFINE_string(
    "fake", None, "audit the network behind a planted fake, as temperature; see docs/audit.md"
)
flags.DEFINE_float(
    "known_accuracy",
    None,
    "what is known to be left of the network, per cent; report.py --audits compares the verdict",
    lower_bound=0,
    upper_bound=100,
)
flags.DEFINE_enum("budget", "quick", ["quick", "standard", "full"], "how many tests to run")
flags.DEFINE_list(
    "controls", [], "models of which the truth is known, as DIR or KIND:DIR; train; none"
)
flags.DEFINE_integer(
    "control_steps",
    None,
    "training steps of each trained control (1500, the adversarial one 5000; on CIFAR 20000)",
)
flag_groups.define_example_flags()
flag_groups.define_attack_flags("the claimant's attack: ")
flags.DEFINE_string("output_dir", None, "where audit.json and audit.html go; audits/ of the run")
flags.DEFINE_bool("progress", False, "draw a progress bar for each attack")


def check_flags() -> None:
    """Refuse flags that are missing or have no effect."""
    is_measured = FLAGS.claim is None and FLAGS.fake is not None
    if not is_measured and (FLAGS.claim is None or not 0 <= FLAGS.claim <= 100):
        raise UsageError(
            f"--claim={FLAGS.claim}: give the claimed robust accuracy in per cent, as --claim=93.0."
        )
    flag_effects.refuse_without_effect(flag_effects.AUDIT)


def main() -> None:
    """Run the command."""
    from logit_reg.commands import records
    from logit_reg.experiments.audits import (
        AuditSettings,
        audited_challenge,
        audited_own,
        run_audit,
    )
    from logit_reg.experiments.sources import dataset_for

    settings = AuditSettings(
        claim=_fraction("claim"),
        claimed_by=FLAGS.claimed_by,
        known_accuracy=_fraction("known_accuracy"),
        fake=FLAGS.fake,
        attack=records.attack_choice(),
        budget=FLAGS.budget,
        seed=FLAGS.random_seed,
        controls=tuple(FLAGS.controls),
        control_steps=FLAGS.control_steps,
        num_examples=FLAGS.num_eval_examples,
        batch_size=FLAGS.eval_batch_size,
        output_dir=records.optional_path("output_dir"),
        download=FLAGS.download,
        show_progress=FLAGS.progress,
    )
    if FLAGS.model or FLAGS.data:
        audited = audited_own(records.own_model(), settings)
    else:
        model = records.given_model(FLAGS.model_dir)
        settings = dataclasses.replace(settings, data_dir=records.data_dir(model))
        name = dataset_for(model, FLAGS.dataset, settings.data_dir)
        flag_effects.refuse_without_effect(flag_effects.AUDIT, dataset=name)
        audited = audited_challenge(model, name, settings)
    run_audit(audited, settings)


def _fraction(name: str) -> float | None:
    per_cent = FLAGS[name].value
    return None if per_cent is None else per_cent / 100


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
