"""Write adversarial images for a network, as the challenges' pgd_attack.py does.

On the whole canonical test set the file is a valid submission (`attack.npy`). With
--target_model_dir the images made on one network are scored on another: a transfer, or black
box, attack. All values are in pixel units: [0, 1] for MNIST, [0, 255] for CIFAR.
"""

from pathlib import Path

from absl import flags

from logit_reg.commands import command_line, flag_effects, flag_groups
from logit_reg.commands.command_line import FLAGS
from logit_reg.messages import tell

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
    from logit_reg.evaluation.ledger import FLAGS_PROTOCOL, evaluation_identity
    from logit_reg.evaluation.run import evaluate, network_hash, predict
    from logit_reg.evaluation.state import EvaluationState
    from logit_reg.evaluation.units import attack_notices
    from logit_reg.experiments.evaluations import (
        TestImages,
        claim_file,
        note_file,
        plan_evaluation,
        read_attack_dtype,
    )
    from logit_reg.experiments.sources import dataset_for, load_split, num_examples
    from logit_reg.experiments.submissions import prepare_output, write_adversarial
    from madry_compat.challenges import challenge_for
    from madry_compat.data import to_pixels

    path = Path(FLAGS.store_adv_path)
    prepare_output(path)
    model = records.given_model(FLAGS.model_dir)
    data_dir = records.data_dir(model)
    name = dataset_for(model, FLAGS.dataset, data_dir)
    flag_effects.refuse_without_effect(flag_effects.ATTACK, dataset=name)
    scored = {"attacked": model}
    if FLAGS.target_model_dir:
        target = records.given_model(FLAGS.target_model_dir, "target_model_dir")
        dataset_for(target, name, data_dir)
        scored["target"] = target
    challenge = challenge_for(name)
    batch_size = FLAGS.eval_batch_size or challenge.eval_batch_size
    dataset = load_split(name, "test", data_dir, download=FLAGS.download)
    count = num_examples(FLAGS.num_eval_examples, len(dataset.images))
    images = to_pixels(dataset.images[:count], name)
    labels = dataset.labels[:count]

    choice = records.attack_choice()
    attacks = choice.attack(choice.threat(challenge), challenge)
    tell(attack_notices(attacks.values(), images.shape[1:]))
    lower = read_attack_dtype(FLAGS.attack_dtype, model.network, images, batch_size)
    plan = plan_evaluation(
        model.network,
        TestImages(name, images, labels, (challenge.lower, challenge.upper)),
        {FLAGS_PROTOCOL: attacks},
        seed=FLAGS.random_seed,
        gradient_logits_fn=lower,
    )
    claim_file(path, evaluation_identity(plan), "--store_adv_path")
    state = EvaluationState(path.parent / f".{path.stem}.state", network_hash(model.network))
    found = evaluate(
        model.network,
        attacks,
        images,
        labels,
        batch_size=batch_size,
        seed=FLAGS.random_seed,
        state=state,
        show_progress=FLAGS.progress,
        gradient_logits_fn=lower,
    )
    write_adversarial(path, found.adversarial, dataset, challenge)
    note_file(path, evaluation_identity(plan))
    state.clear()
    for role, scored_model in scored.items():
        clean = predict(scored_model.network, images, batch_size=batch_size) == labels
        wrong = predict(scored_model.network, found.adversarial, batch_size=batch_size) != labels
        print(
            f"{role} {scored_model.path}: clean {100 * clean.mean():.2f}%, on these images "
            f"{100 * (~wrong).mean():.2f}% ({count} of {name}, {next(iter(attacks))}, seed "
            f"{FLAGS.random_seed})"
        )


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
