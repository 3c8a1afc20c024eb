"""Write adversarial images for a network, as the challenges' pgd_attack.py does.

On the whole canonical test set the file is a valid submission (`attack.npy`). With
--target_model_dir the images made on one network are scored on another: a transfer, or black
box, attack. All values are in pixel units: [0, 1] for MNIST, [0, 255] for CIFAR.
"""

from pathlib import Path

from absl import flags

from logit_reg.commands import command_line, flag_effects, flag_groups
from logit_reg.commands.command_line import FLAGS

flag_groups.define_model_flag()
flags.DEFINE_string("target_model_dir", None, "another network to score the images on")
flag_groups.define_data_flags()
flag_groups.define_challenge_flags()
flag_groups.define_example_flags()
flag_groups.define_attack_flags()
flag_groups.define_attack_dtype_flag()
flags.DEFINE_string("store_adv_path", "attack.npy", "where the images go")
flags.DEFINE_bool("progress", True, "draw a progress bar")


def check_flags() -> None:
    """Refuse flags that have no effect."""
    flag_groups.apply_config()
    flag_effects.refuse_without_effect(flag_effects.ATTACK)


def main() -> None:
    """Attack as the flags say."""
    from logit_reg.commands import records
    from logit_reg.experiments.sources import dataset_for, load_split
    from logit_reg.experiments.submissions import AttackSettings, attack_and_score, prepare_output

    settings = AttackSettings(
        path=Path(FLAGS.store_adv_path),
        attack=records.attack_choice(),
        seed=FLAGS.random_seed,
        num_examples=FLAGS.num_eval_examples,
        batch_size=FLAGS.eval_batch_size,
        attack_dtype=FLAGS.attack_dtype,
        show_progress=FLAGS.progress,
    )
    prepare_output(settings.path)
    model = records.given_model(FLAGS.model_dir)
    data_dir = records.data_dir(model)
    name = dataset_for(model, FLAGS.dataset, data_dir)
    flag_effects.refuse_without_effect(flag_effects.ATTACK, dataset=name)
    target = None
    if FLAGS.target_model_dir:
        target = records.given_model(FLAGS.target_model_dir, "target_model_dir")
        dataset_for(target, name, data_dir)
    dataset = load_split(name, "test", data_dir, download=FLAGS.download)
    attack_and_score(model, target, dataset, settings)


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
