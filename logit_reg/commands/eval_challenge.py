"""Measure what attacks leave of a network's accuracy.

With nothing else it evaluates the newest run under its challenge's protocol. --protocol names
frozen protocols (autoattack and adaptive also take --norm, --epsilon and data of your own);
without it the attack flags (--epsilon, --num_steps, ...) describe one attack.
--attack_file scores a submission as the challenge's run_attack.py does. --model and --data take
a network and images of your own. All values are in pixel units: [0, 1] for MNIST, [0, 255] for
CIFAR.

--first_eval_example and --num_eval_examples evaluate a slice of the images, so that a long
evaluation is made on several days or machines; --merge=DIR,DIR joins the results of slices to
that of one run.

An interrupted evaluation goes on when the same command is given again. --num_workers shares it
among processes, here or on a Ray cluster; the result is the same.
"""

import functools
import sys
from pathlib import Path

from absl import flags

from logit_reg.commands import command_line, flag_effects, flag_groups
from logit_reg.commands.command_line import FLAGS
from logit_reg.commands.flag_groups import TRIAL_EXAMPLES

flag_groups.define_model_flag()
flag_groups.define_data_flags()
flag_groups.define_challenge_flags()
flag_groups.define_own_model_flags()

flags.DEFINE_list("protocol", None, "frozen protocols, as paper-fgsm,paper-mnist")
flag_groups.define_example_flags()
flags.DEFINE_integer(
    "first_eval_example", 0, "place of the first test image, to evaluate a slice", lower_bound=0
)
flags.DEFINE_list("merge", None, "join the results of slices in these folders to --output_dir")
flags.DEFINE_bool("trial", False, f"to try the command out: at most {TRIAL_EXAMPLES} images")
flags.DEFINE_bool(
    "worst_case_only", False, "attack only what is still robust after the attacks before"
)
flag_groups.define_attack_flags("attack flag: ")
flag_groups.define_attack_dtype_flag()
flags.DEFINE_integer(
    "eot",
    1,
    "for randomised networks: passes over which gradients are averaged; most of 20 decide",
    lower_bound=1,
)

flags.DEFINE_list("attack_file", None, "score these attack.npy files instead of attacking")
flags.DEFINE_string("pred_path", "pred.npy", "where --attack_file writes the predictions")
flags.DEFINE_string("store_adv_path", None, "write the worst-case images found to this .npy")
flags.DEFINE_string("output_dir", None, "folder for result.json and ledger.csv")
flags.DEFINE_integer("num_workers", 1, "processes that share the work", lower_bound=1)
flags.DEFINE_enum("runner", "local", ["local", "ray"], "where they run: here, or a Ray cluster")
flags.DEFINE_float("num_cpus", 1, "--runner=ray: cores that a worker reserves", lower_bound=0)
flags.DEFINE_float("num_gpus", 0, "--runner=ray: GPUs that a worker reserves", lower_bound=0)
flags.DEFINE_bool("worker", False, "compute batches for another process of this command only")
flags.DEFINE_bool("progress", True, "draw progress bars")


def check_flags() -> None:
    """Refuse flags that have no effect."""
    # A protocol and a submission have their own attack; the file's would contradict it.
    has_attack = FLAGS.protocol or FLAGS.attack_file
    flag_groups.apply_config(without=flag_groups.ATTACK_FLAGS if has_attack else ())
    flag_effects.refuse_without_effect(flag_effects.EVALUATION)


def main() -> None:
    """Evaluate as the flags say."""
    from logit_reg.experiments.submissions import prepare_output

    if FLAGS.merge:
        _merge()
        return
    if FLAGS.trial:
        FLAGS["num_eval_examples"].value = min(
            TRIAL_EXAMPLES, FLAGS.num_eval_examples or TRIAL_EXAMPLES
        )
    if FLAGS.store_adv_path and not FLAGS.attack_file:
        prepare_output(Path(FLAGS.store_adv_path))
    if FLAGS.model or FLAGS.data:
        _evaluate_own()
    else:
        _evaluate_challenge()


def _merge() -> None:
    from logit_reg.commands import records
    from logit_reg.experiments.evaluations import print_result
    from logit_reg.experiments.merging import merge_slices
    from logit_reg.messages import UsageError, existing_folder

    output_dir = records.optional_path("output_dir")
    if output_dir is None:
        raise UsageError("--merge needs --output_dir, the folder for result.json and ledger.csv.")
    result = merge_slices([existing_folder("merge", name) for name in FLAGS.merge], output_dir)
    print_result(result)
    print(f"ledger: {output_dir / 'ledger.csv'}")
    command_line.print_next("report", {"runs": output_dir})


def _evaluate_challenge() -> None:
    from logit_reg.commands import records
    from logit_reg.experiments.evaluations import published_beside
    from logit_reg.experiments.measure import challenge_subject
    from logit_reg.experiments.sources import dataset_for, load_split
    from logit_reg.experiments.submissions import score_files
    from madry_compat.challenges import challenge_for

    model = records.given_model(FLAGS.model_dir)
    data_dir = records.data_dir(model)
    name = dataset_for(model, FLAGS.dataset, data_dir)
    flag_effects.refuse_without_effect(flag_effects.EVALUATION, dataset=name)
    challenge = challenge_for(name)
    dataset = load_split(name, "test", data_dir, download=FLAGS.download)
    if FLAGS.attack_file:
        score_files(
            model.network,
            [Path(path) for path in FLAGS.attack_file],
            dataset,
            challenge,
            epsilon=FLAGS.epsilon,
            batch_size=FLAGS.eval_batch_size or challenge.eval_batch_size,
            pred_path=Path(FLAGS.pred_path),
        )
        return
    choice = records.attack_choice()
    if choice == type(choice)():
        print(f"protocol: {challenge.protocol}, the challenge's own (choose with --protocol)")
    protocols = choice.on_challenge(challenge)
    subject = challenge_subject(model, dataset, FLAGS.num_eval_examples, FLAGS.first_eval_example)
    published = functools.partial(published_beside, model.release, dataset)
    _evaluate(subject, protocols, published, {"model_dir": model.path})


def _evaluate_own() -> None:
    from logit_reg.attacks.engine.forward import count_classes
    from logit_reg.commands import records
    from logit_reg.experiments.measure import own_subject

    own = records.own_model()
    num_classes = count_classes(own.network, own.images)
    protocols = records.attack_choice().on_own_data(own.threat, num_classes)
    names = ("model", "norm", "epsilon")
    of_model = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
    _evaluate(own_subject(own), protocols, dict, of_model)


def _evaluate(subject, protocols, published, of_model) -> None:
    from logit_reg.commands import records
    from logit_reg.experiments.attack_choice import is_strong
    from logit_reg.experiments.evaluations import print_result
    from logit_reg.experiments.measure import EvaluationSettings, measure, next_step
    from logit_reg.experiments.workers import WorkerSettings

    num_attacks = len({name for attacks in protocols.values() for name in attacks})
    flag_effects.refuse_without_effect(flag_effects.EVALUATION, num_attacks=num_attacks)
    workers = WorkerSettings(
        ("-m", "logit_reg.commands.eval_challenge", *sys.argv[1:]),
        FLAGS.num_workers,
        on_ray=FLAGS.runner == "ray",
        num_cpus=FLAGS.num_cpus,
        num_gpus=FLAGS.num_gpus,
    )
    settings = EvaluationSettings(
        seed=FLAGS.random_seed,
        batch_size=FLAGS.eval_batch_size,
        worst_case_only=FLAGS.worst_case_only,
        attack_dtype=FLAGS.attack_dtype,
        eot=FLAGS.eot,
        output_dir=records.optional_path("output_dir"),
        store_adv_path=records.optional_path("store_adv_path"),
        workers=workers if workers.count > 1 else None,
        is_worker=FLAGS.worker,
        show_progress=FLAGS.progress,
    )
    found = measure(subject, protocols, settings)
    if found is None:
        return
    output_dir, result = found
    print_result(result, published())
    print(f"ledger: {output_dir / 'ledger.csv'}")
    if subject.pgd_flatters and not any(map(is_strong, protocols)) and result["robust_accuracy"]:
        print("PGD flatters this family, run --protocol=autoattack")
    command, needed = next_step(subject, result, output_dir)
    if command == "eval_challenge":
        names = ("data", "bounds", "dataset", "data_dir", "data_path")
        of_data = {name: FLAGS[name].value for name in names if FLAGS[name].value is not None}
        needed = of_model | of_data | needed
    command_line.print_next(command, needed)


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__, check_flags=check_flags)


if __name__ == "__main__":
    run()
